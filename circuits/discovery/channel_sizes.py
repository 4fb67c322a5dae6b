"""How large what an edge between channels carries is, from weights alone and on given images.

Both are sizes of one linear map, from a source channel to what a target channel is given, summed over all paths between
the two, so that a shortcut and the kernel that it goes round add up or cancel. Max pooling on the way counts as passing
on one number of each window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.models.paths.channels import ChannelFlow, ChannelPath, Layer, followed

_NUMBERS = 2**23
"""About how many numbers are computed at once."""


@dataclass(frozen=True, eq=False)
class CarriedMaps:
    """What single channels of one source add to what a target is given.

    Attributes:
        paths: the paths between the two.
        shape: the source's shape for one image, channels first.
    """

    paths: tuple[ChannelPath, ...]
    shape: tuple[int, ...]

    @classmethod
    def between(cls, flow: ChannelFlow, paths: Sequence[ChannelPath]) -> CarriedMaps:
        """The maps of paths that start from one source and end at one target."""
        return cls(tuple(paths), tuple(flow.shape(paths[0].source)[1:]))

    # --- on images -------------------------------------------------------------------------------

    def sizes(
        self, change: Float[Tensor, "example source *place"], channels: Sequence[int]
    ) -> Float[Tensor, "example target chosen"]:
        """The root mean square, over positions, of what some channels of the source add to each target channel.

        Args:
            change: what the source puts out.
            channels: which of its channels.
        """
        found = []
        reached = [(path, _reaching(path, change)) for path in self.paths]
        for channel in channels:
            total: Tensor | None = None
            for path, given in reached:
                added = self._added(path, given, channel)
                total = added if total is None else total + added
            assert total is not None, "there are paths"
            found.append(total.reshape(*total.shape[:2], -1).square().mean(-1).sqrt())
        return torch.stack(found, 2)

    def _added(self, path: ChannelPath, given: Tensor, channel: int) -> Tensor:
        """What one channel adds to each channel of the target along a path: example x target x positions."""
        own = (followed(path.before, self.shape[0]) == channel).nonzero()[:, 0]
        if path.layer is None:
            alone = torch.zeros_like(given)
            alone[:, own] = given[:, own]
            return alone
        weight = dense(path.layer)[:, own].to(given)
        return path.ended(path.layer.apply(given[:, own], weight, 1))

    # --- from weights alone ----------------------------------------------------------------------

    def norms(self, targets: Sequence[int]) -> Float[Tensor, "target source"]:
        """The norm of the weights with which the middle of some target channels reads the map of each source channel.

        Args:
            targets: which channels of the target.
        """
        found, largest = [], max(map(self._numbers, self.paths))
        for some in torch.tensor(targets).split(max(1, _NUMBERS // largest)):
            zeros = torch.zeros(len(some), *self.shape, dtype=torch.float64)
            with recording_gradients():
                image = zeros.requires_grad_()
                total = torch.stack([_middle(self._read(p, image, some)) for p in self.paths]).sum()
                (weights,) = torch.autograd.grad(total, image)
            found.append(weights.reshape(*weights.shape[:2], -1).square().sum(-1).sqrt())
        return torch.cat(found)

    def _numbers(self, path: ChannelPath) -> int:
        """The most numbers that `_read` makes for one target channel."""
        size = torch.Size(self.shape).numel()
        return (
            size if path.layer is None else size * max(1, len(path.layer.weight) // self.shape[0])
        )

    def _read(
        self,
        path: ChannelPath,
        image: Float[Tensor, "target source *place"],
        some: Int[Tensor, " target"],
    ) -> Float[Tensor, "target *pos"]:
        """What each of some target channels is given, each by an image of its own."""
        given, rows = path.pooled(image), torch.arange(len(some))
        if path.layer is None:
            return given[rows, some]
        out = followed(path.after, len(path.layer.weight))[some]
        weight = dense(path.layer).to(given)[out.clamp_min(0)] * (out >= 0).reshape(
            -1, *(1,) * (path.layer.weight.ndim - 1)
        )
        made = path.layer.apply(given.flatten(0, 1)[None], weight, len(some))[0]
        if not path.after:
            return made
        whole = made.new_zeros(len(some), len(path.layer.weight), *made.shape[1:])
        whole = whole.index_put((rows, out.clamp_min(0)), made)
        return path.ended(whole)[rows, some]


def _reaching(path: ChannelPath, change: Tensor) -> Tensor:
    """What a change of the source makes of what reaches the layer of a path."""
    return path.pooled(change) - path.pooled(torch.zeros_like(change))


def _middle(value: Float[Tensor, "target *pos"]) -> Float[Tensor, " target"]:
    return value[(slice(None), *(n // 2 for n in value.shape[1:]))]


def dense(layer: Layer) -> Float[Tensor, "channel_out channels *kernel"]:
    """A layer's weights with zeros between the channels of different groups."""
    weight, groups = layer.weight, layer.groups
    if groups == 1:
        return weight
    n, per_in = weight.shape[:2]
    found = weight.new_zeros(n, groups, per_in, *weight.shape[2:])
    rows = torch.arange(n)
    found[rows, rows // (n // groups)] = weight
    return found.flatten(1, 2)
