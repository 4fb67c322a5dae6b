"""A card for each attribution method: how well it does on a given model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.attribution.passes import Passes
from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.files import write_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.saliency.faithfulness import (
    Curve,
    RoadResult,
    Sensitivity,
    infidelity,
    insertion_deletion,
    road,
    sensitivity_n,
)
from circuits.saliency.maps import METHODS, SLOPES, Method, saliency_map
from circuits.saliency.sanity import RandomizationTest, randomization_test, stages_for
from circuits.tables import Table
from circuits.tasks.targets import Target, as_target, output_site


@dataclass(frozen=True)
class MethodCard:
    """The results of all tests of an attribution method on a model.

    Attributes:
        method: the method's name.
        settings: its options.
        randomization: whether its maps depend on the weights.
        curves: insertion and deletion, with three blanks.
        road: removal with imputed pixels.
        sensitivity: whether attributions add up to the target's loss.
        infidelity: how badly attributions predict the change under noise (0 is best), and the same for shuffled ones.
            It suits methods that give slopes; for those that give gradient x input it means less.
        verdicts: by test, `passes` if better than random, `fails` if worse, `unclear` if the interval over images
            contains 0; for insertion and deletion the verdict of most blanks.
        target: what was explained.
        model: the model's name.
        model_hash: the hash of the model.
        examples: which images, and how they were chosen.
        seed: seed of everything random.
    """

    method: str
    settings: Mapping[str, Any]
    randomization: RandomizationTest
    curves: tuple[Curve, ...]
    road: RoadResult
    sensitivity: Sensitivity
    infidelity: tuple[float, float]
    verdicts: Mapping[str, str]
    target: str
    model: str
    model_hash: str
    examples: Mapping[str, Any]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(Path(path), self.to_dict())


def cards_table(cards: Sequence[MethodCard], title: str) -> Table:
    """Cards as rows; in brackets what random or shuffled attributions reach."""
    rows = []
    for c in cards:
        areas = [
            f"{_mean(c, kind, 'area'):.3g} ({_mean(c, kind, 'area_random'):.3g})"
            for kind in ("insertion", "deletion")
        ]
        rows.append((
            c.method, c.verdicts["randomisation"], c.randomization.kept, *areas, c.road.score,
            f"{c.sensitivity.correlations[1]:.2f} ({c.sensitivity.random[1]:.2f})",
            f"{c.infidelity[0]:.2f} ({c.infidelity[1]:.2f})",
        ))  # fmt: skip
    columns = (
        "method", "randomisation", "keeps", "insertion (random)", "deletion (random)", "ROAD",
        "sensitivity-n (random)", "infidelity (random)",
    )  # fmt: skip
    return Table(columns, rows, title)


def _mean(card: MethodCard, kind: str, what: str) -> float:
    values = [getattr(curve, what) for curve in card.curves if curve.kind == kind]
    return sum(values) / len(values)


@recording_gradients()
def card(
    model: HookedModel,
    examples: Examples | Tensor,
    method: Method,
    target: str | Target = "top",
    *,
    stages: int | None = None,
    steps: int = 10,
    faithful: int = 8,
    seed: int = 0,
    batch: int = 32,
    progress: Progress | None = None,
    **options: Any,
) -> MethodCard:
    """Test a method of input attribution on a model.

    Args:
        model: an image model.
        examples: at least two images; published verdicts need thirty or more.
        method: one of `METHODS`.
        target: what is explained; the intact model's prediction stays the target when weights are shuffled.
        stages: stages of the randomisation test (see `randomization_test`).
        steps: steps of insertion and deletion.
        faithful: number of images on which faithfulness is measured.
        seed: seed of everything random.
        batch: images in one pass.
        progress: called with the number of parts done and the total.
        options: options of the method.

    Raises:
        KeyError: if a class is unknown.
        TypeError: if the method has no such option.
        ValueError: if examples or an option do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    given = as_examples(model, examples)
    inputs = given.inputs
    fixed = _fixed_target(model, inputs, target, batch)
    stages = stages_for(model, stages)
    total = stages + 4

    def note(done: int) -> None:
        if progress is not None:
            progress(done, total)

    def attributing(some: HookedModel, x: Tensor) -> Any:
        own = fixed if len(x) == len(inputs) else fixed.of_examples(range(len(x)))
        return saliency_map(some, x, own, method, seed=seed, batch=batch, **options)

    randomization = randomization_test(
        model, given, attributing, stages=stages, seed=seed,
        progress=lambda done, _: note(done),
    )  # fmt: skip
    # The tests below run the model hundreds of times an image, the randomisation test once a stage.
    few = inputs[: max(1, min(faithful, len(inputs)))]
    made = attributing(model, few)
    heats = made.heat("absolute" if method in SLOPES else "signed")
    # Probabilities are bounded: a logit may grow without end on images unlike any photograph, and one image would
    # decide the mean of the curves.
    probable = fixed.of_examples(range(len(few)))
    if fixed.site == output_site(model).name:
        probable = replace(probable, quantity="probability")
    passes = Passes(model, few, probable, batch=batch)
    curves = insertion_deletion(passes, heats, steps=steps, seed=seed)
    note(stages + 1)
    imputing = road(passes, heats, seed=seed)
    note(stages + 2)
    # The quantity that the attributions are of: their sums are to predict its changes, and a probability is no sum of
    # parts.
    plain = Passes(model, few, fixed.of_examples(range(len(few))), batch=batch)
    sums = sensitivity_n(plain, heats, seed=seed)
    note(stages + 3)
    noisy = infidelity(plain, made.values, seed=seed)
    note(total)
    return MethodCard(
        method, made.settings, randomization, tuple(curves), imputing, sums, noisy,
        _verdicts(randomization, curves, imputing), str(as_target(model, target)), model.name, model.hash,
        given.describe(), seed,
    )  # fmt: skip


def _verdicts(
    randomization: RandomizationTest, curves: list[Curve], imputing: RoadResult
) -> dict[str, str]:
    return {
        "randomisation": "passes" if randomization.passes else "fails",
        "insertion": _majority([_verdict(c.low, c.high) for c in curves if c.kind == "insertion"]),
        "deletion": _majority([_verdict(c.low, c.high) for c in curves if c.kind == "deletion"]),
        "road": _verdict(imputing.low, imputing.high),
    }


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return "passes"
    return "fails" if high < 0 else "unclear"


# An insertion curve for each of the blanks: a method that passes with one kind of blank only does not pass.
def _majority(verdicts: list[str]) -> str:
    """The verdict of more than half; else `unclear`."""
    first = max(set(verdicts), key=verdicts.count)
    return first if verdicts.count(first) > len(verdicts) / 2 else "unclear"


def _fixed_target(model: HookedModel, inputs: Tensor, target: str | Target, batch: int) -> Target:
    """The target with each image's unit and position fixed as in the intact model."""
    # A model with shuffled weights predicts something else; a map for that would differ for a trivial reason.
    aim = Passes(model, inputs, target, batch=batch).aim
    each = [aim.of(i) for i in range(len(inputs))]
    indices = tuple(int(i) for i in aim.indices)
    places = tuple(of.at for of in each if of.at is not None and not isinstance(of.at[0], tuple))
    at = places if aim.shape and len(places) == len(each) else aim.target.at
    return replace(aim.target, index=indices, at=at)  # type: ignore[arg-type]
