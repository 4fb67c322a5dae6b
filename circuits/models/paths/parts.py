"""Parts of what attention or an MLP writes to the residual stream: its neurons, or the latents of an autoencoder.

What is written is the sum over parts of an activation times a direction and, where parts do not make up all of it, a
rest: what the autoencoder misses, and the latents that are left out. So the sum is exact whatever the parts are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Writing = Literal["attention", "mlp"]
"""What writes to the stream in a layer."""


@dataclass(frozen=True, eq=False)
class Split:
    """What attention or the MLP of a layer writes, as a sum of parts.

    Attributes:
        layer: the layer.
        writing: whether it is attention or the MLP.
        name: the parts are called `NAME:INDEX`, the rest `NAME.error`.
        site: the site of the parts' activations.
        units: which of its units are parts.
        directions: what each adds to the stream, for an activation of 1.
        whole: the site of what is the sum of the parts and the rest; empty if there is no rest.
        out: what that is multiplied with on its way to the stream (W_O of all heads); None for nothing.
        norm: the normalisation through which all of it then goes (Gemma 2); None if there is none.
        before: the site of what this normalises.
    """

    layer: int
    writing: Writing
    name: str
    site: str
    units: Int[Tensor, " part"]
    directions: Float[Tensor, "part d_model"]
    whole: str = ""
    out: Float[Tensor, "width d_model"] | None = None
    norm: Any = None
    before: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parts, and of the rest."""
        rest = [f"{self.name}.error"] if self.whole else []
        return (*(f"{self.name}:{i}" for i in self.units.tolist()), *rest)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that show what is written."""
        return tuple(s for s in (self.site, self.whole, self.before) if s)

    def change(self, live: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> PartsChange:
        """How the parts in another run differ from those in this one, given both runs' tensors by site."""
        made = (other[self.site] - live[self.site])[..., self.units]
        if not self.whole:
            return PartsChange(made, self.directions, None)
        rest = other[self.whole] - live[self.whole]
        rest = rest if self.out is None else rest.flatten(-2) @ self.out
        return PartsChange(made, self.directions, rest - made.to(rest) @ self.directions)


@dataclass(frozen=True, eq=False)
class PartsChange:
    """A change of parts.

    Attributes:
        activations: the change of each part's activation.
        directions: what each adds to the stream, for an activation of 1.
        rest: the change of the rest; None if there is none.
    """

    activations: Float[Tensor, "*axes position part"]
    directions: Float[Tensor, "part d_model"]
    rest: Float[Tensor, "*axes position d_model"] | None

    def mixed(
        self,
        weights: Float[Tensor, "set part receiver *span"],
        span: Int[Tensor, "example position"] | None = None,
    ) -> Float[Tensor, "set receiver example position d_model"]:
        """The change of the stream that some parts make together, for each receiver.

        Args:
            weights: how much of each part's change, the rest's last; for each span if there are any.
            span: the span that each position is in.
        """
        n = len(self.directions)
        some = (weights.detach() != 0) | weights.requires_grad  # a gradient is also that at 0
        used = some.transpose(0, 1).flatten(1).any(1)[:n].nonzero()[:, 0]
        activations, directions = self.activations[..., used], self.directions[used]
        made = []
        for weight in weights.unbind(2):
            # set x part, and for spans x example x position: the parts' axis goes last.
            own = weight[:, used, None, None] if span is None else weight[:, used][..., span]
            moved = (activations * own.movedim(1, -1)) @ directions
            if self.rest is not None:
                left = weight[:, n, None, None] if span is None else weight[:, n][..., span]
                moved = moved + self.rest * left[..., None]
            made.append(moved)
        return torch.stack(made, 1)
