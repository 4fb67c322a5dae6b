"""Autoencoders attached to a model: their latents become units of it.

At the autoencoder's site x the model continues with x: nothing is computed unless somebody looks. Whoever
reads `sae/NAME` sees encode(x); whoever changes it makes the model continue with decode(changed) + error,
where error = x - decode(encode(x)) is a site of its own, `sae/NAME.error`, so that nothing hides in it
(Marks et al. 2024, section 2). A change of nothing changes nothing, to the bit. Whoever reads x itself sees what
the model computed, before the latents were changed; what comes behind x sees the change.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.hooks import Splice, Tap
from circuits.units import Site, SiteKind

PREFIX = "sae/"
"""How the names of sites of latents begin."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def check_name(name: str) -> str:
    """Return `name` if an autoencoder can be called so: at most 100 letters, digits, `_` and `-` (not first).

    Raises:
        ValueError: if not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name {name!r} of an autoencoder is not valid: expected at most 100 letters, digits, _ and - (not first)"
        )
    return name


class Spot(nn.Module):
    """Hands on a tensor, so that it is a site.

    Args:
        axes: of its tensor.
        unit_axis: which of them counts units.
        kind: what the units are.
    """

    def __init__(self, axes: tuple[str, ...], unit_axis: int, kind: SiteKind) -> None:
        super().__init__()
        self.axes, self.unit_axis = axes, unit_axis
        self.kind: SiteKind = kind

    def forward(self, value: Tensor) -> Tensor:
        return value

    @property
    def watched(self) -> bool:
        """Whether anybody reads or changes the tensor."""
        return bool(self._forward_hooks)


@dataclass(frozen=True, eq=False)
class Place:
    """A site with the tap that reaches it."""

    site: Site
    tap: Tap


class Attached(Splice):
    """An autoencoder at a site: the site's tensor passes through it if anybody looks.

    Args:
        code: the autoencoder: `encode` and `decode` work on the last axis.
        source: what it encodes.
        target: what it writes: the same, but for a transcoder.
    """

    def __init__(self, code: nn.Module, source: Place, target: Place) -> None:
        super().__init__()
        self.code = code
        self.source, self.target = source, target
        site = source.site
        if site.inner_axis is None:
            self.latents = Spot(site.axes, site.unit_axis, "latent")
        else:  # of all heads together
            axes = ("batch", *site.position_axes, "unit")
            self.latents = Spot(axes, len(axes) - 1, "latent")
        self.error = Spot(target.site.axes, target.site.unit_axis, target.site.kind)
        self.calls: dict[str, int] = {}
        self.held: tuple[Tensor, Tensor, Tensor] | None = None  # x, codes, codes after changes

    def forward(self, value: Tensor) -> Tensor:
        """Hand on a tensor: a model that calls its children one after the other calls this one too."""
        return value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"calls": {}, "held": None}  # a copy begins anew

    def restart(self, module: nn.Module, args: Any) -> None:
        """Begin a forward pass."""
        self.calls, self.held = {}, None

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """End a forward pass, even one that was stopped: nothing is held any longer."""
        self.held = None

    def _is_at(self, place: Place, which: str) -> bool:
        call = self.calls.get(which, 0)
        self.calls[which] = call + 1
        return call == place.tap.call

    @property
    def watched(self) -> bool:
        """Whether anybody reads or changes the latents or the error."""
        return self.latents.watched or self.error.watched

    def visit(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook at the site that is encoded."""
        if not self._is_at(self.source, "source") or not self.watched:
            return None
        x = self.source.site.rows(self.source.tap.read(output)).to(_precision(self.code))
        if self.skips and self.target is not self.source:
            x = x.clone()  # what comes in between may overwrite it
        codes = self.code.encode(x)  # type: ignore[operator]
        given = codes.movedim(-1, self.latents.unit_axis)  # laid out like the site
        shown = self.latents(given)
        changed = codes if shown is given else shown.movedim(self.latents.unit_axis, -1)
        self.held = (x, codes, changed)
        return self._written(output) if self.target is self.source else None

    def visit_target(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook at the site that a transcoder writes."""
        if not self._is_at(self.target, "target") or self.held is None:
            return None
        return self._written(output)

    def _written(self, output: Any) -> Any:
        assert self.held is not None, "the latents come first"
        x, codes, changed = self.held
        self.held = None
        if changed is codes and not self.error.watched:
            return None
        site = self.target.site
        value = self.target.tap.read(output)
        made = self._decoded(codes, x)
        error = site.from_rows(site.rows(value) - made).to(value.dtype)
        shown = self.error(error)
        if shown is error and changed is codes:
            return None
        remade = site.from_rows(self._decoded(changed, x)).to(value.dtype)
        return self.target.tap.write(output, remade + shown)

    @property
    def skips(self) -> bool:
        """Whether what is written needs what was encoded, beside its codes."""
        return getattr(self.code, "W_skip", None) is not None

    def _decoded(self, codes: Tensor, x: Tensor) -> Tensor:
        if self.skips:
            return self.code.decode(codes, x)  # type: ignore[operator]
        return self.code.decode(codes)  # type: ignore[operator]


def attached_module(
    module: nn.Module, name: str, code: nn.Module, source: Place, target: Place | None
) -> nn.Module:
    """A copy of a module with an autoencoder attached."""
    module, source, target = copy.deepcopy((module, source, target))
    attached = Attached(copy.deepcopy(code).to(_device(module)), source, target or source)
    module.add_module(PREFIX + name, attached)
    module.register_forward_pre_hook(attached.restart)
    source.tap.module.register_forward_hook(attached.visit)
    if target is not None:
        target.tap.module.register_forward_hook(attached.visit_target)
    module.register_forward_hook(attached.finish, always_call=True)
    return module


def _precision(code: nn.Module) -> torch.dtype | None:
    """What an autoencoder computes in; None if it has no numbers of its own."""
    return next((p.dtype for p in code.parameters() if p.is_floating_point()), None)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def autoencoders(module: nn.Module) -> dict[str, Attached]:
    """The autoencoders attached to a module, by the names of their sites."""
    return {name: m for name, m in module.named_children() if isinstance(m, Attached)}


def spots(module: nn.Module) -> dict[str, Spot]:
    """Latents and errors of all attached autoencoders, by site name."""
    found = {}
    for name, attached in autoencoders(module).items():
        found |= {name: attached.latents, f"{name}.error": attached.error}
    return found
