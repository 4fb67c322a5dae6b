"""EfficientNet-Lite: MobileNet's inverted bottlenecks without squeeze and excitation, with ReLU6 (Tan and Le 2019).

The architecture is that of section 4 and table 1 of the paper, in the "lite" variants that were published for devices:
no squeeze and excitation, ReLU6 in the place of swish, and a stem, a head, a first and a last stage that are never made
wider or deeper.

Each tensor of interest is the output of a named module. Blocks are named by stage and place, `block2b` being the second
block of the second stage. A block has up to four sites with units and one in a basis that is not privileged:

- `block2b_expand_pre_relu`, `block2b_expand`: the 1x1 convolution that makes the map six times as wide, before and
  after its ReLU6; the first stage has none.
- `block2b_depthwise_pre_relu`, `block2b_depthwise`: one kernel for each channel, before and after its ReLU6.
- `block2b_project`: the 1x1 convolution back to a narrow map, without a nonlinearity: what the block adds.
- `block2b`: the sum of what the block adds and what it was given. Where the number of channels or the size of the map
  changes, nothing is added up, and `block2a` is another name for `block2a_project`.

Batch norm is folded into the convolutions when weights are loaded (`folded`), so that the weights that are read and
edited are those that the network computes with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-3
"""What batch norm adds to the variance, as in the published training code; torch's own default is 1e-5."""


@dataclass(frozen=True)
class Variant:
    """One of the published networks.

    Attributes:
        width: what the numbers of channels of Lite0 are multiplied by.
        depth: what the numbers of blocks of Lite0 are multiplied by.
        size: height and width of its input, in pixels.
    """

    width: float
    depth: float
    size: int


VARIANTS = {
    "efficientnet-lite0": Variant(1.0, 1.0, 224),
    "efficientnet-lite1": Variant(1.0, 1.1, 240),
    "efficientnet-lite2": Variant(1.1, 1.2, 260),
    "efficientnet-lite3": Variant(1.2, 1.4, 280),
    "efficientnet-lite4": Variant(1.4, 1.8, 300),
}
"""The published networks by name."""

STEM, HEAD = 32, 1280


@dataclass(frozen=True)
class Stage:
    """Blocks of one width.

    Attributes:
        expand: how many times as wide as its input a block's inside is.
        channels: of the blocks' outputs.
        blocks: how many there are.
        stride: of the first block; that of the others is 1.
        kernel: height and width of the depthwise kernels.
    """

    expand: int
    channels: int
    blocks: int
    stride: int
    kernel: int


STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)
"""The stages of Lite0 (table 1 of the paper, without its first and last row)."""


@dataclass(frozen=True)
class Block:
    """One inverted bottleneck: its name, channels on the way in and out, and as `Stage` has them."""

    name: str
    reads: int
    channels: int
    expand: int
    stride: int
    kernel: int

    @property
    def wide(self) -> int:
        """The number of channels inside the block."""
        return self.reads * self.expand

    @property
    def adds(self) -> bool:
        """Whether the block's input is added to what it computes."""
        return self.stride == 1 and self.reads == self.channels


def blocks(variant: Variant) -> tuple[Block, ...]:
    """The blocks of a network in order."""
    found, reads = [], STEM
    for s, stage in enumerate(STAGES, 1):
        channels = _rounded(stage.channels * variant.width)
        # The first and the last stage are never repeated more often.
        n = stage.blocks if s in (1, len(STAGES)) else math.ceil(stage.blocks * variant.depth)
        for b in range(n):
            name = f"block{s}{chr(ord('a') + b)}"
            stride = stage.stride if b == 0 else 1
            found.append(Block(name, reads, channels, stage.expand, stride, stage.kernel))
            reads = channels
    return tuple(found)


