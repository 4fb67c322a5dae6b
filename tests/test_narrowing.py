"""Leaving out positions that nobody reads changes no number, and is not done where somebody reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.edits.activations import zero
from circuits.edits.recipes import edited
from circuits.experiments import Variant, run
from circuits.experiments.narrowing import Narrowing
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks import METRICS, Item, Task, UnitActivation, as_metric, compile_task
from circuits.tasks.reading import Places

NAMES = ("blocks.0.attn.hook_z", "blocks.1.mlp.hook_post")


def task_of(model: HookedModel, lengths: tuple[int, ...]) -> Task:
    """Texts of some lengths of which the last and, of every other one, the first position counts."""
    generator = torch.Generator().manual_seed(2)
    items = []
    for i, n in enumerate(lengths):
        at = (n - 1,) if i % 2 else (0, n - 1)
        row = torch.randint(1, model.input.n_vocab, (n,), generator=generator)  # type: ignore[union-attr]
        items.append(Item(tuple(row.tolist()), ((3,),), ((4,),), positions=at))
    return compile_task(model, items)


def lengths_seen(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of positions that the output has in each pass."""
    seen: list[int] = []
    own = HookedModel.run

    def noting(self: HookedModel, *args: object, **kwargs: object):
        cache = own(self, *args, **kwargs)  # type: ignore[arg-type]
        if "hook_unembed" in cache:
            seen.append(cache["hook_unembed"].shape[1])
        return cache

    monkeypatch.setattr(HookedModel, "run", noting)
    return seen


@pytest.mark.parametrize("lengths", [(9,) * 6, (4, 9, 7, 9, 5)])
def test_variants_of_one_pass_are_what_they_are_alone(
    bridge: HookedModel, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(bridge, lengths)
    variants = [Variant(f"{n}:{i}", (zero(f"{n}:{i % 4}"),)) for n in NAMES for i in range(8)]
    measures = [METRICS["logit_difference"], METRICS["kl"]]
    seen = lengths_seen(bridge, monkeypatch)
    together = run(bridge, variants, task, measures=measures, batch=4)
    assert 2 in seen, "two positions at most count of a text"
    del seen[:]
    for variant in variants[::5]:
        alone = run(bridge, [variant], task, measures=measures)
        for measure in ("logit_difference", "kl"):
            np.testing.assert_allclose(
                together.of(measure, variant.name), alone.of(measure, variant.name), atol=1e-6
            )
    assert set(seen) == {9}, "a single variant runs whole"


def test_whoever_reads_all_of_the_output_gets_it(
    bridge: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(bridge, (9,) * 4)
    variants = [Variant(str(i), (zero(f"{NAMES[0]}:{i % 4}"),)) for i in range(9)]
    seen = lengths_seen(bridge, monkeypatch)

    def at_the_start(output: Tensor) -> Tensor:
        return output[:, 1, 5]

    metric = UnitActivation.named(bridge, "token:5@1")
    by_unit = run(bridge, variants, task, measures=[metric])
    custom = run(bridge, variants, task, measures=[as_metric(at_the_start)])
    run(bridge, variants, task, measures=[METRICS["kl"]], watch=["hook_unembed"])
    assert set(seen) == {9}
    with edited(bridge, [zero(f"{NAMES[0]}:2")]):
        wanted = at_the_start(bridge.logits(task.examples.inputs))
    for outcomes, name in ((by_unit, "token:5@1"), (custom, "at_the_start")):
        np.testing.assert_allclose(outcomes.of(name, "2"), wanted, atol=1e-6)


def test_a_model_that_looks_on_behind_is_not_cut() -> None:
    """Of addition by hand all positions before the last are read by attention, and by nothing behind it."""
    model = load_model("addition-by-hand")
    items = [Item((a, b, 113), (((a + b) % 113,),)) for a, b in ((3, 4), (90, 40), (7, 8))]
    task = compile_task(model, items)
    variants = [Variant(str(i), (zero(f"blocks.0.hook_resid_pre:{i}"),)) for i in range(10)]
    together = run(model, variants, task, measures=[METRICS["cross_entropy"]])
    for variant in variants:
        alone = run(model, [variant], task, measures=[METRICS["cross_entropy"]])
        np.testing.assert_allclose(
            together.of("cross_entropy", variant.name),
            alone.of("cross_entropy", variant.name),
            rtol=1e-5,
            atol=1e-5,
        )


def test_kept_positions_by_hand() -> None:
    none = torch.zeros(4, 0, dtype=torch.int64)
    places = Places(
        torch.tensor([1, 0, 1, 2]), torch.tensor([5, 2, 0, 7]), torch.tensor([1, 0, 1, 2]), none, none,
        torch.zeros(0, dtype=torch.int64), 3,
    )  # fmt: skip
    site = load_model("induction").site("blocks.1.hook_resid_post")
    made = Narrowing.at(site, places, 3)
    assert made.slots.tolist() == [0, 0, 1, 0]
    assert made.kept.tolist()[0][0] == 2
    assert made.kept.tolist()[1] == [5, 0]
    assert made.kept.tolist()[2][0] == 7
    value = torch.arange(6 * 8 * 64.0).reshape(6, 8, 64)
    kept = made.after(None)(value)
    torch.testing.assert_close(kept[4], value[4, [5, 0]])
    doubled = made.after(lambda v: v * 2)(value)
    torch.testing.assert_close(doubled[0, 0], 2 * value[0, 2])
