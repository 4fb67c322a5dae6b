"""Runs many changed versions of a few examples through a model, a bounded number at a time.

Captum and similar tools run the whole network for every step. Here a pass starts at the site whose tensor is changed,
if everything after it depends only on that tensor (which is tested, not assumed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from circuits.autograd import differentiable, recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.finiteness import check_finite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.paths.restarting import Restart, restart_at
from circuits.tasks.targets import Aim, Target, as_target
from circuits.tensors import at_least_single
from circuits.units import Site, Unit

Size = Literal["refuse", "resize", "keep"]
"""What to do with images that do not have the model's height and width."""

INPUT = "input"
"""The name of the input as a site to attribute to."""


def sized(model: HookedModel, examples: Examples | Tensor, size: Size = "refuse") -> Tensor:
    """Examples as one tensor that the model can take.

    Raises:
        ValueError: if there are none, texts differ in length, or images have another height or width and `size` is
            `refuse`.
    """
    inputs = as_examples(model, examples).inputs
    spec = model.input
    if not isinstance(spec, ImageInput) or size == "keep":
        return inputs
    wanted = (spec.height, spec.width)
    if tuple(inputs.shape[2:]) == wanted:
        return inputs
    if size == "refuse":
        raise ValueError(
            f"examples have {inputs.shape[2]} x {inputs.shape[3]} pixels: {model.name} takes {wanted[0]} x {wanted[1]} "
            "(size='resize' resizes them, 'keep' runs them unchanged)"
        )
    return F.interpolate(inputs, wanted, mode="bilinear", antialias=True, align_corners=False)


class Passes:
    """A target's value as a function of the tensor at a site, or of the input.

    Args:
        model: the model.
        examples: examples of a source, or a tensor as the model takes it.
        target: what is computed.
        site: the site whose tensor is changed; None is the input.
        batch: versions in one pass.
        size: what to do with images of another size.

    Attributes:
        inputs: the examples, as the model takes them, in float32 at least.
        points: the site's tensor on the examples (without a site, the inputs), in float32 at least.
        values: the target's value on the examples.
        aim: the target, resolved for each example.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if examples do not fit, or the model does not have the target.
    """

    @recording_gradients()
    def __init__(
        self,
        model: HookedModel,
        examples: Examples | Tensor,
        target: str | Unit | Target,
        site: str | Site | None = None,
        batch: int = 32,
        size: Size = "refuse",
    ) -> None:
        check_batch(batch)
        self.model, self.batch = model, batch
        self.site = None if site is None or site == INPUT else model.site(site)
        if self.site is None and not isinstance(model.input, ImageInput):
            raise ValueError(
                f"model {model.name} takes tokens: expected a site, for example {model.sites[0].name}"
            )
        self.target = as_target(model, target)
        self.end = model.site(self.target.site)
        if self.site not in (None, self.end) and model.last([self.site, self.end]) == self.site:
            raise no_gradient_error(self.target, self.site)
        self.inputs = channels_last(at_least_single(model.fitted(sized(model, examples, size))))
        self.points, at_end, before = self._intact()
        self.aim = Aim.at(self.end, self.target, at_end, before=before)
        self.values = self.aim.value(at_end, torch.arange(len(self.inputs), device=at_end.device))
        check_finite(model, self.values, self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def _intact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors at the site, at the target's, and at the one before the target's ceiling."""
        before = self.model.before_ceiling(self.end)
        read = [before, self.end] if self.site is None else [self.site, before, self.end]
        here, there, under = [], [], []
        for x in self.inputs.split(self.batch):
            cache = self.model.run(x, read=read, until=self.model.last(read))
            there.append(cache[self.end])
            under.append(cache[before])
            if self.site is not None:
                here.append(at_least_single(cache[self.site]))
        return (torch.cat(here) if here else self.inputs), torch.cat(there), torch.cat(under)

    # --- values ----------------------------------------------------------------------------------

    def value(
        self, points: Tensor, examples: Int[Tensor, " point"] | int
    ) -> Float[Tensor, " point"]:
        """The target's value for tensors at the site, each of which is a version of one of the examples."""
        which = self._which(points, examples)
        parts = [
            self.aim.value(self._run(p, e, self.end), e)
            for p, e in zip(points.split(self.batch), which.split(self.batch), strict=True)
        ]
        return torch.cat(parts)

    def tensors(
        self, points: Tensor, examples: Int[Tensor, " point"] | int, site: str | Site
    ) -> Tensor:
        """The tensor at a later site, for given tensors at the site."""
        which = self._which(points, examples)
        end = self.model.site(site)
        pairs = zip(points.split(self.batch), which.split(self.batch), strict=True)
        return torch.cat([at_least_single(self._run(p, e, end)) for p, e in pairs])

    @recording_gradients()
    def gradient(
        self, points: Tensor, examples: Int[Tensor, " point"] | int
    ) -> tuple[Float[Tensor, " point"], Tensor]:
        """The target's value and its gradient with respect to the site's tensor.

        Raises:
            ValueError: if no gradient leads from the target to the site.
        """
        which = self._which(points, examples)
        values, gradients = [], []
        for p, e in zip(points.split(self.batch), which.split(self.batch), strict=True):
            p = differentiable(p.detach())
            own = p.contiguous() if self.site is None else self._laid_out(p)
            own.requires_grad_(True)
            value = self.aim.value(self._run(own, e, self.end, grad=True), e)
            values.append(value.detach())
            gradients.append(gradient_of(value, own, self.target, self.site))
        return torch.cat(values), torch.cat(gradients)

    def _which(self, points: Tensor, examples: Tensor | int) -> Tensor:
        if isinstance(examples, int):
            return torch.full((len(points),), examples, device=self.inputs.device)
        return examples.to(self.inputs.device)

    def _run(self, points: Tensor, examples: Tensor, end: Site, grad: bool = False) -> Tensor:
        if self.site is None and grad:
            # In torch's own layout and operations, so that gradients are those that other tools give. Another order of
            # floating-point sums can put a ReLU whose input is almost 0 on its other side.
            return self.model.run(points, read=[end], until=end, grad=True, reference=True)[end]
        if self.site is None:
            return self.model.run(channels_last(points), read=[end], until=end)[end]
        start = self._start
        x = self.inputs[examples] if start is None else start.inputs(self.inputs)
        return self._from_site(x, points, end, grad)

    def _from_site(self, x: Tensor, points: Tensor, end: Site, grad: bool) -> Tensor:
        assert self.site is not None, "there is a site to begin at"
        # `* 1` copies, since later operations may work in place.
        points = self._laid_out(points)
        edits = {self.site.name: lambda value: points * 1}
        return self.model.run(x, read=[end], until=end, edits=edits, grad=grad)[end]

    def _laid_out(self, points: Tensor) -> Tensor:
        """A site's tensors as models have them: maps with channels last, anything else in order, for models that view
        it in another shape."""
        assert self.site is not None, "there is a site to begin at"
        maps = self.site.position_axes == ("y", "x") and self.site.inner_axis is None
        return channels_last(points) if maps else points.contiguous()

    @property
    def alone(self) -> bool:
        """Whether everything that is computed after the site depends only on the site's tensor."""
        return self._start is not None

    @cached_property
    def _start(self) -> Restart | None:
        """How a pass can start at the site; None if it cannot. Tested with the site's own tensor and a changed one."""
        if self.site is None or len(self.points) != len(self.inputs):
            return None
        twice = torch.cat([self.inputs[:1]] * 2)
        two = torch.cat([self.points[:1], self.points[:1] * 0.5])
        try:
            expected = self._from_site(twice, two, self.end, grad=False)
        except (RuntimeError, LookupError):  # shapes that follow the input's batch
            return None
        values = {self.site.name: two, self.end.name: expected}
        return restart_at(self.model, self.site, [self.end], twice, values)

    def chunks(self, n: int) -> Iterator[range]:
        """Cut `n` versions into runs of at most `batch`."""
        for start in range(0, n, self.batch):
            yield range(start, min(n, start + self.batch))


def gradient_of(value: Tensor, own: Tensor, target: Target, site: Site | None) -> Tensor:
    """The gradient of a target's values with respect to a tensor that they were computed from.

    Raises:
        ValueError: if they were not computed from it, or the gradient is not finite where they are.
    """
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), own, allow_unused=True)
    if gradient is None:
        raise no_gradient_error(target, site)
    if bool(torch.isfinite(value).all()) and not bool(torch.isfinite(gradient).all()):
        place = "the input" if site is None else f"site {site.name}"
        raise ValueError(
            f"the gradient of {target} at {place} is NaN or infinite, although the target is finite: some operation "
            "between them has no gradient there (such as the root of 0); method='ablation' takes none"
        )
    return gradient


