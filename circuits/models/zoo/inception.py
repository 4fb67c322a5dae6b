"""Inception-style networks built from a table, in which every tensor of interest is the output of a named module.

Names follow lucid: `conv2d0` … for the stem, `mixed3a` for a block's concatenated output, `mixed3a_5x5` for a
branch, `mixed3a_5x5_bottleneck` for the 1x1 convolution before it, and `…_pre_relu` for each convolution before
its nonlinearity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conv:
    """A convolution and its ReLU: output channels, kernel size, stride ("same" padding)."""

    name: str
    channels: int
    kernel: int
    stride: int = 1


@dataclass(frozen=True)
class Pool:
    """A 3x3 max pool; as in Caffe, the size of its output is rounded up (`ceil`)."""

    name: str
    stride: int = 2
    ceil: bool = True


@dataclass(frozen=True)
class Norm:
    """Local response normalisation over five channels (Krizhevsky et al. 2012, section 3.3)."""

    name: str


@dataclass(frozen=True)
class Mixed:
    """An inception block (Szegedy et al. 2015, figure 2b): the channels of its six convolutions."""

    name: str
    conv1: int
    reduce3: int
    conv3: int
    reduce5: int
    conv5: int
    pool: int


Layer = Conv | Pool | Norm | Mixed


class Concatenate(nn.Module):
    """Concatenates the branches of a block; a module of its own, so that the block's output is a site."""

    def forward(self, *branches: Tensor) -> Tensor:
        """Concatenate `branches`, each batch x channel x y x x, along channels."""
        return torch.cat(branches, dim=1)


class InceptionNet(nn.Module):
    """A chain of layers, a global average pool and a linear classifier.

    Args:
        layers: the chain, in order.
        in_channels: channels of the input.
        n_classes: outputs of the classifier.
        pool_name: name of the global average pool.
        logits_name: name of the classifier.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        in_channels: int,
        n_classes: int,
        pool_name: str = "avgpool",
        logits_name: str = "logits",
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        channels = in_channels
        for layer in self.layers:
            channels = self._add(layer, channels)
        self.pool_name, self.logits_name = pool_name, logits_name
        self.add_module(pool_name, nn.AdaptiveAvgPool2d(1))
        self.add_module(logits_name, nn.Linear(channels, n_classes))

    def _add(self, layer: Layer, channels: int) -> int:
        """Register a layer's modules; return the number of its output channels."""
        match layer:
            case Conv(name, out, kernel, stride):
                return self._add_conv(name, channels, out, kernel, stride)
            case Pool(name, stride, ceil):
                # With stride 1 the map keeps its size; with stride 2 it is padded by the rounding alone.
                pad = 1 if stride == 1 else 0
                self.add_module(name, nn.MaxPool2d(3, stride, pad, ceil_mode=ceil))
                return channels
            case Norm(name):
                # The constants of Caffe's GoogLeNet; as there, torch divides alpha by the size.
                self.add_module(name, nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0))
                return channels
            case Mixed():
                return self._add_mixed(layer, channels)

    def _add_conv(self, name: str, channels: int, out: int, kernel: int, stride: int = 1) -> int:
        conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2)
        self.add_module(f"{name}_pre_relu", conv)
        self.add_module(name, nn.ReLU())
        return out

    def _add_mixed(self, block: Mixed, channels: int) -> int:
        n = block.name
        out = self._add_conv(f"{n}_1x1", channels, block.conv1, 1)
        self._add_conv(f"{n}_3x3_bottleneck", channels, block.reduce3, 1)
        out += self._add_conv(f"{n}_3x3", block.reduce3, block.conv3, 3)
        self._add_conv(f"{n}_5x5_bottleneck", channels, block.reduce5, 1)
        out += self._add_conv(f"{n}_5x5", block.reduce5, block.conv5, 5)
        self.add_module(f"{n}_pool", nn.MaxPool2d(3, 1, 1, ceil_mode=True))
        out += self._add_conv(f"{n}_pool_reduce", channels, block.pool, 1)
        self.add_module(n, Concatenate())
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map images, batch x channel x y x x, to logits, batch x class."""
        for layer in self.layers:
            x = self._run(layer, x)
        x = self.get_submodule(self.pool_name)(x).flatten(1)
        return self.get_submodule(self.logits_name)(x)

    def _run(self, layer: Layer, x: Tensor) -> Tensor:
        match layer:
            case Conv(name):
                return self._conv(name, x)
            case Pool(name) | Norm(name):
                return self.get_submodule(name)(x)
            case Mixed(name):
                branches = (
                    self._conv(f"{name}_1x1", x),
                    self._conv(f"{name}_3x3", self._conv(f"{name}_3x3_bottleneck", x)),
                    self._conv(f"{name}_5x5", self._conv(f"{name}_5x5_bottleneck", x)),
                    self._conv(f"{name}_pool_reduce", self.get_submodule(f"{name}_pool")(x)),
                )
                return self.get_submodule(name)(*branches)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(self.get_submodule(f"{name}_pre_relu")(x))


GOOGLENET = (
    Conv("conv2d0", 64, 7, 2),
    Pool("maxpool0"),
    Norm("localresponsenorm0"),
    Conv("conv2d1", 64, 1),
    Conv("conv2d2", 192, 3),
    Norm("localresponsenorm1"),
    Pool("maxpool1"),
    Mixed("mixed3a", 64, 96, 128, 16, 32, 32),
    Mixed("mixed3b", 128, 128, 192, 32, 96, 64),
    Pool("maxpool4"),
    Mixed("mixed4a", 192, 96, 208, 16, 48, 64),
    Mixed("mixed4b", 160, 112, 224, 24, 64, 64),
    Mixed("mixed4c", 128, 128, 256, 24, 64, 64),
    Mixed("mixed4d", 112, 144, 288, 32, 64, 64),
    Mixed("mixed4e", 256, 160, 320, 32, 128, 128),
    Pool("maxpool10"),
    Mixed("mixed5a", 256, 160, 320, 32, 128, 128),
    Mixed("mixed5b", 384, 192, 384, 48, 128, 128),
)
"""GoogLeNet (Szegedy et al. 2015, table 1), with the names that lucid gives to InceptionV1."""

SHAPES = (
    Conv("conv2d0", 32, 7, 2),
    Conv("conv2d1", 32, 1),
    Conv("conv2d2", 64, 3),
    Pool("maxpool0"),
    Mixed("mixed3a", 32, 48, 64, 24, 48, 16),
    Mixed("mixed3b", 64, 64, 96, 32, 64, 32),
)
"""The small built-in network trained on drawings."""


def googlenet() -> InceptionNet:
    """GoogLeNet without its auxiliary classifiers; input 224 x 224, 1000 classes."""
    return InceptionNet(GOOGLENET, 3, 1000, logits_name="softmax2_pre_activation")


def shapes(n_classes: int = 40) -> InceptionNet:
    """The architecture of the built-in model `shapes`, with random weights; input 64 x 64."""
    return InceptionNet(SHAPES, 3, n_classes)
