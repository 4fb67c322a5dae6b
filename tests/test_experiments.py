"""Experiments against loops in plain torch: every variant, every measure, and what random variants are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.edits.activations import scale, zero
from circuits.edits.estimation import steer
from circuits.edits.recipes import edited
from circuits.edits.records import read_edit
from circuits.effects import measure
from circuits.examples import Examples
from circuits.experiments import INTACT, Variant, null_of, run
from circuits.experiments.ablation import ablate
from circuits.means import activities, site_mean
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks import Item, Question, Task, as_metric, compile_task, of_examples
from circuits.units import Direction, Unit
from tests.conftest import seeded
from tests.test_padding import Attending

TOKENS = torch.randint(20, (7, 9), generator=torch.Generator().manual_seed(4))


def pictures(model: HookedModel, n: int = 6) -> Examples:
    labels = [i % 3 for i in range(n)]
    return Examples.given(model, model.input.example(n, seed=3), labels=labels)


def by_hand(model: HookedModel, x: Tensor, labels: list[int], edits: list) -> dict[str, np.ndarray]:
    """Measures of a classifier with edits in force, in plain torch."""
    before = model.logits(x).double()
    with edited(model, edits):
        after = model.logits(x).double()
    right = torch.tensor(labels)
    p, q = before.log_softmax(1), after.log_softmax(1)
    return {
        "cross_entropy": F.cross_entropy(after, right, reduction="none").numpy(),
        "accuracy": (after.argmax(1) == right).double().numpy(),
        "kl": (p.exp() * (p - q)).sum(1).numpy(),
        "top1_changed": (after.argmax(1) != before.argmax(1)).double().numpy(),
        "logit_of_first": after[torch.arange(len(x)), before.argmax(1)].numpy(),
    }


def test_all_variants_of_all_kinds_are_what_a_loop_gives(branches: HookedModel) -> None:
    examples = pictures(branches)
    many = {
        "early": [zero("stem_relu:1,4")],
        "late": [scale("out_relu:0", -2.0)],
        "two places": [zero("right_relu:0"), scale("out_relu:2", 3.0)],
        "weights": [read_edit(branches, "scale_weights into=left:1 factor=0.5")],
        "both": [read_edit(branches, "scale_weights into=left:1 factor=0.5"), zero("out_relu:5")],
        "steered": [steer(Direction("inner", torch.arange(1.0, 7.0)), 0.7)],
    }
    variants = [Variant(name, tuple(edits)) for name, edits in many.items()]
    outcomes = run(branches, variants, of_examples(examples), batch=4)
    assert outcomes.variants == (INTACT, *many)
    assert examples.labels is not None
    for name, edits in {INTACT: [], **many}.items():
        expected = by_hand(branches, examples.inputs, list(examples.labels), edits)
        for measure_name, values in expected.items():
            np.testing.assert_allclose(
                outcomes.of(measure_name, name), values, rtol=1e-5, atol=1e-6, err_msg=f"{name} {measure_name}"
            )  # fmt: skip
    assert not branches.edited


def test_a_pass_begins_at_the_first_site_that_differs(branches: HookedModel) -> None:
    """Whatever is before it runs on a single example once it is known that it may."""
    seen: list[int] = []
    handle = branches.module.stem.register_forward_hook(lambda m, a, out: seen.append(len(out)))  # type: ignore[union-attr]
    try:
        variants = [Variant(str(i), (zero(f"out_relu:{i}"),)) for i in range(6)]
        run(branches, variants, of_examples(pictures(branches, 12)), batch=6)
    finally:
        handle.remove()
    # two batches of the intact model, a pass to try it, and two passes of all six variants
    assert sorted(seen) == [1, 1, 1, 6, 6]


def test_tokens_begin_at_the_stream_before_a_head(bridge: HookedModel) -> None:
    task = of_examples(Examples.given(bridge, TOKENS))
    variants = [Variant(str(i), (zero(f"blocks.1.attn.hook_z:{i}"),)) for i in range(4)]
    outcomes = run(bridge, variants, task, batch=3)
    for i in range(4):
        with edited(bridge, list(variants[i].edits)):
            logits = bridge.logits(TOKENS).double()
        expected = -logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0].mean(1)
        np.testing.assert_allclose(
            outcomes.of("cross_entropy", str(i)), expected, rtol=1e-5, atol=1e-6
        )
    assert outcomes.counts.tolist() == [8.0] * 7


def test_means_are_over_examples_or_over_tokens(bridge: HookedModel) -> None:
    rows = [TOKENS[:1, :3], TOKENS[1:2, :9]]
    outcomes = run(bridge, [], of_examples(Examples.given(bridge, rows)))
    losses = []
    for row in rows:
        logits = bridge.logits(row).double()[0, :-1].log_softmax(-1)
        losses.append(-logits.gather(1, row[0, 1:, None])[:, 0])
    assert outcomes.mean("cross_entropy") == pytest.approx(
        float((losses[0].mean() + losses[1].mean()) / 2), abs=1e-5
    )
    assert outcomes.mean("cross_entropy", over="tokens") == pytest.approx(
        float(torch.cat(losses).mean()), abs=1e-5
    )


# --- one question, whichever verb asks it ----------------------------------------------------------

SCALED = {"zero": 0.0, "mean": None}


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_ablate_and_measure_give_one_answer(branches: HookedModel, how: str, seed: int) -> None:
    """Estimates, random units, intervals and p-values are the same whichever verb asks."""
    from circuits.edits.activations import Set

    site = ["stem_relu", "out_relu", "inner"][seed]
    units = [f"{site}:{i}" for i in ((1, 2), (0,), (3, 4))[seed]]
    examples = pictures(branches, 9)
    taken = ablate(branches, units, examples, how=how, n_random=25, seed=seed)
    edit = zero(units)
    if how == "mean":
        value = branches.run(examples.inputs, read=[site])[site].double()
        which = [Unit.parse(u).index for u in units]
        edit = Set(edit.units, values=value[:, which].mean((0, 2, 3)))
    measured = measure(branches, [edit], examples, n_random=25, seed=seed, batch=32)
    assert measured.null_is == taken.null_is
    for name, effect in taken.effects.items():
        other = measured.effects[name]
        for what in ("intact", "change", "low", "high", "p_value"):
            assert getattr(other, what) == pytest.approx(getattr(effect, what), abs=1e-6), (
                name,
                what,
            )
        np.testing.assert_allclose(other.null, effect.null, atol=1e-6)


# --- the null --------------------------------------------------------------------------------------


def test_twins_are_alive_and_as_active_and_never_the_units_themselves(own_net: HookedModel) -> None:
    model = own_net
    with (
        torch.no_grad()
    ):  # two dead units: a bias keeps one below zero, and the other is always the same
        model.module.stem.bias[3] = -1e6  # type: ignore[union-attr, index]
        model.module.stem.weight[5] = 0  # type: ignore[union-attr, index]
        model.module.stem.bias[5] = 0.7  # type: ignore[union-attr, index]
    examples = Examples.given(model, model.input.example(4))
    seen = activities(model, ["relu"], examples)["relu"]
    values = model.run(examples.inputs, read=["relu"])["relu"].double().movedim(1, 0).flatten(1)
    np.testing.assert_array_equal(seen.span, (values.amax(1) - values.amin(1)).numpy())
    assert seen.rms[5] == pytest.approx(0.7)
    alive = seen.alive
    assert alive.sum() >= 4
    assert not alive[3]
    assert not alive[5]
    null = null_of(model, Variant("x", (zero("relu:0,1"),)), examples, n=8, seed=1)
    assert null.is_.endswith(f"about as active ({(~alive).sum()} of 8 units of relu are dead)")
    for units in null.units:
        assert not {u.index for u in units} & {0, 1, 3, 5}
    assert len({frozenset(u) for u in null.units}) == len(null.units) > 0


def test_too_few_units_make_random_directions_of_equal_norm(bridge: HookedModel) -> None:
    site = bridge.site("blocks.0.attn.hook_z")
    examples = Examples.given(bridge, TOKENS)
    own = Variant("x", (zero(f"{site.name}:2"),))
    null = null_of(bridge, own, examples, n=30, seed=5)
    assert "random changes of equal norm" in null.is_
    assert "3 other live units" in null.is_
    assert len(null.variants) == 30
    value = bridge.run(TOKENS, read=[site])[site]
    wanted = value[:, :, 2].norm(dim=-1)
    from circuits.experiments.variants import in_force, prepared

    for variant in null.variants[:3]:
        with in_force(prepared(bridge, variant)):
            moved = bridge.run(TOKENS, read=[site])[site] - value
        torch.testing.assert_close(moved.flatten(2).norm(dim=-1), wanted, rtol=1e-4, atol=1e-5)
    effect = run(bridge, [own, *null.variants], of_examples(examples)).effect(
        "kl", "x", null.names, null.is_
    )
    assert effect.least_p == pytest.approx(1 / 31)
    k = sum(abs(v) >= abs(effect.change) * (1 - 1e-9) for v in effect.null)
    assert effect.p_value == (1 + k) / 31


def test_the_same_question_has_the_same_null(branches: HookedModel) -> None:
    examples = pictures(branches)
    own = Variant("x", (zero("stem_relu:1"),))
    first, second, other = (null_of(branches, own, examples, 4, seed) for seed in (3, 3, 4))
    assert first.units == second.units
    assert [v.edits for v in first.variants] == [v.edits for v in second.variants]
    assert first.is_ == second.is_
    del other


# --- what units are replaced by --------------------------------------------------------------------


def test_counterparts_and_resampling_by_hand(bridge: HookedModel) -> None:
    items = [
        Item(tuple(a), answers=((5,),), corrupted=tuple(b))
        for a, b in zip(TOKENS[:3].tolist(), TOKENS[3:6].tolist(), strict=True)
    ]
    task = compile_task(bridge, items, metric="log_probability")
    site = bridge.site("blocks.0.mlp.hook_post")
    clean, other = (bridge.run(t, read=[site])[site] for t in (TOKENS[:3], TOKENS[3:6]))
    report = ablate(
        bridge, [f"{site.name}:{i}" for i in (3, 8)], task, how="counterpart", n_random=0
    )

    def patched(value: Tensor) -> Tensor:
        made = value.clone()
        made[..., [3, 8]] = other[..., [3, 8]]
        return made

    after = bridge.logits(TOKENS[:3], {site.name: patched}).double()[:, -1].log_softmax(-1)[:, 5]
    before = bridge.logits(TOKENS[:3]).double()[:, -1].log_softmax(-1)[:, 5]
    assert report.effects["log_probability"].change == pytest.approx(
        float((after - before).mean()), abs=1e-6
    )
    assert math.isnan(report.effects["log_probability"].p_value)
    stream = [f"blocks.0.hook_resid_pre:{i}" for i in range(16)]
    everything = ablate(bridge, stream, task, how="counterpart", n_random=0)
    corrupted = bridge.logits(TOKENS[3:6]).double()[:, -1].log_softmax(-1)[:, 5]
    assert everything.effects["log_probability"].changed == pytest.approx(
        float(corrupted.mean()), abs=1e-6
    )
    resampled = ablate(bridge, [f"{site.name}:3"], task, how="resample", n_random=0, seed=2)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(2))
    donor = torch.empty_like(order)
    donor[order] = order.roll(-1)
    assert not (donor == torch.arange(3)).any()

    def swapped(value: Tensor) -> Tensor:
        made = value.clone()
        made[..., 3] = clean[donor][..., 3]
        return made

    after = bridge.logits(TOKENS[:3], {site.name: swapped}).double()[:, -1].log_softmax(-1)[:, 5]
    assert resampled.effects["log_probability"].change == pytest.approx(
        float((after - before).mean()), abs=1e-6
    )


def test_labels_of_texts_are_by_example_and_position(bridge: HookedModel) -> None:
    labels = torch.full((7, 9), -1)
    labels[:, 2], labels[0, 5], labels[3, 8] = 4, 7, 9
    head = zero("blocks.0.attn.hook_z:1")
    found = ablate(bridge, ["blocks.0.attn.hook_z:1"], TOKENS, labels=labels, n_random=0)
    before = bridge.logits(TOKENS).double().log_softmax(-1)
    with edited(bridge, [head]):
        after = bridge.logits(TOKENS).double().log_softmax(-1)
    change = (before - after).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    each = [change[i][labels[i] >= 0].mean() for i in range(7)]
    assert found.effects["cross_entropy"].change == pytest.approx(
        float(torch.stack(each).mean()), abs=1e-6
    )
    with pytest.raises(ValueError, match="labels: 6 rows for 7 texts"):
        ablate(bridge, ["blocks.0.attn.hook_z:1"], TOKENS, labels=labels[:6])
    with pytest.raises(
        ValueError, match="label 20 of 'example 0': expected a token from 0 to 19, or -1"
    ):
        ablate(bridge, ["blocks.0.attn.hook_z:1"], TOKENS, labels=labels.clamp_min(20))
    with pytest.raises(ValueError, match="are empty: expected at least one"):
        ablate(bridge, ["blocks.0.attn.hook_z:1"], TOKENS, labels=labels * 0 - 1)


# --- means -----------------------------------------------------------------------------------------


def test_one_mean_over_tokens_of_texts_of_other_lengths(bridge: HookedModel) -> None:
    rows = [TOKENS[0, :3], TOKENS[1, :9], TOKENS[2, :5]]
    examples = Examples.given(bridge, [row[None] for row in rows])
    for name in ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z"):
        alone = [bridge.run(row[None], read=[name])[name][0].double() for row in rows]
        whole = torch.cat(alone).mean(0)
        torch.testing.assert_close(
            site_mean(bridge, name, examples).values, whole, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            activities(bridge, [name], examples)[name].mean, whole, rtol=1e-5, atol=1e-6
        )
        at = site_mean(bridge, name, examples, by="position")
        fourth = torch.stack([a[3] for a in alone if len(a) > 3]).mean(0)
        torch.testing.assert_close(at.values[3], fourth, rtol=1e-5, atol=1e-6)
        later = site_mean(bridge, name, examples, leave_out=[0])
        torch.testing.assert_close(
            later.values, torch.cat([a[1:] for a in alone]).mean(0), rtol=1e-5, atol=1e-6
        )
        by = site_mean(bridge, name, examples, by="template", templates=["a", "b", "a"])
        assert by.keys == ("a", "b")
        torch.testing.assert_close(
            by.values[0, 2], torch.stack([alone[0][2], alone[2][2]]).mean(0), rtol=1e-5, atol=1e-6
        )


def test_a_position_that_dominates_the_mean_is_named(bridge: HookedModel) -> None:
    examples = Examples.given(bridge, TOKENS)

    def sink(value: Tensor) -> Tensor:
        made = value.clone()
        made[:, 0] *= 100
        return made

    with bridge.intervening({"blocks.0.hook_resid_post": sink}):
        mean = site_mean(bridge, "blocks.0.hook_resid_post", examples)
    assert mean.sinks[0][0] == 0
    assert mean.sinks[0][1] > 20
    assert mean.warning.startswith("rows at position 0 (")
    assert not site_mean(bridge, "blocks.0.hook_resid_post", examples, leave_out=[0]).sinks


# --- what is refused -------------------------------------------------------------------------------


def test_bad_input_is_one_clear_line(bridge: HookedModel, branches: HookedModel) -> None:
    task = of_examples(Examples.given(bridge, TOKENS))
    with pytest.raises(ValueError, match="labels: task next token has its own answers"):
        ablate(bridge, ["blocks.0.mlp.hook_post:1"], task, labels=[1] * 7)
    with pytest.raises(ValueError, match="needs a task with counterparts"):
        ablate(bridge, ["blocks.0.mlp.hook_post:1"], task, how="counterpart", n_random=0)
    with pytest.raises(ValueError, match="n_random -1 must be 0 or more"):
        ablate(bridge, ["blocks.0.mlp.hook_post:1"], task, n_random=-1)
    with pytest.raises(
        ValueError,
        match="task next token was made for tiny-bridge: model Branches has another input",
    ):
        run(branches, [], task)
    with pytest.raises(ValueError, match="variant 'a' occurs twice"):
        run(bridge, [Variant("a"), Variant("a")], task)
    with pytest.raises(ValueError, match=r"unit blocks\.0\.mlp\.hook_post:1 is listed twice"):
        ablate(bridge, ["blocks.0.mlp.hook_post:1"] * 2, task)
    with pytest.raises(ValueError, match="label 7: expected a class from 0 to 2"):
        ablate(branches, ["out_relu:1"], branches.input.example(2), labels=[1, 7])
    with pytest.raises(
        ValueError,
        match="labels have 3 entries",
    ):
        ablate(branches, ["out_relu:1"], branches.input.example(2), labels=[1, 1, 1])
    with (
        branches.intervening({"fc": lambda v: v * float("nan")}),
        pytest.raises(ValueError, match="Branches is edited: run experiments outside the edit"),
    ):
        ablate(branches, ["out_relu:1"], branches.input.example(2), n_random=0)


def test_what_a_model_must_be_told_of_padded_texts_it_is_told_in_every_variant() -> None:
    """A model that looks both ways: a pass that began behind its embedding would see what texts are filled up with."""
    model = HookedModel(seeded(Attending()), TokenInput(20, 9), "both ways")
    rows = [
        TOKENS[0, :3].tolist(),
        TOKENS[1, :9].tolist(),
        TOKENS[2, :9].tolist(),
        TOKENS[3, :5].tolist(),
    ]
    variants = [Variant(str(i), (zero(f"embed:{i}"),)) for i in range(4)]
    together = run(model, variants, of_examples(Examples.texts(model, rows)))
    for i, row in enumerate(rows):
        alone = run(model, variants, of_examples(Examples.texts(model, [row])))
        for name in ("intact", "0", "3"):
            assert together.of("cross_entropy", name)[i] == pytest.approx(
                float(alone.of("cross_entropy", name)[0]), abs=1e-5
            )


def test_what_holds_the_same_for_all_examples_is_changed_in_whole_passes(
    bridge: HookedModel,
) -> None:
    """Behind the embedding of tokens that of positions is there once, not once an example."""
    task = of_examples(Examples.given(bridge, bridge.input.example(5)))
    spec = [("hook_embed", 1), ("hook_pos_embed", 2), ("hook_pos_embed", 3)]
    variants = [
        Variant(f"{i}", (zero(f"hook_embed:{j}"), zero(f"{site}:{j}")))
        for i, (site, j) in enumerate(spec)
    ]
    together = run(bridge, variants, task)
    for i, variant in enumerate(variants):
        alone = run(bridge, [variant], task)
        for name, values in together.values.items():
            assert values[1 + i] == pytest.approx(alone.values[name][1], abs=1e-6)
    x = task.examples.inputs
    changed = {
        name: lambda v: v * (torch.arange(v.shape[-1]) != 2)
        for name in ("hook_embed", "hook_pos_embed")
    }
    own, other = bridge.logits(x).log_softmax(-1), bridge.logits(x, changed).log_softmax(-1)
    expected = (own.exp() * (own - other)).sum(-1)[:, :-1].mean(1)  # at all but the last position
    assert together.values["kl"][2] == pytest.approx(expected.numpy(), abs=1e-5)


def test_logits_that_are_not_finite_are_refused_in_padded_batches_too(bridge: HookedModel) -> None:
    def task(*texts: str):
        return compile_task(bridge, [Item(text, ("7",)) for text in texts])

    table = next(p for p in bridge.parameters.values() if p.shape[0] == 20)
    with torch.no_grad():
        table[5] = float("nan")
    run(bridge, [Variant("as it is")], task("1 2 3 4", "8 9"))
    for texts in (("1 2 3 4", "5 9"), ("1 2 5 4", "8 9")):
        with pytest.raises(ValueError, match="puts out NaN or infinity on an example"):
            run(bridge, [Variant("as it is")], task(*texts))


class PerText(nn.Module):
    """A classifier of texts: the mean of its tokens' vectors, as four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        weights = mask[..., None] / mask.sum(1)[:, None, None]
        return self.head((self.embed(tokens) * weights).sum(1))


@pytest.mark.parametrize("length", [3, 4, 5])
def test_a_text_as_long_as_there_are_classes_is_padded_like_others(length: int) -> None:
    model = HookedModel(seeded(PerText()), TokenInput(20, 12))
    texts = [[1, 2], list(range(1, 1 + length))]
    questions = tuple(Question(positions=(0,), answers=((k,),)) for k in (1, 2))
    task = Task("t", Examples.texts(model, texts), questions, as_metric("cross_entropy"))
    effect = ablate(model, ["embed:0"], task, n_random=0).effects["cross_entropy"]
    expected = []
    for text, right in zip(texts, (1, 2), strict=True):
        x, answer = torch.tensor([text]), torch.tensor([right])
        before = F.cross_entropy(model.logits(x), answer)
        with edited(model, [zero("embed:0")]):
            expected.append(float(F.cross_entropy(model.logits(x), answer) - before))
    assert effect.change == pytest.approx(np.mean(expected), abs=1e-6)