def no_gradient_error(target: Target, site: Site | None) -> ValueError:
    """The error for a target that does not depend on a place."""
    place = "the input" if site is None else f"site {site.name}"
    return ValueError(
        f"no gradient leads from {target} to {place}: expected a site before the target, with a path that is not held "
        "fixed"
    )


def check_batch(batch: int) -> None:
    """Raise ValueError if a batch cannot hold anything."""
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")


@dataclass(frozen=True, eq=False)
class OwnGradients:
    """A site's tensor on some examples, and a target's gradient by it.

    Attributes:
        points: the site's tensor.
        gradients: the target's gradient with respect to it.
        values: the target's value.
        names: the unit and position of the target in each example.
    """

    points: Tensor
    gradients: Tensor
    values: Tensor
    names: tuple[str, ...]


@recording_gradients()
def own_gradients(
    model: HookedModel, inputs: Tensor, target: Target, site: Site, batch: int = 32
) -> OwnGradients:
    """A target's gradient with respect to a site's tensor, in the pass that computes the tensor.

    Raises:
        ValueError: if no gradient leads from the target to the site.
    """
    check_batch(batch)
    end = model.site(target.site)
    before = model.before_ceiling(end)
    inputs = channels_last(model.fitted(inputs))
    found = []
    for start in range(0, len(inputs), batch):
        x = inputs[start : start + batch]
        leaves: list[Tensor] = []

        def begin(value: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(value.detach().requires_grad_(True))
            return leaves[0] * 1  # a copy: what follows may work in place

        cache = model.run(x, read=[before, end], until=end, edits={site.name: begin}, grad=True)
        made = cache[end]
        model.check_rows({end.name: made} | ({site.name: leaves[0]} if leaves else {}), len(x))
        own_target = target.of_examples(range(start, start + len(x)))
        aim = Aim.at(end, own_target, made, before=cache[before])
        value = aim.value(made, torch.arange(len(x), device=made.device))
        check_finite(model, value, x, names=range(start, start + len(x)))
        own = leaves[0] if leaves else made  # the pass ended before the site
        gradients = gradient_of(value if leaves else value.detach(), own, target, site)
        numbers = (at_least_single(x) for x in (own.detach(), gradients, value.detach()))
        found.append((*numbers, aim.names()))
    parts = list(zip(*found, strict=True))
    points, gradients, values = (torch.cat(part) for part in parts[:3])
    return OwnGradients(points, gradients, values, tuple(n for names in parts[3] for n in names))


def channels_last(x: Tensor) -> Tensor:
    """Images in channels-last layout, in which convolutions are fastest; anything else unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
