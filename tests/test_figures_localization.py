"""Figures of patched grids, lenses and heads show the numbers that they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from circuits.figures import (
    Figure,
    attention_figure,
    head_effects_figure,
    heads_figure,
    lens_figure,
    lens_tokens_figure,
    patch_grid_figure,
    readout_figure,
    save_figure,
    sufficiency_figure,
)
from circuits.localization import (
    attention_patterns,
    contrastive_directions,
    head_effects,
    lens_tokens,
    logit_lens,
    patch_grid,
    score_heads,
    sufficiency,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Item, Task, compile_task
from tests.specs import View, svg_texts, unlabelled, views

ROWS = torch.randint(20, (2, 8, 5), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture
def task(bridge: HookedModel) -> Task:
    items = [
        Item(tuple(a), ((3,),), ((4,),), tuple(b), group=str(i)) for i, (a, b) in enumerate(zip(*ROWS, strict=True))
    ]  # fmt: skip
    return compile_task(bridge, items)


def shown(view: View) -> np.ndarray:
    """The numbers of a matrix' cells."""
    made = np.full((1 + max(view.values("i")), 1 + max(view.values("j"))), np.nan)
    for row in view.rows:
        made[row["i"], row["j"]] = np.nan if row["value"] is None else row["value"]
    return made


def drawn(figure: Figure, path: Path) -> bool:
    save_figure(figure, path)
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_grids_share_a_scale_with_zero_in_the_middle(
    bridge: HookedModel, task: Task, tmp_path: Path
) -> None:
    grid = patch_grid(bridge, task, n_random=1)
    figure = patch_grid_figure(grid)
    panels = views(figure)
    assert len(panels) == 4, "two directions, each with its null"
    for view, (what, way) in zip(
        panels, [("normalised", "noising"), ("normalised", "denoising"), ("null", "noising"), ("null", "denoising")],
        strict=True,
    ):  # fmt: skip
        matrix = grid.matrix(what, way)  # type: ignore[arg-type]
        np.testing.assert_array_equal(shown(view), matrix)
        low, *_, high = view.encoding["color"]["condition"]["scale"]["domain"]
        assert low == -high
    assert list(dict.fromkeys(panels[0].values("row"))) == ["0 resid_pre", "1 resid_pre"]
    assert not unlabelled(figure)
    assert drawn(figure, tmp_path / "grid.png")
    assert len(views(patch_grid_figure(grid, "change"))) == 2


def test_lenses_readouts_and_sufficiency(bridge: HookedModel, task: Task, tmp_path: Path) -> None:
    lens = logit_lens(bridge, task)
    rows = views(lens_figure(lens), "line")[0].rows
    own = [r["value"] for r in rows if r["run"] == "this example's stream"]
    np.testing.assert_allclose(own, lens.values.mean(1))
    assert not unlabelled(lens_figure(lens))
    assert drawn(lens_figure(lens), tmp_path / "lens.png")
    words = lens_tokens(bridge, ROWS[0][0])
    (texts,) = views(lens_tokens_figure(words), "text")
    assert texts.values("word") == [w for row in words.words for w in row]
    assert not unlabelled(lens_tokens_figure(words))
    found = contrastive_directions(bridge, task, n_random=3)
    figure = readout_figure(found)
    np.testing.assert_array_equal(shown(views(figure)[0]), found.matrix("accuracy"))
    assert not unlabelled(figure)
    kept = sufficiency(bridge, ["hook_embed", "blocks.0.attn.hook_z"], task, n_random=4)
    figure = sufficiency_figure(kept)
    assert views(figure, "point")[1].values("value") == list(kept.null)
    assert not unlabelled(figure)


def test_the_parts_of_a_heads_effect_stand_next_to_each_other(
    bridge: HookedModel, task: Task
) -> None:
    found = head_effects(bridge, task)
    figure = head_effects_figure(found)
    (points,) = views(figure, "point")
    rows = {(r["head"], r["run"]): r["change"] for r in points.rows}
    for effect in found.effects():
        assert rows[effect.head, "total"] == effect.total.value
        assert rows[effect.head, "self-repair"] == effect.self_repair.value
    assert not unlabelled(figure)


def test_heads_above_chance_are_framed(bridge: HookedModel, tmp_path: Path) -> None:
    def previous(value: torch.Tensor) -> torch.Tensor:
        made = value.clone()
        made[:, 2] = torch.eye(value.shape[2]).roll(-1, 1).tril()
        return made

    with bridge.intervening({"blocks.0.attn.hook_pattern": previous}):
        scores = score_heads(bridge, ["previous_token"], n=12)
    cells, frames = views(heads_figure(scores), "rect")
    np.testing.assert_array_equal(shown(cells), scores.matrix("previous_token"))
    assert {"i": 0, "j": 2} in frames.rows
    assert not unlabelled(heads_figure(scores))
    assert drawn(heads_figure(scores), tmp_path / "heads.png")


def test_the_column_of_a_sink_is_dimmed_and_named(bridge: HookedModel, tmp_path: Path) -> None:
    def sinking(value: torch.Tensor) -> torch.Tensor:
        made = value * 0.2
        made[..., 0] += 0.8
        return made

    with bridge.intervening({"blocks.0.attn.hook_pattern": sinking}):
        found = attention_patterns(bridge, [7, 1, 2, 3, 4, 5], ["0.1"])
    figure = attention_figure(found)
    raw = views(figure)[0]
    strength = {(r["i"], r["j"]): r["opacity"] for r in raw.rows}
    assert all(strength[i, 0] < strength[i, 1] for i in range(1, 6))
    assert all(r["j"] <= r["i"] for r in raw.rows), "no query looks at a later key"
    assert [text for *_, text in svg_texts(figure) if text.startswith("sink (dimmed): 7 at 0 gets")]
    top = raw.encoding["color"]["condition"]["scale"]["domain"][-1]
    assert top == pytest.approx(float(found.patterns[0].raw[:, 1:].max()))
    assert list(dict.fromkeys(raw.values("row"))) == ["7", "1", "2", "3", "4", "5"]
    assert not unlabelled(figure)
    assert drawn(figure, tmp_path / "attention.png")
