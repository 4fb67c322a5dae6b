"""Grids of patched cells against hooks written by hand, and keeping units alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.edits.recipes import Recipe, edited
from circuits.examples import Examples
from circuits.experiments import run
from circuits.localization import keep_only, patch_grid, sufficiency
from circuits.localization.cells import keys_of
from circuits.localization.pairing import OtherPairs
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.selecting import select_sites
from circuits.models.zoo.loading import load_model
from circuits.tasks import Item, Task, UnitActivation, compile_task, of_examples
from circuits.tasks.builtin import load_task

GENERATOR = torch.Generator().manual_seed(3)
CLEAN, CORRUPTED = torch.randint(20, (2, 6, 8), generator=GENERATOR)
ANSWER, OTHER = 5, 11


def pairs(model: HookedModel, lengths: tuple[int, ...] = (8,) * 6) -> Task:
    items = [
        Item(
            tuple(CLEAN[i, :n].tolist()), ((ANSWER,),), ((OTHER,),), tuple(CORRUPTED[i, :n].tolist()),
            group=f"pair {i}", spans={"middle": (2, 4)},
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    return compile_task(model, items)


def by_hooks(
    model: HookedModel,
    base: Tensor,
    donor: Tensor,
    site: str,
    put: Callable[[Tensor, Tensor], object],
) -> Tensor:
    """A logit difference with TransformerLens' own hooks, one pass a cell."""
    bridge: Any = model.module
    other = model.run(donor, read=[site])[site]

    def hook(value: Tensor, hook: object) -> Tensor:
        made = value.clone()
        put(made, other)
        return made

    with torch.no_grad():
        logits = bridge.run_with_hooks(base, fwd_hooks=[(site, hook)])
    return (logits[:, -1, ANSWER] - logits[:, -1, OTHER]).double()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_cell_is_what_a_hook_by_hand_gives(bridge: HookedModel, direction) -> None:
    base, donor = (CLEAN, CORRUPTED) if direction == "noising" else (CORRUPTED, CLEAN)
    task = pairs(bridge)
    expected: dict[str, Tensor] = {}
    for layer in range(2):
        for name in (f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_mlp_out"):
            for p in (0, 3, 7):

                def at(value: Tensor, other: Tensor, p: int = p) -> None:
                    value[:, p] = other[:, p]

                expected[f"{name}@{p}"] = by_hooks(bridge, base, donor, name, at)
        for kind, axis in (("z", 2), ("k", 2), ("pattern", 1)):
            name = f"blocks.{layer}.attn.hook_{kind}"
            for h in range(4):

                def head(value: Tensor, other: Tensor, h: int = h, axis: int = axis) -> None:
                    value.select(axis, h).copy_(other.select(axis, h))

                expected[f"{name}:{h}"] = by_hooks(bridge, base, donor, name, head)
        name = f"blocks.{layer}.attn.hook_z"

        def one(value: Tensor, other: Tensor) -> None:
            value[:, 6, 1] = other[:, 6, 1]

        expected[f"{name}:1@-2"] = by_hooks(bridge, base, donor, name, one)

        def whole(value: Tensor, other: Tensor) -> None:
            value.copy_(other)

        expected[f"blocks.{layer}.hook_attn_out"] = by_hooks(
            bridge, base, donor, f"blocks.{layer}.hook_attn_out", whole
        )
    grids = [
        patch_grid(bridge, task, "resid_pre,mlp_out", direction=direction, n_random=0, batch=4),
        patch_grid(bridge, task, ["z", "k", "pattern"], by="head", direction=direction, n_random=0),
        patch_grid(bridge, task, by="head_position", positions=[-2], direction=direction, n_random=0),
        patch_grid(bridge, task, "attn_out", by="site", direction=direction, n_random=0),
    ]  # fmt: skip
    plain = torch.stack([bridge.logits(t)[:, -1] for t in (base, donor)]).double()
    checked = 0
    for grid in grids:
        side = grid.side(direction)
        for run_, logits in zip((side.base, side.other), plain, strict=True):
            np.testing.assert_allclose(run_, logits[:, ANSWER] - logits[:, OTHER], atol=1e-6)
        for cell, values in zip(grid.cells, side.patched, strict=True):
            key = (
                str(cell)
                if cell.column is None
                else f"{str(cell).partition('@')[0]}@{cell.column.name.split()[0]}"
            )
            if key in expected:
                np.testing.assert_allclose(values, expected[key], atol=1e-6, err_msg=key)
                checked += 1
    assert checked == len(expected)


def test_shares_intervals_and_nulls_by_hand(bridge: HookedModel) -> None:
    task = pairs(bridge)
    grid = patch_grid(bridge, task, "resid_pre", positions=[7], n_random=1, seed=4)
    side = grid.side("denoising")
    others = OtherPairs(bridge, task, task.examples, [bridge.site("blocks.0.hook_resid_pre")], 1, 4)
    partner = others.partners[0]
    assert all(p != i for i, p in enumerate(partner))
    name = "blocks.1.hook_resid_pre"
    row = [c.site for c in grid.cells].index(name)

    def at(value: Tensor, other: Tensor) -> None:
        value[:, 7] = other[:, 7]

    random = by_hooks(bridge, CORRUPTED, CLEAN[partner], name, at)
    np.testing.assert_allclose(side.random[0, row], random, atol=1e-6)
    effect = grid.effects("denoising")[row]
    change = side.patched[row] - side.base
    gap = (side.other - side.base).mean()
    assert effect.change == pytest.approx(change.mean())
    assert effect.normalised == pytest.approx(change.mean() / gap)
    assert effect.null == pytest.approx((random.numpy() - side.base).mean() / gap, rel=1e-5)
    assert effect.low < effect.change < effect.high
    # all 64 changes of sign of six differences, corrected for two cells
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    differences = side.patched - side.random[0]
    sizes = np.abs(signs @ differences.T) >= np.abs(differences.sum(1)) * (1 - 1e-9)
    small, large = sorted(raw := sizes.mean(0).tolist())
    holm = {small: min(1, 2 * small), large: max(min(1, 2 * small), large)}
    assert [e.p_value for e in grid.effects("denoising")] == pytest.approx([holm[p] for p in raw])
    assert grid.matrix("change", "denoising")[row, 0] == pytest.approx(effect.change)


def test_patching_all_of_the_stream_is_the_other_run(bridge: HookedModel) -> None:
    grid = patch_grid(bridge, pairs(bridge), ["blocks.0.hook_resid_pre", "hook_embed"], by="site")
    for direction in ("noising", "denoising"):
        side = grid.side(direction)
        for values in side.patched:
            np.testing.assert_allclose(values, side.other, atol=1e-6)
        np.testing.assert_allclose(grid.matrix("normalised", direction), 1, atol=1e-5)
    noising, denoising = (grid.side(d) for d in ("noising", "denoising"))
    np.testing.assert_array_equal(noising.base, denoising.other)


def test_texts_of_other_lengths_have_their_own_ends(bridge: HookedModel) -> None:
    lengths = (8, 5, 8, 6, 5, 8)
    task = pairs(bridge, lengths)
    grid = patch_grid(
        bridge, task, "blocks.1.hook_resid_pre", positions=[-1, 5, "middle"], direction="noising"
    )
    side = grid.side()
    for i, n in enumerate(lengths):
        clean, other = CLEAN[i : i + 1, :n], CORRUPTED[i : i + 1, :n]
        for row, places in enumerate(([n - 1], [5] if n > 5 else [], [2, 3])):

            def at(value: Tensor, donor: Tensor, places: list[int] = places) -> None:
                value[:, places] = donor[:, places]

            if not places:
                assert math.isnan(side.patched[row, i])
                continue
            expected = by_hooks(bridge, clean, other, "blocks.1.hook_resid_pre", at)
            assert side.patched[row, i] == pytest.approx(float(expected), abs=1e-6)
    assert [e.n for e in grid.effects()] == [6, 4, 6]
    assert math.isnan(side.random[0, 0, 3]), "no other text has six tokens"
    assert not np.isnan(side.random[0, 0, [0, 1, 2, 4, 5]]).any()


def test_answers_of_several_tokens_are_patched_in_the_prompt_alone(bridge: HookedModel) -> None:
    items = [
        Item(tuple(CLEAN[i].tolist()), ((4, 5),), ((6, 7, 8),), tuple(CORRUPTED[i].tolist()), group=str(i))
        for i in range(3)
    ]  # fmt: skip
    task = compile_task(bridge, items, metric="log_probability")
    assert keys_of(task) == tuple(range(8))
    grid = patch_grid(bridge, task, "blocks.0.hook_resid_pre", positions=[3], direction="noising")
    prompt = torch.cat([CLEAN[:3], torch.full((3, 1), 4)], 1)
    donor = bridge.run(CORRUPTED[:3], read=["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]

    def at(value: Tensor) -> Tensor:
        made = value.clone()
        made[:, 3] = donor[:, 3]
        return made

    log_p = bridge.logits(prompt, {"blocks.0.hook_resid_pre": at}).double().log_softmax(-1)
    np.testing.assert_allclose(grid.side().patched[0], log_p[:, 7, 4] + log_p[:, 8, 5], atol=1e-5)


def test_metrics_that_read_inside_or_compare_with_the_model(bridge: HookedModel) -> None:
    task, unit = pairs(bridge), "blocks.1.mlp.hook_post:3@-1"
    inside = patch_grid(
        bridge,
        task,
        "blocks.0.hook_resid_pre",
        by="site",
        metric=UnitActivation.named(bridge, unit),
    )
    value = {d: bridge.run(t, read=["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"][:, -1, 3]
             for d, t in (("noising", CORRUPTED), ("denoising", CLEAN))}  # fmt: skip
    for direction, expected in value.items():
        np.testing.assert_allclose(inside.side(direction).other, expected, atol=1e-6)  # type: ignore[arg-type]
        np.testing.assert_allclose(inside.side(direction).patched[0], expected, atol=1e-6)  # type: ignore[arg-type]
    apart = patch_grid(bridge, task, "blocks.0.hook_resid_pre", by="site", metric="kl")
    p, q = (bridge.logits(t)[:, -1].double().log_softmax(-1) for t in (CLEAN, CORRUPTED))
    side = apart.side("noising")
    np.testing.assert_allclose(side.base, 0, atol=1e-12)
    np.testing.assert_allclose(side.other, (p.exp() * (p - q)).sum(1), atol=1e-6)


def test_images_by_channel_and_by_place(branches: HookedModel) -> None:
    x = branches.input.example(8)
    task = of_examples(Examples.given(branches, x[:4], labels=[0, 1, 2, 0]))
    task = replace(task, counterparts=Examples.given(branches, x[4:]))
    channels = patch_grid(branches, task, "cat", by="unit", direction="noising", n_random=0)
    places = patch_grid(branches, task, "out_relu", by="position", direction="noising", n_random=0)
    donor = branches.run(x[4:], read=["cat", "out_relu"])
    labels = torch.tensor([0, 1, 2, 0])

    def loss(site: str, put) -> Tensor:
        def change(value: Tensor) -> Tensor:
            made = value.clone()
            put(made, donor[site])
            return made

        logits = branches.logits(x[:4], {site: change}).double()
        return -logits.log_softmax(1)[torch.arange(4), labels]

    def channel(value: Tensor, other: Tensor) -> None:
        value[:, 4] = other[:, 4]

    def place(value: Tensor, other: Tensor) -> None:
        value[:, :, 1, 3] = other[:, :, 1, 3]

    np.testing.assert_allclose(channels.side().patched[4], loss("cat", channel), atol=1e-6)
    at = [c.column.name for c in places.cells if c.column is not None].index("1,3")
    np.testing.assert_allclose(places.side().patched[at], loss("out_relu", place), atol=1e-6)


# --- known circuits ------------------------------------------------------------------------------


def test_copying_hangs_on_the_previous_token_head_and_the_heads_of_layer_1() -> None:
    model = load_model("induction")
    grid = patch_grid(model, load_task(model, n=12), by="head", n_random=0)
    noising, denoising = grid.matrix("change", "noising"), grid.matrix("change", "denoising")
    order = np.argsort(-noising.ravel())
    assert order[0] == 3, "head 0.3 first"
    assert set(order[1:3]) <= {4, 5, 6, 7}, "then heads of layer 1"
    assert noising[0, 3] > 2, "without it the cross-entropy grows by several nats"
    assert (noising[1] > 0).all()
    assert (denoising[1] < 0).all(), "restored, they make it smaller"


def test_addition_by_hand_is_decided_at_the_equals_sign_behind_attention() -> None:
    """Both numbers count before attention moves them, and the equals sign alone behind it."""
    model = load_model("addition-by-hand")
    grid = patch_grid(
        model, load_task(model, n=10), "resid_pre,attn_out,mlp_out,resid_post", direction="noising", n_random=0
    )  # fmt: skip
    shares = dict(zip(grid.rows, grid.matrix(), strict=True))
    before = shares["blocks.0.hook_resid_pre"]
    assert (before[:2] > 0.5).all()
    assert before[2] == pytest.approx(0, abs=1e-6), "the equals sign is the same in both"
    for site in ("blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"):
        assert shares[site][2] == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(shares[site][:2], 0, atol=1e-6)


# --- keeping units alone ---------------------------------------------------------------------------


def test_keeping_everything_changes_no_bit_and_nothing_leaves_the_other_run(
    bridge: HookedModel,
) -> None:
    task = pairs(bridge)
    everything = keep_only(bridge, ["hook_embed", "z", "mlp_out"])
    nothing = keep_only(bridge, (), name="nothing")
    outcomes = run(bridge, [everything, nothing], task)
    other = run(bridge, [], task, corrupted=True)
    for measure in ("logit_difference", "cross_entropy", "logit_of_first"):
        np.testing.assert_array_equal(outcomes.of(measure, "kept"), outcomes.of(measure))
    for measure in ("logit_difference", "cross_entropy"):
        np.testing.assert_allclose(outcomes.of(measure, "nothing"), other.of(measure), atol=1e-6)


def test_keeping_heads_by_hand(bridge: HookedModel) -> None:
    task = pairs(bridge)
    names = [
        "hook_embed",
        *(f"blocks.{i}.{s}" for i in range(2) for s in ("attn.hook_z", "hook_mlp_out")),
    ]
    other = bridge.run(CORRUPTED, read=names)
    kept = {
        "blocks.0.attn.hook_z": [1],
        "blocks.1.attn.hook_z": [0, 3],
        "blocks.1.hook_mlp_out": list(range(16)),
    }

    def outside(name: str, donor: Tensor):
        def change(value: Tensor) -> Tensor:
            made = donor.expand_as(value).clone()
            axis = 2
            made.index_copy_(axis, torch.tensor(kept.get(name, []), dtype=torch.int64),
                             value.index_select(axis, torch.tensor(kept.get(name, []), dtype=torch.int64)))  # fmt: skip
            return made

        return change

    units = [
        "blocks.0.attn.hook_z:1",
        "blocks.1.attn.hook_z:0",
        "blocks.1.attn.hook_z:3",
        "blocks.1.hook_mlp_out",
    ]
    logits = bridge.logits(CLEAN, {n: outside(n, other[n]) for n in names})[:, -1].double()
    found = run(bridge, [keep_only(bridge, units)], task).of("logit_difference", "kept")
    np.testing.assert_allclose(found, logits[:, ANSWER] - logits[:, OTHER], atol=1e-6)
    for how in ("zero", "mean", "position_mean"):
        variant = keep_only(bridge, units, how=how, examples=task.examples)
        clean = bridge.run(CLEAN, read=names)
        instead = {
            "zero": lambda v: torch.zeros_like(v), "mean": lambda v: v.mean((0, 1), keepdim=True),
            "position_mean": lambda v: v.mean(0, keepdim=True),
        }[how]  # fmt: skip
        wanted = bridge.logits(CLEAN, {n: outside(n, instead(clean[n])) for n in names})[:, -1]
        recipe = Recipe.of(bridge, variant.edits)
        with edited(bridge, Recipe.from_dict(recipe.to_dict())):
            made = bridge.logits(CLEAN)[:, -1]
        torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_the_copying_circuit_suffices_more_than_random_heads_do() -> None:
    model = load_model("induction")
    task = load_task(model, n=8)
    keep = ["hook_embed", "blocks.0.attn.hook_z:3", "blocks.1.attn.hook_z:0-1"]
    found = sufficiency(model, keep, task, n_random=25, seed=2)
    assert 0.6 < found.low < found.faithfulness < found.high < 0.9
    assert found.kept == tuple(keep)
    for share, kept in zip(found.null, found.null_sets, strict=True):
        copies = any(u.startswith("blocks.0.attn.hook_z") and "3" in u[-3:] for u in kept)
        assert kept[0] == "hook_embed"
        assert copies or share < found.faithfulness, "no set without the previous-token head"
    k = sum(share >= found.faithfulness for share in found.null)
    assert found.p_value == pytest.approx((1 + k) / 26)
    whole = sufficiency(model, ["hook_embed", "z"], task, n_random=3)
    assert whole.faithfulness == 1
    assert whole.null == ()


# --- what is refused -------------------------------------------------------------------------------


def test_bad_input_is_one_clear_line(bridge: HookedModel, branches: HookedModel) -> None:
    task = pairs(bridge)
    alone = of_examples(Examples.given(bridge, CLEAN))
    with pytest.raises(
        ValueError, match=r"^task next token has no counterparts: there is nothing to patch from$"
    ):
        patch_grid(bridge, alone)
    with pytest.raises(
        KeyError, match="unknown site of tiny-bridge 'resid_pr': did you mean resid_pre"
    ):
        patch_grid(bridge, task, "resid_pr")
    with pytest.raises(KeyError, match=r"no site of tiny-bridge matches 'blox\.\*'"):
        patch_grid(bridge, task, "blox.*")
    with pytest.raises(
        ValueError, match="position 8 is outside every text of task task: expected -8 to 7"
    ):
        patch_grid(bridge, task, positions=[0, 8])
    with pytest.raises(
        ValueError,
        match="position 'end' is not a span of task task: expected whole numbers or middle",
    ):
        patch_grid(bridge, task, positions="end")
    with pytest.raises(
        ValueError, match="positions go with by position or head_position, not with 'head'"
    ):
        patch_grid(bridge, task, by="head", positions=[1])
    with pytest.raises(
        ValueError, match=r"by 'head': the units of blocks\.0\.hook_mlp_out are of kind"
    ):
        patch_grid(bridge, task, "mlp_out", by="head")
    with pytest.raises(
        ValueError,
        match=r"by 'position': site blocks\.0\.attn\.hook_pattern has no position axis",
    ):
        patch_grid(bridge, task, "pattern")
    with pytest.raises(ValueError, match="measure nan of the intact model is nan on example"):
        patch_grid(bridge, task, metric=nan)
    first = bridge.logits(CLEAN)[:, -1, 0]

    def undefined(output: Tensor) -> Tensor:
        return torch.where(torch.isclose(output[:, -1, 0], first), 1.0, float("nan"))

    with pytest.raises(ValueError, match=r"measure undefined of variant .* is nan on example"):
        patch_grid(bridge, task, "blocks.0.hook_resid_pre", by="site", metric=undefined)
    images = of_examples(Examples.given(branches, branches.input.example(2), labels=[0, 1]))
    images = replace(
        images, counterparts=Examples.given(branches, branches.input.example(2, seed=1))
    )
    with pytest.raises(
        ValueError, match="sites: model Branches has no default sites for by 'position'"
    ):
        patch_grid(branches, images)
    with pytest.raises(
        ValueError,
        match=r"sites stem_relu \(8 x 10\) and cat \(4 x 5\) have maps of different sizes",
    ):
        patch_grid(branches, images, ["stem_relu", "cat"])
    short = pairs(bridge, (8, 5, 8))
    with pytest.raises(
        ValueError, match="how 'position_mean' needs texts of equal length: these have 5 to 8"
    ):
        keep_only(bridge, (), how="position_mean", examples=short.examples)
    with pytest.raises(
        ValueError,
        match=r"keep 'blocks\.0\.hook_resid_pre:1': blocks\.0\.hook_resid_pre is not among",
    ):
        keep_only(bridge, ["blocks.0.hook_resid_pre:1"])
    with pytest.raises(
        ValueError, match="model Branches has no heads and MLPs under their usual names"
    ):
        keep_only(branches, ["cat:1"])
    with pytest.raises(ValueError, match="how 'mean' needs examples"):
        keep_only(bridge, (), how="mean")
    with pytest.raises(
        ValueError, match="task next token has no counterparts: how 'counterpart' needs them"
    ):
        sufficiency(bridge, (), alone)


def nan(output: Tensor) -> Tensor:
    return output.new_full((len(output),), float("nan"))


def test_sites_have_short_names(bridge: HookedModel) -> None:
    assert [s.name for s in select_sites(bridge, "z, embed")] == [
        "blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "hook_embed"
    ]  # fmt: skip
    assert [s.name for s in select_sites(bridge, "blocks.1.hook_*_out")] == [
        "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"
    ]  # fmt: skip
