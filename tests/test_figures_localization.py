"""Figures of patched grids, lenses and heads show the numbers that they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from circuits.figures import (
    attention_figure,
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
    lens_tokens,
    logit_lens,
    patch_grid,
    score_heads,
    sufficiency,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Item, Task, compile_task

ROWS = torch.randint(20, (2, 8, 5), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture
def task(bridge: HookedModel) -> Task:
    items = [
        Item(tuple(a), ((3,),), ((4,),), tuple(b), group=str(i)) for i, (a, b) in enumerate(zip(*ROWS, strict=True))
    ]  # fmt: skip
    return compile_task(bridge, items)


def drawn(figure, path: Path) -> bool:
    save_figure(figure, path)
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_grids_share_a_scale_with_zero_in_the_middle(
    bridge: HookedModel, task: Task, tmp_path: Path
) -> None:
    grid = patch_grid(bridge, task, n_random=1)
    figure = patch_grid_figure(grid)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(images) == 4, "two directions, each with its null"
    for image, (what, way) in zip(
        images, [("normalised", "noising"), ("normalised", "denoising"), ("null", "noising"), ("null", "denoising")],
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(image.get_array(), grid.matrix(what, way))  # type: ignore[arg-type]
        low, high = image.get_clim()
        assert low == -high
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "0 resid_pre",
        "1 resid_pre",
    ]
    assert drawn(figure, tmp_path / "grid.png")
    assert len([a for a in patch_grid_figure(grid, "change").axes if a.images]) == 2


def test_lenses_readouts_and_sufficiency(bridge: HookedModel, task: Task, tmp_path: Path) -> None:
    lens = logit_lens(bridge, task)
    axis = lens_figure(lens).axes[0]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), lens.values.mean(1))
    assert drawn(lens_figure(lens), tmp_path / "lens.png")
    words = lens_tokens(bridge, ROWS[0][0])
    texts = [t.get_text() for t in lens_tokens_figure(words).axes[0].texts]
    assert texts == [w for row in words.words for w in row]
    found = contrastive_directions(bridge, task, n_random=3)
    figure = readout_figure(found)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), found.matrix("accuracy"))
    kept = sufficiency(bridge, ["hook_embed", "blocks.0.attn.hook_z"], task, n_random=4)
    points = sufficiency_figure(kept).axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(np.asarray(points)[:, 1], kept.null)


def test_heads_above_chance_are_framed(bridge: HookedModel, tmp_path: Path) -> None:
    def previous(value: torch.Tensor) -> torch.Tensor:
        made = value.clone()
        made[:, 2] = torch.eye(value.shape[2]).roll(-1, 1).tril()
        return made

    with bridge.intervening({"blocks.0.attn.hook_pattern": previous}):
        scores = score_heads(bridge, ["previous_token"], n=12)
    frames = heads_figure(scores).axes[0].patches
    assert (2 - 0.5, 0 - 0.5) in [frame.get_xy() for frame in frames]  # type: ignore[attr-defined]
    assert drawn(heads_figure(scores), tmp_path / "heads.png")


def test_the_column_of_a_sink_is_dimmed_and_named(bridge: HookedModel, tmp_path: Path) -> None:
    def sinking(value: torch.Tensor) -> torch.Tensor:
        made = value * 0.2
        made[..., 0] += 0.8
        return made

    with bridge.intervening({"blocks.0.attn.hook_pattern": sinking}):
        found = attention_patterns(bridge, [7, 1, 2, 3, 4, 5], ["0.1"])
    figure = attention_figure(found)
    raw = figure.axes[0]
    strength = np.asarray(raw.images[0].get_alpha())
    assert (strength[:, 0] < strength[:, 1]).all()
    assert "sink (dimmed): 7 at 0 gets" in raw.get_title()
    assert raw.images[0].get_clim()[1] == pytest.approx(float(found.patterns[0].raw[:, 1:].max()))
    assert [t.get_text() for t in raw.get_xticklabels()] == ["7", "1", "2", "3", "4", "5"]
    assert drawn(figure, tmp_path / "attention.svg".replace("svg", "png"))
