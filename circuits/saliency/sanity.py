"""Sanity checks: whether an attribution depends on the model at all.

Adebayo et al. 2018, "Sanity Checks for Saliency Maps": layers' weights are shuffled from the output down (cascading) or
one group at a time (independent), and maps are compared with those of the intact model; or the model is trained on
shuffled labels. A map that hardly changes does not show what the model has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from skimage.metrics import structural_similarity
from torch import Tensor

from circuits.attribution.channels import spearman
from circuits.attribution.results import Attribution
from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import main_output
from circuits.models.paths.randomizing import layers_in_order, randomized
from circuits.progress import Progress

Attributing = Callable[[HookedModel, Tensor], Attribution]
"""Makes the maps of images with a model: a method with its options and its target bound."""
Mode = Literal["cascading", "independent"]

_STAGES = 6

KEPT = 0.5
"""Maps pass if, with at most the upper half of the layers shuffled, they keep less than this share of their similarity
to the original maps beyond the similarity of maps of different images."""


@dataclass(frozen=True)
class Stage:
    """The similarity of maps with some layers shuffled to those of the intact model; means over images.

    Attributes:
        layers: the number of shuffled layers.
        lowest: the name of the lowest shuffled layer (for independent, of its group).
        spearman: rank correlation of absolute values.
        spearman_signed: rank correlation of signed values.
        ssim: structural similarity of absolute values.
    """

    layers: int
    lowest: str
    spearman: float
    spearman_signed: float
    ssim: float


@dataclass(frozen=True)
class RandomizationTest:
    """How much of a method's maps remains when the model's weights are shuffled.

    Attributes:
        method: the method's name.
        mode: how layers were shuffled.
        stages: the stages from the output down; cascading ends with all layers shuffled.
        chance: the same numbers for maps of different images in the intact model.
        kept: the share of similarity beyond chance that remains, over the stages with at most the upper half of the
            layers shuffled: by signed rank correlation or by SSIM, whichever is larger. (The rank correlation of
            absolute values is left out: most maps are small wherever an image has no contrast.)
        passes: whether that is below `KEPT`; None for independent tests, which have no such stages.
        model_hash: the hash of the intact weights.
        examples: which images, and how they were chosen.
        seed: seed of the shuffling.
    """

    method: str
    mode: Mode
    stages: tuple[Stage, ...]
    chance: Stage
    kept: float
    passes: bool | None
    model_hash: str
    examples: Mapping[str, Any]
    seed: int


@recording_gradients()
def randomization_test(
    model: HookedModel,
    examples: Examples | Tensor,
    attributing: Attributing,
    mode: Mode = "cascading",
    *,
    stages: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RandomizationTest:
    """Compare maps of the intact model with those of models whose layers are shuffled.

    Args:
        model: the model.
        examples: images, at least two.
        attributing: makes maps of images with a model.
        mode: whether layers are shuffled from the output down, or one group at a time.
        stages: the number of stages; even, so that one stage has exactly the upper half shuffled (of an odd number of
            layers the one in the middle is not). By default 6, or as many as there are layers for.
        seed: seed of the shuffling.
        progress: called with the number of stages done and the total.

    Raises:
        ValueError: if there are fewer than two images, or an option does not fit.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
    given = as_examples(model, examples)
    inputs = given.inputs
    if len(inputs) < 2:
        raise ValueError(
            f"examples: {len(inputs)} images, expected at least two to compare with each other"
        )
    layers = layers_in_order(model)[::-1]
    stages = stages_for(model, stages)
    # 10 layers in 4 stages end behind 2, 5, 8 and 10 layers, counted from the output.
    ends = [round(len(layers) * (k + 1) / stages) for k in range(stages)]
    ends[stages // 2 - 1] = len(layers) // 2
    intact = attributing(model, inputs)
    own = _heat_maps(intact)
    # Each image's map beside the next image's: what two maps have in common because a method or the middle of
    # photographs makes them so.
    chance = _likeness(own, [m.roll(1, 0) for m in own], 0, "")
    found = []
    for k, end in enumerate(ends):
        start = ends[k - 1] if k and mode == "independent" else 0
        shuffled = randomized(model, seed, layers[start:end])
        theirs = _heat_maps(attributing(shuffled, inputs))
        found.append(_likeness(own, theirs, end - start, layers[end - 1]))
        if progress is not None:
            progress(k + 1, stages)
    kept = _kept_beyond_chance(found[: stages // 2], chance)
    return RandomizationTest(
        intact.method, mode, tuple(found), chance, kept, kept < KEPT if mode == "cascading" else None,
        model.hash, given.describe(), seed,
    )  # fmt: skip


def stages_for(model: HookedModel, stages: int | None = None) -> int:
    """The number of stages of a test: as given or, by default, 6 or the largest even number that there are layers for.

    Raises:
        ValueError: if the model has fewer than two layers, or the number is not even or larger than that of the layers.
    """
    n = len(layers_in_order(model))
    if n < 2:
        raise ValueError(
            f"model {model.name} has {n} layers with weights: expected at least two, to shuffle some and not others"
        )
    most = n // 2 * 2
    if stages is None:
        return min(_STAGES, most)
    if stages < 2 or stages % 2 or stages > most:
        raise ValueError(
            f"stages {stages} must be even, from 2 to {most}: {model.name} has {n} layers with weights"
        )
    return stages


def _kept_beyond_chance(stages: Sequence[Stage], chance: Stage) -> float:
    # (similarity - chance) / (1 - chance): 1 for unchanged maps, 0 for maps as similar as those of different images.
    def beyond(name: str) -> float:
        by_chance = getattr(chance, name)
        return float(
            np.mean([(getattr(s, name) - by_chance) / max(1e-6, 1 - by_chance) for s in stages])
        )

    # The larger of both, as maps may stay alike in one way only.
    return max(beyond("spearman_signed"), beyond("ssim"))


def _heat_maps(made: Attribution) -> list[Float[Tensor, "image y x"]]:
    """Absolute and signed maps."""
    return [made.heat("absolute").cpu(), made.heat("signed").cpu()]


def _likeness(own: Sequence[Tensor], other: Sequence[Tensor], layers: int, lowest: str) -> Stage:
    n = len(own[0])
    pairs = [
        [(a[i].numpy(), b[i].numpy()) for i in range(n)] for a, b in zip(own, other, strict=True)
    ]
    ranks = [float(np.mean([spearman(a.ravel(), b.ravel()) for a, b in some])) for some in pairs]
    return Stage(
        layers, lowest, ranks[0], ranks[1], float(np.mean([ssim(a, b) for a, b in pairs[0]]))
    )


def ssim(a: Float[np.ndarray, "y x"], b: Float[np.ndarray, "y x"]) -> float:
    """Structural similarity of two maps, each scaled to 0..1 (with its 99th percentile at 1); 0 if one is constant."""
    stretched = []
    for m in (a, b):
        low, high = np.quantile(m, [0.0, 0.99])
        high = (
            high if high > low else m.max()
        )  # fewer than 1 % of the pixels stand out: scale by the maximum
        if not high > low:
            return 0.0
        stretched.append(((m - low) / (high - low)).clip(0, 1).astype(np.float64))
    # n - (n + 1) % 2 is the largest odd number up to n, since the window needs a middle.
    side = min(7, *(n - (n + 1) % 2 for n in a.shape))
    found: Any = structural_similarity(*stretched, data_range=1.0, win_size=side)
    return float(found)


@dataclass(frozen=True)
class LabelTest:
    """The similarity of maps of a network trained on true labels to those of one trained on shuffled labels.

    Attributes:
        likeness: the similarity of the two networks' maps.
        chance: the similarity of maps of different images.
        kept: the share of similarity beyond chance.
        accuracy: the accuracy on the images after training on true labels.
        accuracy_shuffled: the accuracy on shuffled labels; the test is only meaningful if both are high.
        examples: which examples, and how they were chosen.
        seed: seed of everything random.
    """

    likeness: Stage
    chance: Stage
    kept: float
    accuracy: float
    accuracy_shuffled: float
    examples: Mapping[str, Any]
    seed: int


@recording_gradients()
def label_test(
    model: HookedModel,
    examples: Examples | Tensor,
    labels: Sequence[int],
    attributing: Attributing,
    *,
    steps: int = 200,
    rate: float = 0.002,
    seed: int = 0,
    progress: Progress | None = None,
) -> LabelTest:
    """Compare maps of a network trained on true labels with those of one trained on shuffled labels.

    Both start from the model's weights shuffled, and see all images in every step (Adam).

    Args:
        model: whose architecture is trained; it is not changed.
        examples: images, at least two.
        labels: the class of each.
        attributing: makes maps of images with a model; its target should be the given labels.
        steps: of training.
        rate: of Adam.
        seed: of the shuffling of weights and labels.
        progress: called with steps done and all.

    Raises:
        ValueError: if labels do not fit.
    """
    given = as_examples(model, examples)
    inputs = given.inputs
    if len(labels) != len(inputs) or len(inputs) < 2:
        raise ValueError(
            f"labels: {len(labels)} for {len(inputs)} images, expected one each and at least two"
        )
    true = torch.tensor(labels, device=model.device)
    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))
    found = []
    for number, wanted in enumerate((true, true[order])):
        # The same shuffled weights to start from, so that only the labels differ.
        twin = randomized(model, seed)
        accuracy = _trained(twin, inputs, wanted, steps, rate, progress, number)
        found.append((_heat_maps(attributing(twin, inputs)), accuracy))
    (own, first), (theirs, second) = found
    chance = _likeness(own, [m.roll(1, 0) for m in own], 0, "")
    stage = _likeness(own, theirs, 0, "shuffled labels")
    return LabelTest(
        stage, chance, _kept_beyond_chance([stage], chance), first, second, given.describe(), seed
    )


def _trained(
    model: HookedModel,
    inputs: Tensor,
    labels: Tensor,
    steps: int,
    rate: float,
    progress: Progress | None,
    turn: int,
) -> float:
    """Train a model in place, in evaluation mode; returns the accuracy at the end."""
    # Evaluation mode: dropout would make the two runs differ by chance, and batch norm's averages would change with
    # what is shown.
    module = model.module.eval()
    x = model.fitted(inputs)
    parameters = [p.requires_grad_(True) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, rate)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(main_output(module(x.clone())).flatten(1), labels).backward()
        optimizer.step()
        if progress is not None:
            progress(turn * steps + step + 1, 2 * steps)
    return float((model.logits(x).flatten(1).argmax(1) == labels).double().mean())
