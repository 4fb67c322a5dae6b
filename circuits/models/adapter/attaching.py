"""Autoencoders attached to a model, so that their latents are units of the model.

Let x be the tensor at the autoencoder's site. Unless a hook reads or changes the latents, the autoencoder is not
run and the model continues with x. Reading `sae/NAME` gives encode(x). Changing it makes the model continue with
decode(changed) + error, where error = x - decode(encode(x)) is a site too, `sae/NAME.error`, so that what the
autoencoder misses can be measured and ablated as well (Marks et al. 2024, section 2). A change that returns its
input leaves the model's output the same to the bit. Reading x itself gives what the model computed, before the
latents were changed; everything after x sees the change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.autograd import recording_gradients
from circuits.call_points import CallPoint, uncounted
from circuits.hooks import LastHook, Tap, note_examples
from circuits.models.adapter.copying import deep_copy
from circuits.units import Site, SiteKind

PREFIX = "sae/"
"""What the names of latents' sites begin with."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def check_name(name: str) -> str:
    """Return `name` if it is a valid name of an autoencoder: at most 100 letters, digits, `_` and `-` (not first).

    Raises:
        ValueError: if it is not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name {name!r} of an autoencoder is not valid: expected at most 100 letters, digits, _ and - (not first)"
        )
    return name


class HookPoint(nn.Module):
    """Returns its input, so that a tensor which no module computes can be hooked, as TransformerLens has it.

    Args:
        axes: the names of the tensor's axes.
        unit_axis: which of them runs over units.
        kind: what the units are.
    """

    # A model's hash covers the names of its modules' classes, and workspaces keep the names of latents and
    # stored activations under that hash: the class is known there by the name that it was first given.
    __qualname__ = "Spot"

    def __init__(self, axes: tuple[str, ...], unit_axis: int, kind: SiteKind) -> None:
        super().__init__()
        self.axes, self.unit_axis = axes, unit_axis
        self.kind: SiteKind = kind

    def forward(self, value: Tensor) -> Tensor:
        return value

    @property
    def watched(self) -> bool:
        """Whether a hook reads or changes the tensor."""
        return bool(self._forward_hooks)


@dataclass(frozen=True, eq=False)
class TappedSite:
    """A site, with the tap that reaches its tensor."""

    site: Site
    tap: Tap


class Attached(LastHook):
    """An autoencoder at a site, which runs only if a hook reads or changes its latents or its error.

    Args:
        code: the autoencoder; its `encode` and `decode` work on the last axis.
        source: the site that it encodes.
        target: the site that it writes: the same as `source`, except for a transcoder.
    """

    def __init__(self, code: nn.Module, source: TappedSite, target: TappedSite) -> None:
        super().__init__()
        self.code = code
        self.source, self.target = source, target
        site = source.site
        if site.inner_axis is None:
            self.latents = HookPoint(site.axes, site.unit_axis, "latent")
        else:  # an autoencoder of attention output encodes all heads of a position together
            axes = ("batch", *site.position_axes, "unit")
            self.latents = HookPoint(axes, len(axes) - 1, "latent")
        self.error = HookPoint(target.site.axes, target.site.unit_axis, target.site.kind)
        self.calls: dict[str, int] = {}
        # From the source's hook to the target's: x, its codes, and the codes after the changes of other hooks.
        self.held: tuple[Tensor, Tensor, Tensor] | None = None
        # What was put in the place of a tensor that several calls take, by `source` and `target`.
        self.again: dict[str, Any] = {}

    def forward(self, value: Tensor) -> Tensor:
        """Return the input: a model that calls all of its children in turn (`nn.Sequential`) calls this one too."""
        return value

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts with no pass under way; tensors with autograd history could not be deep-copied at all.
        return self.__dict__ | {"calls": {}, "held": None, "again": {}}

    def restart(self, module: nn.Module, args: Any) -> None:
        """The hook before a forward pass of the model: reset the counts of calls."""
        self.calls, self.held, self.again = {}, None, {}
        note_examples(args)

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after a forward pass, also one that failed or was stopped: let go of the tensors."""
        self.held, self.again = None, {}

    def _is_at(self, place: TappedSite, which: str) -> bool:
        """Count a call of a site's module; whether it is the call that puts out the site's tensor."""
        call = self.calls.get(which, 0)
        self.calls[which] = call + 1
        return place.tap.call in (None, call)

    @property
    def watched(self) -> bool:
        """Whether a hook reads or changes the latents or the error."""
        return self.latents.watched or self.error.watched

    def visit(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook at the site that is encoded."""
        with uncounted():
            return self._once(self.source, "source", output, self._visit)

    def _once(self, place: TappedSite, which: str, output: Any, visit: Callable[[Any], Any]) -> Any:
        """What a hook returns; of a tensor that several calls take, what it returned for the first of them."""
        if place.tap.call is None and which in self.again:
            return self.again[which]
        made = visit(output)
        if place.tap.call is None:
            self.again[which] = made
        return made

    def _visit(self, output: Any) -> Any:
        if not self._is_at(self.source, "source") or not self.watched:
            return None
        x = self.source.site.rows(self.source.tap.read(output)).to(_precision(self.code))
        if self.skips and self.target is not self.source:
            x = x.clone()  # a layer between source and target may overwrite it in place
        codes = self.code.encode(x)  # type: ignore[operator]
        # The autoencoder works on the last axis; the site's units may be elsewhere (channels of a map).
        given = codes.movedim(-1, self.latents.unit_axis)
        shown = self.latents(given)
        # Identity, not equality, tells whether a hook replaced the tensor: then nothing needs to be decoded.
        changed = codes if shown is given else shown.movedim(self.latents.unit_axis, -1)
        self.held = (x, codes, changed)
        return self._written(output) if self.target is self.source else None

    def visit_target(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook at the site that is written, if that is another one than is encoded (a transcoder)."""
        with uncounted():
            return self._once(self.target, "target", output, self._visit_target)

    def _visit_target(self, output: Any) -> Any:
        if not self._is_at(self.target, "target") or self.held is None:
            return None
        return self._written(output)

    def _written(self, output: Any) -> Any:
        """The target module's output with decode(changed codes) + error in it; None if nothing changed."""
        assert self.held is not None, "the source's hook runs before the target's"
        x, codes, changed = self.held
        self.held = None
        if changed is codes and not self.error.watched:
            return None
        site = self.target.site
        value = self.target.tap.read(output)
        made = self._decoded(codes, x)
        # The error belongs to the unchanged codes: it is what the autoencoder misses of this input, and stays as it
        # is while latents change (Marks et al. 2024, section 2).
        error = site.from_rows(site.rows(value) - made).to(value.dtype)
        shown = self.error(error)
        if shown is error and changed is codes:
            return None
        # Only here may rounding change the output: decode(codes) + error equals x up to rounding alone.
        remade = site.from_rows(self._decoded(changed, x)).to(value.dtype)
        return self.target.tap.write(output, remade + shown)

    @property
    def skips(self) -> bool:
        """Whether decoding needs the input x in addition to its codes (a skip transcoder)."""
        return getattr(self.code, "W_skip", None) is not None

    def _decoded(self, codes: Tensor, x: Tensor) -> Tensor:
        if self.skips:
            return self.code.decode(codes, x)  # type: ignore[operator]
        return self.code.decode(codes)  # type: ignore[operator]


@recording_gradients()
def attached_module(
    module: nn.Module, name: str, code: nn.Module, source: TappedSite, target: TappedSite | None
) -> nn.Module:
    """A copy of a module with an autoencoder attached."""
    # In one call, so that the copied taps point into the copied module.
    module, source, target = deep_copy((module, source, target))
    attached = Attached(deep_copy(code).to(_device(module)), source, target or source)
    module.add_module(PREFIX + name, attached)
    module.register_forward_pre_hook(attached.restart)
    source.tap.module.register_forward_hook(attached.visit)
    if target is not None:
        target.tap.module.register_forward_hook(attached.visit_target)
    for place in (source, target):
        if place is not None and isinstance(place.tap.module, CallPoint):
            place.tap.module.scope.watch()
    # `always_call`: a pass that is stopped early ends with an exception.
    module.register_forward_hook(attached.finish, always_call=True)
    return module


def _precision(code: nn.Module) -> torch.dtype | None:
    """The dtype that an autoencoder computes in; None if it has no floating-point parameters."""
    return next((p.dtype for p in code.parameters() if p.is_floating_point()), None)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def autoencoders(module: nn.Module) -> dict[str, Attached]:
    """The autoencoders attached to a module, by the names of their sites."""
    return {name: m for name, m in module.named_children() if isinstance(m, Attached)}


def hook_points(module: nn.Module) -> dict[str, HookPoint]:
    """The hook points of the latents and errors of all attached autoencoders, by site name."""
    found = {}
    for name, attached in autoencoders(module).items():
        found |= {name: attached.latents, f"{name}.error": attached.error}
    return found
