"""Every verb on models of many families, each result compared with plain torch: writes docs/models.md.

Three groups of tiny random models: language models (configurations of Hugging Face families, loaded as `tl:FOLDER`),
image classifiers (loaded as `hf:FOLDER`), and unusual modules of a person's own (`HookedModel(module, shape)`). Each
model stands twice: as a person would load it, and as its own module, which `circuits` has never seen and which is read
and changed by torch's own hooks. A cell of the table says whether a verb gives what the module itself gives, refuses in
one line (a number that leads to the reason), does not apply, or is wrong or ends in a traceback (the script then ends
with exit code 1).

    python -m benchmarks.families                    # all, into docs/models.md
    python -m benchmarks.families --only vit,gpt2 --verbs relevance --print
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import circuits
from circuits.models.adapter.calling import ForwardError
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths import routes
from circuits.sae import Hyperparameters, ModelRows, Schedule, train
from circuits.stimuli import from_dataset
from circuits.units import Site
from tests import test_transformer_families, transformer_families, unusual_modules, vision_families
from tests.vision_families import redraw

N = 4  # examples
COMPARED = [0]
"""How many comparisons the verb that runs has made: a tick without one would say nothing."""
DOCS = Path(__file__).parents[1] / "docs" / "models.md"


class InapplicableError(Exception):
    """What a verb is about is not in the model."""


class PartlyError(Exception):
    """A result that says itself that it is not all."""


class WrongError(Exception):
    """A result that differs from what the module itself gives."""


@dataclass(frozen=True)
class Place:
    """A tensor that both sides know: a site, and the module of the person's model at which torch's hooks find it.

    Attributes:
        site: the site's name.
        module: the module's name.
        before: whether the tensor is the module's input rather than its output.
    """

    site: str
    module: str
    before: bool = False


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as it is loaded, and its module as torch runs it.

    Attributes:
        name: the family.
        group: which part of the table it stands in.
        special: what is special about it.
        model: as a person loads it.
        inner: the module.
        inputs: examples.
        places: where both are compared.
        folder: a folder of the model's own.
        fresh: makes the module again, from the same weights.
        again: loads the model again.
    """

    name: str
    group: str
    special: str
    model: HookedModel
    inner: Any
    inputs: Tensor
    places: tuple[Place, ...]
    folder: Path
    fresh: Callable[[], Any]
    again: Callable[[], HookedModel]

    @property
    def known(self) -> tuple[Place, ...]:
        """The places; the verb does not apply if there are none."""
        needs(bool(self.places))
        return self.places

    @property
    def early(self) -> Place:
        """The first place."""
        return self.known[0]

    @property
    def late(self) -> Place:
        """The last place."""
        return self.known[-1]

    @property
    def tokens(self) -> bool:
        """Whether the model reads tokens."""
        return isinstance(self.model.input, TokenInput)

    def site(self, place: Place) -> Site:
        """The site at a place."""
        return self.model.site(place.site)

    def logits(self, output: Any) -> Tensor:
        """The logits in what the module returned."""
        while not isinstance(output, Tensor):
            if isinstance(output, Mapping):
                output = output["logits"]
            else:
                output = output.logits if hasattr(output, "logits") else output[0]
        return output

    def run(
        self,
        place: Place | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        inputs: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """The tensor at a place and the logits, as torch's hooks see them; the tensor may be changed on its way."""
        seen: list[Tensor] = []

        def note(value: Tensor) -> Tensor:
            value = value if change is None else change(value)
            seen.append(value.clone())  # a later step may write into it
            return value

        with torch.set_grad_enabled(torch.is_grad_enabled()), hooked(self.inner, place, note):
            logits = self.logits(self.inner(self.inputs if inputs is None else inputs))
        return (seen[0] if seen else None), logits

    def last(self, logits: Tensor) -> Tensor:
        """The logits where the model is asked: of a text those behind its last token."""
        return logits[:, -1] if self.tokens else logits


@contextmanager
def hooked(inner: Any, place: Place | None, note: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Torch's own hook at a place."""
    if place is None:
        yield
        return
    module: nn.Module = inner.get_submodule(place.module)

    def ahead(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (note(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": note(kwargs["hidden_states"])}

    def behind(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return (note(output[0]), *output[1:])
        return note(output) if isinstance(output, Tensor) else None

    handle = (
        module.register_forward_pre_hook(ahead, with_kwargs=True)
        if place.before
        else module.register_forward_hook(behind)
    )
    try:
        yield
    finally:
        handle.remove()


def needs(fits: bool) -> None:
    """Say that a verb does not apply unless the model has what it is about.

    Raises:
        InapplicableError: if it has not.
    """
    if not fits:
        raise InapplicableError


def same(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Check that two results are equal, relative to the largest number of either.

    Raises:
        WrongError: if they are not.
    """
    COMPARED[0] += 1
    if ours.shape != theirs.shape:
        raise WrongError(f"{what}: shape {tuple(ours.shape)} for {tuple(theirs.shape)}")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not gap <= tolerance:
        raise WrongError(f"{what}: differs by {gap:.2g} of the largest number")


# --- verbs: each compares what circuits gives with what the module gives -----------------------------


def read(s: Subject) -> None:
    """The tensors at sites, and the logits."""
    same(s.model.logits(s.inputs), s.run()[1], "logits")
    for place in s.places:
        wanted = s.run(place)[0]
        assert wanted is not None
        same(s.model.run(s.inputs, read=[place.site])[place.site], wanted, place.site)


def equal(ours: object, theirs: object, what: str) -> None:
    """Check that two results are the same.

    Raises:
        WrongError: if they are not.
    """
    COMPARED[0] += 1
    if ours != theirs:
        raise WrongError(f"{what}: {ours} for {theirs}")


AXES = {
    nn.Linear: -1, nn.Embedding: -1, nn.LayerNorm: -1, nn.Conv1d: 1, nn.Conv2d: 1, nn.ConvTranspose2d: 1,
    nn.BatchNorm1d: 1, nn.BatchNorm2d: 1, nn.GroupNorm: 1,
}  # fmt: skip
"""Where modules of torch put the features that they compute, by their documentation."""


def axes(s: Subject) -> None:
    """Which axis holds the units: where the module that computed a tensor puts its features."""
    modules = dict(s.inner.named_modules())
    found = {site: AXES.get(type(modules.get(site.name))) for site in s.model.sites}  # type: ignore[arg-type]
    for site, axis in found.items():
        if axis is not None:
            equal(site.unit_axis, axis % len(site.axes), f"axis of the units of {site.name}")
    needs(any(axis is not None for axis in found.values()))


def put_back(s: Subject) -> None:
    """Reading every site, and putting back what was read, changes nothing."""
    before = s.model.logits(s.inputs)
    for site in s.model.sites:
        held = s.model.run(s.inputs, read=[site])[site.name].clone()
        with s.model.intervening({site.name: lambda t, h=held: h.clone()}):
            same(s.model.logits(s.inputs), before, f"{site.name} put back", 1e-5)


def without(s: Subject, place: Place, unit: int) -> Tensor:
    """The module's logits when a unit is set to 0."""
    axis = s.site(place).unit_axis

    def zeroed(value: Tensor) -> Tensor:
        value = value.clone()
        value.select(axis, unit).zero_()
        return value

    return s.run(place, zeroed)[1]


def edit(s: Subject) -> None:
    """Setting a unit to 0."""
    for place in s.known:
        with circuits.edited(s.model, [circuits.edits.zero(f"{place.site}:1")]):
            same(s.model.logits(s.inputs), without(s, place, 1), place.site)


def ablate(s: Subject) -> None:
    """The KL divergence when a unit is ablated, mean over examples and counted positions."""
    found = circuits.ablate(s.model, [f"{s.late.site}:1"], s.inputs, n_random=3)
    same_divergence(s, s.late, found.effects["kl"].change)


def measure(s: Subject) -> None:
    """The effect of an edit that removes a unit: as above."""
    edits = [circuits.edits.zero(f"{s.early.site}:1")]
    found = circuits.measure(s.model, edits, s.inputs, n_random=3)
    same_divergence(s, s.early, found.effects["kl"].change)


def same_divergence(s: Subject, place: Place, ours: float) -> None:
    """Check the KL divergence from the module's predictions to those that it makes without a unit."""
    before, after = (t.log_softmax(-1) for t in (s.run()[1], without(s, place, 1)))
    kl = (before.exp() * (before - after)).sum(-1)
    wanted = kl[:, :-1].mean() if s.tokens else kl.mean()
    if float(wanted) > 1e-4:  # else it is rounding
        same(torch.tensor(ours), wanted, f"KL without {place.site}:1", 1e-3)


def gradient(s: Subject, place: Place | None) -> tuple[Tensor, Tensor]:
    """The tensor at a place (or the input) and the gradient of each example's first choice with respect to it."""
    with torch.enable_grad():
        if place is None:
            value = s.inputs.clone().requires_grad_()
            logits = s.run(inputs=value)[1]
        else:
            held: list[Tensor] = []

            def leaf(tensor: Tensor) -> Tensor:
                held.append(tensor.detach().clone().requires_grad_())
                return held[0] * 1

            logits = s.run(place, leaf)[1]
            value = held[0]
        chosen = s.last(logits).amax(-1).sum()
        (found,) = torch.autograd.grad(chosen, value, allow_unused=True)
    return value.detach(), torch.zeros_like(value) if found is None else found


def attribute(s: Subject) -> None:
    """Activation x gradient of each example's first choice."""
    for place in s.known:
        found = circuits.attribute(s.model, s.inputs, "top", place.site, check=0)
        value, slope = gradient(s, place)
        same(found.values, value * slope, place.site, 1e-3)


def integrate(s: Subject) -> None:
    """Integrated gradients from zero to a site's tensor: the mean of gradients along the way, times the tensor."""
    place = s.early
    found = circuits.attribute(
        s.model,
        s.inputs,
        "top",
        place.site,
        "integrated_gradients",
        steps=40,
        tolerance=None,
        check=0,
    )
    value, _ = s.run(place)
    assert value is not None
    chosen = s.last(s.run()[1]).argmax(-1, keepdim=True)
    total = torch.zeros_like(value)
    # The same points as ours: a norm by length has no gradient at zero, so that sums at other points differ.
    points, weights = np.polynomial.legendre.leggauss(40)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        held: list[Tensor] = []

        def leaf(tensor: Tensor, held: list[Tensor] = held, point: float = float(point)) -> Tensor:
            held.append((tensor.detach() * point).requires_grad_())
            return held[0] * 1

        with torch.enable_grad():
            answers = s.last(s.run(place, leaf)[1]).gather(-1, chosen).sum()
            (slope,) = torch.autograd.grad(answers, held[0], allow_unused=True)
        total += 0 if slope is None else slope * float(weight)
    same(found.values, total * value, place.site, 2e-3)


def relevance(s: Subject) -> None:
    """Relevance by the rule `gradient`, element by element: activation x gradient."""
    place = s.early
    found = circuits.attribution.relevance(s.model, s.inputs, "top", place.site, rule="gradient")
    value, slope = gradient(s, place)
    same(found.values, value * slope, place.site, 1e-3)


def adds_up(s: Subject) -> None:
    """Relevance by the rules `epsilon` and `z_plus`: with its parts it is 95 % of the target's value, or more."""
    for rule in ("epsilon", "z_plus"):
        found = circuits.attribution.relevance(s.model, s.inputs, "top", s.early.site, rule=rule)
        same(found.target_values, s.last(s.run()[1]).amax(-1), "target")
        total = found.values.flatten(1).sum(1) + sum(found.parts.values())
        if float((total - found.target_values).abs().max()) > 0.05 * float(
            found.target_values.abs().max()
        ):
            raise PartlyError(
                "relevance has no rule for some operation of this model: more than 5 % of the target is in "
                "no part, and stands in `residual`"
            )


def expand(s: Subject) -> None:
    """Expanded weights at an example are the gradient of one site's unit with respect to another site."""
    needs(len(s.places) > 1)
    source, target = s.early, s.late
    site = s.site(target)
    found = circuits.expand_weights(
        s.model, source.site, target.site, mode="example", units=[1], examples=s.inputs[:1]
    )
    # XGLM's own code cannot run in float64, nor can torch's products of groups of rows (mixtures of experts).
    single = "XGLM" in type(s.inner).__name__ or hasattr(
        s.inner.config if s.tokens and s.group == "language" else None, "num_experts"
    )
    twin: Any = s.fresh() if single else s.fresh().double()
    seen: dict[str, Tensor] = {}

    def leaf(value: Tensor) -> Tensor:
        seen["source"] = value.detach().clone().requires_grad_()
        return seen["source"] * 1

    def note(value: Tensor) -> Tensor:
        seen["target"] = value.clone()
        return value

    # Twice the same example: of one alone, torch's own derivative of batch normalisation can be wrong (SoundBatchNorm).
    inputs = s.inputs[:1].repeat(2, *[1] * (s.inputs.ndim - 1))
    inputs = inputs if s.tokens or single else inputs.double()
    with torch.enable_grad(), hooked(twin, source, leaf), hooked(twin, target, note):
        twin(inputs)
        unit = site.by_unit(seen["target"])[0, 1]
        number = unit[found.at] if unit.ndim else unit
        (slope,) = torch.autograd.grad(number, seen["source"], allow_unused=True)
    slope = torch.zeros_like(seen["source"]) if slope is None else slope
    wanted = s.site(source).by_unit(slope)[0]
    if wanted.ndim == 1:
        ours = found.weight.reshape(-1)
    else:
        box = tuple(
            slice(a, a + n)
            for a, n in zip(found.start, found.weight.shape[-len(found.start) :], strict=True)
        )
        inside = wanted[(slice(None), *box)]
        outside = wanted.abs().sum() - inside.abs().sum()
        if float(outside) > 1e-4 * float(wanted.abs().sum()):
            raise WrongError(
                f"{float(outside / wanted.abs().sum()):.2g} of the weights lie outside"
            )
        ours, wanted = found.weight.reshape(inside.shape), inside
    same(ours, wanted, f"{source.site} -> {target.site}", 1e-3)


def incoming(s: Subject) -> None:
    """The direct weights into a unit, where a layer reads a site as it is: what the layer makes of that input alone."""
    wide = {site.name for site in s.model.sites if site.n_units > 1}
    refused = None
    for name, layer in s.inner.named_modules():
        if name not in wide or not isinstance(
            layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d
        ):
            continue
        read = s.run(Place(name, name, before=True))[0]
        try:
            connections = circuits.weights.incoming(s.model, f"{name}:1", top=3)
        except ValueError as error:
            refused = refused or error
            continue
        for c in connections:
            source = c.source.site
            value = (
                s.run(Place(source, source))[0] if source in dict(s.inner.named_modules()) else None
            )
            if c.layer != name or read is None or value is None or not torch.equal(read, value):
                continue
            # How an output in the middle of a map that is larger than any kernel depends on its inputs.
            maps = not isinstance(layer, nn.Linear)
            blank = (
                torch.zeros(1, read.shape[1], *[65] * (read.ndim - 2))
                if maps
                else torch.zeros_like(read[:1])
            )
            if isinstance(layer, nn.ConvTranspose2d):
                blank.select(1, c.source.index)[..., 32, 32] = 1
                norm = float((layer(blank) - layer(torch.zeros_like(blank)))[:, 1].norm())
            else:
                with torch.enable_grad():
                    made = layer(blank.requires_grad_()).select(1 if maps else -1, 1).flatten()
                    made[len(made) // 2].backward()
                assert blank.grad is not None
                norm = float(blank.grad.select(1 if maps else -1, c.source.index).norm())
            same(torch.tensor(c.norm), torch.tensor(norm), f"{c.source} -> {name}:1", 1e-3)
    if refused is not None and not COMPARED[0]:
        raise refused
    needs(COMPARED[0] > 0)


def graph(s: Subject) -> None:
    """The graph of all weights has the edges that `incoming` finds for a layer, and no others."""
    with circuits.weights.build_graph(s.model, s.folder / "graph") as store:
        for site in [name for name in store.sites if name != "input"][-3:]:
            around = store.neighbourhood(f"{site}:1", hops=1, top=10_000)
            edges = list(around.in_edges(circuits.Unit(site, 1), data=True))
            direct = {
                (str(a), e["layer"]): e["norm"]
                for a, _, e in edges
                if e["kind"] == "weight" and e["norm"]
            }
            if not direct:  # no layer writes the unit
                continue
            found = circuits.weights.incoming(s.model, f"{site}:1", top=10_000)
            layers = {layer for _, layer in direct}
            wanted = {
                (str(c.source), c.layer): c.norm for c in found if c.layer in layers and c.norm
            }
            equal(sorted(direct), sorted(wanted), f"edges into {site}:1")
            norms = [torch.tensor([each[key] for key in direct]) for each in (direct, wanted)]
            same(*norms, f"weights into {site}:1")


class Data(torch.utils.data.Dataset):
    """Examples as a dataset of a person's own, already as the model takes them."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> Any:
        return self.inputs[i]


def images_of(s: Subject) -> Any:
    """Images in a file, which the model prepares."""
    needs(s.inputs.shape[1] == 3)
    pixels = (np.random.default_rng(0).random((N, *s.inputs.shape[1:])) * 255).astype(np.uint8)
    np.savez(s.folder / "images.npz", x=pixels.transpose(0, 2, 3, 1))
    return circuits.open_source(f"npz:{s.folder / 'images.npz'}")


def harvest(s: Subject) -> None:
    """Means, maxima and the strongest example of units over a dataset."""
    source = from_dataset(Data(s.inputs), "texts") if s.tokens else images_of(s)
    examples = circuits.Examples(s.model, source, N, how="first")
    store = circuits.harvest(
        s.model,
        source,
        [p.site for p in s.known],
        circuits.Workspace(s.folder / "cache"),
        workers=1,
        positions=0,
    )
    for place in s.known:
        value = s.run(place, inputs=examples.inputs)[0]
        assert value is not None
        site = s.site(place)
        unit = site.by_unit(value)[:, 1].reshape(len(value), -1)
        kept = store.statistics(circuits.Unit(place.site, 1))
        same(torch.tensor(kept.mean), unit.mean(), f"mean of {place.site}:1")
        same(
            torch.tensor(store.largest(circuits.Unit(place.site, 1)).max()),
            unit.max(),
            f"maximum of {place.site}:1",
        )
        top = store.top_examples(circuits.Unit(place.site, 1), 1)[0]
        if float(unit.max(1).values[top.index]) < float(unit.max()) - 1e-5:
            raise WrongError(f"{place.site}:1: example {top.index} is not the strongest")


def visualize(s: Subject) -> None:
    """The activation that a picture, or a dream's tokens, are said to have is the one that the module has on them."""
    place = s.late
    unit = f"{place.site}:1"
    if s.tokens:
        found = circuits.featurevis.dream(s.model, unit, positions=4, steps=3)
        value = s.run(place, inputs=torch.tensor([found.tokens]))[0]
        said = found.of_tokens
    else:
        picture = circuits.visualize(s.model, unit, steps=32, size=s.inputs.shape[-1])
        if not picture.activation > picture.start:
            raise WrongError(
                f"{unit}: {picture.activation:.3g} after 32 steps, {picture.start:.3g} before"
            )
        value = s.run(place, inputs=s.model.input.normalize(picture.image[None]))[0]
        said = picture.activation
    assert value is not None
    same(torch.tensor(said), s.site(place).by_unit(value)[0, 1].mean(), unit, 1e-2)


def saliency(s: Subject) -> None:
    """The gradient of each example's first choice with respect to its pixels."""
    needs(not s.tokens)
    found = circuits.saliency.saliency_map(s.model, s.inputs, "top", "gradient")
    same(found.values, gradient(s, None)[1], "gradient", 1e-3)


def grad_cam(s: Subject) -> None:
    """Grad-CAM at a map: its units' means of gradients times activations, what is positive of their sum."""
    needs(not s.tokens)
    maps = [p for p in s.places if len(s.site(p).position_axes) == 2]
    needs(bool(maps))
    place = maps[-1]
    found = circuits.saliency.saliency_map(s.model, s.inputs, "top", "grad_cam", site=place.site)
    site = s.site(place)
    value, slope = (site.by_unit(t) for t in gradient(s, place))
    wanted = torch.relu((slope.mean((2, 3), keepdim=True) * value).sum(1))
    ours = found.heat()
    wanted = nn.functional.interpolate(
        wanted[:, None], ours.shape[-2:], mode="bilinear", align_corners=False
    )[:, 0]
    same(torch.as_tensor(ours), wanted, place.site, 1e-3)


def sae(s: Subject) -> None:
    """An autoencoder and its error leave the model as it is; a latent that is off takes its direction away."""
    place = s.early
    source = from_dataset(Data(s.inputs), "texts") if s.tokens else images_of(s)
    rows = ModelRows(s.model, source, place.site)
    code = train(rows, Hyperparameters("topk", 16, k=2), Schedule(steps=4, batch=4))[""]
    own = s.model.attach(code, "x", place.site)
    same(own.logits(s.inputs), s.run()[1], "logits")
    axis = s.site(place).unit_axis

    def without_latent(value: Tensor) -> Tensor:
        last = value.movedim(axis, -1)
        with torch.no_grad():
            codes = code.encode(last)
        return (last - codes[..., 3:4] * code.W_dec[3]).movedim(-1, axis)

    with circuits.edited(own, [circuits.edits.zero("sae/x:3")]):
        same(own.logits(s.inputs), s.run(place, without_latent)[1], "logits without a latent")


def tune(s: Subject) -> None:
    """Radial tuning runs on the model's size; nothing is compared."""
    needs(not s.tokens and s.inputs.shape[1] == 3)
    place = next((p for p in s.places if len(s.site(p).position_axes) == 2), None)
    needs(place is not None)
    assert place is not None
    circuits.tuning.radial_tuning(s.model, [f"{place.site}:1"], step=90.0, radii=[8.0])


def logits(s: Subject) -> None:
    """Direct logit attribution: every part, against the module's own outputs, norms and weights."""
    needs(s.tokens)
    if s.name in test_transformer_families.SPLIT:
        test_transformer_families.test_each_part_of_a_logit_is_what_the_model_adds(s.name, both(s))
        COMPARED[0] += 1
    elif s.name == "mamba":
        test_transformer_families.test_a_layer_that_is_not_attention_and_mlp_is_one_part(s.folder)
        COMPARED[0] += 1
    else:
        circuits.attribution.direct_logit_attribution(s.model, s.inputs)


def heads(s: Subject) -> None:
    """QK and OV circuits of heads against what the module's attention did."""
    needs(s.group == "language")
    if s.name in test_transformer_families.SPLIT:
        test_transformer_families.test_circuits_are_what_attention_does(s.name, both(s))
        COMPARED[0] += 1
    else:
        circuits.weights.ov_circuit(s.model, "blocks.1.attn.hook_z:1")


def both(s: Subject) -> tuple[HookedModel, transformer_families.Watched]:
    """The model, and what its module's own modules computed."""
    return s.model, transformer_families.watched(s.inner, test_transformer_families.TOKENS)


def lens(s: Subject) -> None:
    """The logit lens at the last depth is the prediction."""
    needs(s.group == "language")
    task = circuits.load_task(s.model, data=from_dataset(Data(s.inputs), "texts"))
    found = circuits.localization.logit_lens(s.model, task, null=False)
    same(torch.tensor(found.values[-1]), torch.tensor(found.intact), "last depth", 1e-3)


def patch(s: Subject) -> None:
    """All direct paths to the logits, patched together, give the other run's logits: what the stream adds up to."""
    needs(s.group == "language")
    other = s.inputs.roll(1, 0)
    every = [path for path in routes.paths(s.model) if str(path[1]) == "logits"]
    found = circuits.patch_paths(
        s.model, s.inputs, other, [every], metric=lambda logits: logits[:, -1, 3]
    )
    same(found.values[0], s.run(inputs=other)[1][:, -1, 3], "logit")


def generate(s: Subject) -> None:
    """Greedy continuations are those of the module's own."""
    needs(s.group == "language")
    row = s.inputs[:1, :3]
    ours = s.model.generate(row, 4)
    for _ in range(4):
        row = torch.cat([row, s.run(inputs=row)[1][:, -1:].argmax(-1)], 1)
    equal(torch.as_tensor(ours[0]).reshape(-1)[-4:].tolist(), row[0, -4:].tolist(), "tokens")


def identity(s: Subject) -> None:
    """Another copy of the same model has the same hash; a copy with one weight changed has another."""
    twin = s.again()
    equal(twin.hash, s.model.hash, "hash")
    with torch.no_grad():
        next(p for p in twin.module.parameters() if p.ndim > 1).view(-1)[0] += 1
    equal(twin.hash == s.model.hash, False, "hash of another weight is the same")


VERBS: dict[str, Callable[[Subject], None]] = {
    "read": read, "axes": axes, "put back": put_back, "edit": edit, "ablate": ablate, "measure": measure,
    "attribute": attribute, "integrated": integrate, "relevance": relevance, "adds up": adds_up,
    "expand": expand, "incoming": incoming,
    "graph": graph, "harvest": harvest, "visualize": visualize, "saliency": saliency, "grad-cam": grad_cam,
    "sae": sae, "tune": tune, "logits": logits, "heads": heads, "lens": lens, "patch": patch,
    "generate": generate, "hash": identity,
}  # fmt: skip


# --- models -------------------------------------------------------------------------------------------


def language(name: str, folder: Path) -> Subject:
    """A Hugging Face language model as a TransformerLens bridge."""
    inner = transformer_families.saved(name, folder)

    def load() -> HookedModel:
        model = circuits.load_model(f"tl:{folder}")
        model.name = name  # in its messages
        return model

    layers = next(
        n for n, m in inner.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2
    )
    places = tuple(Place(f"blocks.{i}.hook_resid_pre", f"{layers}.{i}", True) for i in range(2))
    tokens = torch.randint(
        transformer_families.N_VOCAB, (N, 7), generator=torch.Generator().manual_seed(1)
    )
    return Subject(
        name, "language", transformer_families.FAMILIES[name].kind, load(), inner, tokens, places, folder,
        lambda: transformer_families.huggingface_model(name), load,
    )  # fmt: skip


def vision(name: str, folder: Path) -> Subject:
    """A Hugging Face image classifier."""
    inner = vision_families.huggingface_classifier(name)
    size = vision_families.image_size(name)
    vision_families.save_classifier(inner, folder, size)

    def load() -> HookedModel:
        model = circuits.load_model(f"hf:{folder}")
        model.name = name
        return model

    model = load()
    inputs = torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Subject(
        name, "vision", vision_families.FAMILIES[name][2], model, inner, inputs, spread(model, inner), folder,
        lambda: vision_families.huggingface_classifier(name), load,
    )  # fmt: skip


def own(name: str, folder: Path) -> Subject:
    """A person's own module."""
    kind, shape = unusual_modules.MODULES[name]
    generator = torch.Generator().manual_seed(1)
    if shape is None:
        given: Any = TokenInput(unusual_modules.N_TOKENS, unusual_modules.CONTEXT)
        inputs = torch.randint(unusual_modules.N_TOKENS, (N, 6), generator=generator)
    else:
        given, inputs = shape, torch.randn(N, *shape, generator=generator)

    def fresh() -> nn.Module:
        made = kind().eval()
        redraw(made, sum(map(ord, name)))
        return made

    def load() -> HookedModel:
        return HookedModel(fresh(), given, name)

    model, inner = load(), fresh()
    special = (kind.__doc__ or "").splitlines()[0].rstrip(".")
    return Subject(
        name, "own", special, model, inner, inputs, spread(model, inner), folder, fresh, load
    )


def spread(model: HookedModel, inner: nn.Module) -> tuple[Place, ...]:
    """Sites at the beginning, after a third and after two thirds of a pass, which modules return."""
    known = dict(inner.named_modules())
    sites = [s.name for s in model.sites if s.name in known and s.n_units > 1]
    if not sites:
        return ()
    chosen = dict.fromkeys(sites[round(i * (len(sites) - 1) / 3)] for i in (0, 1, 2))
    return tuple(Place(name, name) for name in chosen)


GROUPS: dict[str, tuple[Sequence[str], Callable[[str, Path], Subject]]] = {
    "language": (tuple(transformer_families.FAMILIES), language),
    "vision": (tuple(vision_families.FAMILIES), vision),
    "own": (tuple(unusual_modules.MODULES), own),
}


# --- the table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What came of a verb on a model: `yes`, `refused`, `WRONG` or `CRASH`, with the message."""

    verdict: str
    message: str = ""


def attempt(verb: Callable[[], Any], loading: bool = False) -> Cell:
    """Run a verb, and classify its outcome."""
    COMPARED[0] = 0
    try:
        verb()
    except InapplicableError:
        return Cell("")
    except PartlyError as error:
        return Cell("refused", str(error))
    except WrongError as error:
        return Cell("WRONG", str(error))
    except AssertionError as error:
        return Cell(
            "WRONG",
            str(error).splitlines()[0] if str(error) else traceback.format_exc().splitlines()[-2],
        )
    except (ValueError, KeyError, TypeError) as error:
        message = str(error.args[0]) if error.args else ""
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = last.is_relative_to(Path(circuits.__file__).parent) and not isinstance(
            error, TypeError
        )
        # An error of the model's own forward pass is no refusal, unless the model cannot run at all.
        if ours and (loading or not isinstance(error, ForwardError)) and "\n" not in message:
            return Cell("refused", message)
        return Cell("CRASH", f"{type(error).__name__}: {message}")
    except Exception as error:  # noqa: BLE001  whatever it is, it is shown
        return Cell(
            "CRASH", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return Cell("yes" if COMPARED[0] or loading else "ran")


def tried(
    names: Sequence[str], verbs: Sequence[str], show: bool
) -> dict[str, tuple[Subject | None, dict[str, Cell]]]:
    """Every verb on every model."""
    table: dict[str, tuple[Subject | None, dict[str, Cell]]] = {}
    for all_of, make in GROUPS.values():
        for name in (n for n in all_of if n in names):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                made: list[Subject] = []
                loaded = attempt(
                    lambda n=name, f=folder, m=make, k=made: k.append(m(n, Path(f))), True
                )
                cells = {"load": loaded}
                if made:
                    cells |= {v: attempt(functools.partial(VERBS[v], made[0])) for v in verbs}
            table[name] = (made[0] if made else None, cells)
            if show:
                bad = {v: c for v, c in cells.items() if c.verdict != "yes"}
                print(
                    f"{name} {time.perf_counter() - start:.1f} s",
                    *(p.site for p in made[0].places) if made else (),
                )
                for verb, cell in bad.items():
                    print(f"    {verb}: {cell.verdict} {cell.message[:300]}", flush=True)
    return table


MARKS = {"": "", "yes": "✓", "ran": "·", "WRONG": "✗", "CRASH": "✗"}
TITLES = {
    "language": "Language models, as TransformerLens bridges",
    "vision": "Image classifiers of Hugging Face",
    "own": "Modules of a person's own",
}


def written(table: Mapping[str, tuple[Subject | None, dict[str, Cell]]]) -> str:
    """The table as Markdown, with the reasons of refusals as numbered notes."""
    reasons: dict[str, int] = {}
    lines = [INTRODUCTION, "| verb | what is compared |", "|---|---|"]
    lines += [f"| {name} | {(verb.__doc__ or '').strip()} |" for name, verb in VERBS.items()]
    for group, (names, _) in GROUPS.items():
        rows = [(name, *table[name]) for name in names if name in table]
        lines += ["", f"## {TITLES[group]}", "", f"| model | | {' | '.join(['load', *VERBS])} |"]
        lines += ["|---|---|" + "---|" * (len(VERBS) + 1)]
        for name, subject, cells in rows:
            marks = [mark(cells.get(verb, Cell("")), name, reasons) for verb in ["load", *VERBS]]
            lines.append(f"| {name} | {subject.special if subject else ''} | {' | '.join(marks)} |")
    lines += ["", "## Notes", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def mark(cell: Cell, name: str, reasons: dict[str, int]) -> str:
    """A cell's mark; of a refusal the number of its reason, which is the same for all models that it is given for."""
    if cell.verdict != "refused":
        return MARKS[cell.verdict]
    reason = re.sub(r"\S*/tmp\S*", "MODEL", cell.message)
    reason = re.sub(rf"\b(model|of|that|in) {re.escape(name)}\b", r"\1 MODEL", reason)
    return str(reasons.setdefault(reason, len(reasons) + 1))


INTRODUCTION = """# Models

Every verb was run on every model below, and its result compared with what the model's own module gives in plain torch,
read and changed by torch's hooks (`python -m benchmarks.families` writes this page; the nightly tests repeat it). The
models are tiny and random, so that nothing is right by accident: gains, biases and running statistics are drawn too.

- ✓: the result is that of plain torch, to the tolerance of float32.
- ·: it ran, and there is nothing here to compare it with.
- a number: refused in one line, or given with what is missing: see the end of the page.
- empty: it does not apply, or nothing was found that torch's hooks find too.
- ✗: wrong, or a traceback.

A model in a GGUF file (`gguf:PATH`), and `smollm2`, which is one, is a bridge of its family, here `llama`; that it
computes what its file says is tested on its own (`tests/test_gguf.py`).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Every verb on models of many families.")
    every = [name for names, _ in GROUPS.values() for name in names]
    parser.add_argument("--only", default=",".join(every))
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument(
        "--print",
        action="store_true",
        dest="show",
        help="print what is not right, and write nothing",
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    table = tried(asked.only.split(","), asked.verbs.split(","), asked.show)
    if not asked.show:
        DOCS.write_text(written(table))
    bad = sum(
        c.verdict in ("WRONG", "CRASH") for _, cells in table.values() for c in cells.values()
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
