"""A small vision transformer in plain torch, with a class token, registers and position embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm block of attention and a ReLU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = (
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width),
        )
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        pattern = (q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5).softmax(-1)
        x = x + self.proj((pattern @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Two blocks over 3 x 4 patches.

    Args:
        read: what the head reads: the class token, or the mean of all tokens.
        registers: tokens between the class token and the patches.
        last: whether class token and registers come after the patches.
    """

    input_shape = (3, 12, 16)

    def __init__(
        self, read: Literal["class", "mean"] = "class", registers: int = 0, last: bool = False
    ) -> None:
        super().__init__()
        self.read, self.last = read, last
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.registers = nn.Parameter(torch.randn(1, registers, 8))
        self.positions = nn.Parameter(torch.randn(1, 12, 8))
        self.stream = nn.Identity()
        self.blocks = nn.Sequential(Block(8, 2), Block(8, 2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        more = [self.cls.expand(len(x), -1, -1), self.registers.expand(len(x), -1, -1)]
        x = torch.cat([x, *more] if self.last else [*more, x], 1)
        x = self.norm(self.blocks(self.stream(x)))
        if self.read == "mean":
            return self.head(x.mean(1))
        return self.head(x[:, 12 if self.last else 0])