def _rounded(channels: float) -> int:
    """The multiple of 8 that is nearest, or the next one if that is more than a tenth too small."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class SameConv2d(nn.Conv2d):
    """A convolution whose output has `ceil(size / stride)` places, as TensorFlow's "SAME" padding has it.

    With stride 2, a map of even size is padded by one place less in front than behind: 0 and 1 for a kernel of 3.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a map, batch x channel x y x x."""
        (top, bottom), (left, right) = (self._pads(input.shape[d], d - 2) for d in (2, 3))
        if top == bottom and left == right:
            return F.conv2d(
                input, self.weight, self.bias, self.stride, (top, left), groups=self.groups
            )
        padded = F.pad(input, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)

    def _pads(self, size: int, axis: int) -> tuple[int, int]:
        """How many zeros are put in front of and behind an axis."""
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class Add(nn.Module):
    """Adds what a block computes to what it was given; a module of its own, so that the sum is a site."""

    def forward(self, given: Tensor, computed: Tensor) -> Tensor:
        """Add two maps, batch x channel x y x x."""
        return given + computed


class EfficientNetLite(nn.Module):
    """A network with random weights, without batch norm, which is folded into trained ones.

    Args:
        variant: which one.
        n_classes: outputs of the classifier.
    """

    def __init__(self, variant: Variant, n_classes: int = 1000) -> None:
        super().__init__()
        self.blocks = blocks(variant)
        self._add_conv("stem", 3, STEM, 3, 2)
        for block in self.blocks:
            self._add_block(block)
        self._add_conv("head", self.blocks[-1].channels, HEAD, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.logits = nn.Linear(HEAD, n_classes)

    def _add_conv(
        self, name: str, reads: int, out: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        self.add_module(f"{name}_pre_relu", SameConv2d(reads, out, kernel, stride, groups=groups))
        self.add_module(name, nn.ReLU6())

    def _add_block(self, block: Block) -> None:
        name, wide = block.name, block.wide
        if block.expand > 1:
            self._add_conv(f"{name}_expand", block.reads, wide, 1)
        self._add_conv(f"{name}_depthwise", wide, wide, block.kernel, block.stride, wide)
        self.add_module(f"{name}_project", SameConv2d(wide, block.channels, 1))
        if block.adds:
            self.add_module(name, Add())

    def forward(self, x: Tensor) -> Tensor:
        """Map images, batch x 3 x y x x, to logits, batch x class."""
        x = self._conv("stem", x)
        for block in self.blocks:
            x = self._block(block, x)
        return self.logits(self.avgpool(self._conv("head", x)).flatten(1))

    def _block(self, block: Block, x: Tensor) -> Tensor:
        inside = self._conv(f"{block.name}_expand", x) if block.expand > 1 else x
        inside = self._conv(f"{block.name}_depthwise", inside)
        computed = self.get_submodule(f"{block.name}_project")(inside)
        return self.get_submodule(block.name)(x, computed) if block.adds else computed

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(self.get_submodule(f"{name}_pre_relu")(x))


def stream_names(variant: Variant) -> dict[str, str]:
    """Other names of sites: `block2a` for what `block2a_project` puts out, where nothing is added to it."""
    return {b.name: f"{b.name}_project" for b in blocks(variant) if not b.adds}


# --- published weights ---------------------------------------------------------------------------

_CONVS = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
"""The convolutions of a block, as published, with the batch norm behind each."""
_OWN = ("expand_pre_relu", "depthwise_pre_relu", "project")
"""What the same convolutions are called here."""


def published_variant(tensors: Mapping[str, Tensor]) -> str:
    """The name of the network that a published state dict belongs to, by its number of blocks and their widths.

    Raises:
        ValueError: if it is of no EfficientNet-Lite, or of one that is known to compute in another way.
    """
    if not {"_conv_stem.weight", "_fc.weight", "_fc.bias"} <= set(tensors):
        raise ValueError(_other_implementation(tensors))
    if any("._se_" in key for key in tensors):
        raise ValueError("have squeeze and excitation: they are of an EfficientNet that is no Lite")
    projects = [
        len(tensors[key]) if tensors[key].ndim else 0
        for b in range(len(tensors))
        if (key := f"_blocks.{b}._project_conv.weight") in tensors
    ]
    for name, variant in VARIANTS.items():
        if projects == [block.channels for block in blocks(variant)]:
            return name
    widths = ", ".join(map(str, projects)) or "no"
    raise ValueError(
        f"have {len(projects)} blocks with {widths} channels, as no EfficientNet-Lite has: expected those of "
        f"{', '.join(VARIANTS)}"
    )


def _other_implementation(tensors: Mapping[str, Tensor]) -> str:
    """Why weights with names of another kind are not taken: a file does not say how its network pads its maps."""
    if "conv_stem.weight" in tensors:
        return (
            "have timm's names, which networks with other padding and another epsilon have too: load them as "
            "timm:tf_efficientnet_lite0, or as the timm model that they are of"
        )
    if "stem.0.weight" in tensors:
        return (
            "have the names of a version that was trained with symmetric padding and computes something else: load "
            "them with the code that they were published with, as FILE.py:FUNCTION"
        )
    return "lack '_conv_stem.weight': expected the state dict of an EfficientNet-Lite"


def folded(tensors: Mapping[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Published weights under the names of `EfficientNetLite`, with batch norm folded into the convolutions.

    A weight is multiplied by `gain / sqrt(variance + 1e-3)`; the bias is `shift - mean * gain / sqrt(variance + 1e-3)`.
    Both are computed in float64.

    Args:
        tensors: a published state dict.
        variant: the network that it is expected to be of.

    Raises:
        KeyError: if a tensor is missing.
        ValueError: if it is not of that network, or has tensors that the network has not.
    """
    if (found := published_variant(tensors)) != variant:
        raise ValueError(f"are those of {found}, not of {variant}: load them as {found}")
    names = {"_conv_stem": ("stem_pre_relu", "_bn0"), "_conv_head": ("head_pre_relu", "_bn1")}
    for b, block in enumerate(blocks(VARIANTS[variant])):
        for (conv, norm), own in zip(_CONVS.items(), _OWN, strict=True):
            if own != "expand_pre_relu" or block.expand > 1:
                names[f"_blocks.{b}.{conv}"] = f"{block.name}_{own}", f"_blocks.{b}.{norm}"
    rest, made = dict(tensors), {}
    shapes = {
        k: tuple(v.shape) for k, v in EfficientNetLite(VARIANTS[variant]).state_dict().items()
    }
    for conv, (own, norm) in names.items():
        weight = _numbers(rest, f"{conv}.weight", shapes[f"{own}.weight"])
        gain, shift, mean, var = (
            _numbers(rest, f"{norm}.{k}", shapes[f"{own}.bias"])
            for k in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / torch.sqrt(var + EPSILON)
        made[f"{own}.weight"] = (weight * factor[:, None, None, None]).float()
        made[f"{own}.bias"] = (shift - mean * factor).float()
    classes = len(tensors["_fc.bias"]) if tensors["_fc.bias"].ndim == 1 else 0
    for key, shape in (("weight", (max(classes, 1), HEAD)), ("bias", (max(classes, 1),))):
        made[f"logits.{key}"] = _numbers(rest, f"_fc.{key}", shape).float()
    if unknown := sorted(key for key in rest if not key.endswith("num_batches_tracked")):
        raise ValueError(f"have {len(unknown)} unknown tensors, the first of them {unknown[0]!r}")
    return made


def _numbers(rest: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Take a tensor out of a state dict, in float64, after it was checked."""
    tensor = rest.pop(key)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"have a tensor {key!r} of shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"have a tensor {key!r} of type {kind}, expected float32")
    return tensor.double()
