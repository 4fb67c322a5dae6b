"""Small modules of a person's own, each with something unusual in how it computes or what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

N_TOKENS, CONTEXT = 11, 8


class UNet(nn.Module):
    """An encoder and a decoder with skips, strided and transposed convolutions, a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Sequential(
            nn.Conv2d(6, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True)
        )
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(10, 8, 2, 2)
        self.join = nn.Sequential(
            nn.Conv2d(16, 6, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)
        )
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        down = self.down(first)
        up = self.join(torch.cat([self.up(self.deep(down)), down], 1))
        return self.head(torch.cat([up, first], 1)).mean((2, 3))


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it, normalised before it is convolved (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6 + 4 * i) for i in range(3)])
        self.layers = nn.ModuleList([nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3)])
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            seen.append(layer(F.relu(norm(torch.cat(seen, 1)))))
        return self.head(F.adaptive_avg_pool2d(torch.cat(seen, 1), 1).flatten(1))


class Shared(nn.Module):
    """One convolution that is called twice, with a sum around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = x + torch.relu(self.block(x))
        return self.head(x.mean((2, 3)))


class Functions(nn.Module):
    """Parameters without modules: functional convolutions and norms, and a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(8, 3, 3, 3))
        self.second = nn.Parameter(torch.empty(8, 8, 3, 3))
        self.gate = nn.Parameter(torch.empty(8, 8))
        self.head = nn.Parameter(torch.empty(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first, stride=2))
        x = F.group_norm(F.conv2d(x, self.second, padding=1), 4)
        x = x * torch.sigmoid(F.linear(x.mean((2, 3)), self.gate))[..., None, None]
        return F.linear(F.max_pool2d(x, 3).flatten(2).mean(2), self.head)


class RowReader(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3 * 16, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 1, 3).flatten(2)
        return self.head(self.lstm(rows)[0][:, -1])


class Mixer(nn.Module):
    """Patches as tokens; linear layers over positions and over channels in turn, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.positions = nn.Linear(16, 16)
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + F.gelu(self.positions(self.norm(x).transpose(1, 2))).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class Branches(nn.Module):
    """Two branches that are multiplied, chunks, a gate, and a dictionary with a nested tuple as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.left, self.right = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
        self.glu = nn.Sequential(nn.Conv2d(6, 12, 1), nn.GLU(1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        one, two = self.stem(x).chunk(2, 1)
        x = self.left(one).tanh_() * self.right(two)
        x = self.glu(x).amax((2, 3))
        return {"logits": self.head(x), "hidden": (one, [two])}


class Fourier(nn.Module):
    """Filters in the frequency domain (GFNet), so that complex tensors lie between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.filter = nn.Parameter(torch.empty(6, 8, 5, 2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.fft.irfft2(
            torch.fft.rfft2(x) * torch.view_as_complex(self.filter), s=x.shape[-2:]
        )
        return self.head(torch.relu(x).mean((2, 3)))


class Circular(nn.Module):
    """Convolutions that wrap around, whose weights are computed from a direction and a length."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"))
        self.second = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.head = weight_norm(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.second(F.elu(self.first(x)))).mean((2, 3)))


class Waves(nn.Sequential):
    """Convolutions over time, of two signals that come as an image of one row each."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(2),
            nn.Conv1d(2, 6, 5), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 8, 3, groups=2),
            nn.Hardswish(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip


class Sequence(nn.Module):
    """A transformer of torch's own with positions in front of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(N_TOKENS, 8), nn.Parameter(torch.empty(CONTEXT, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, N_TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.T) + self.place[: tokens.shape[1]]
        return self.head(self.encoder(x)).transpose(0, 1)


class Written(nn.Module):
    """One layer of attention with a fused projection, the softmax written out (nanoGPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(N_TOKENS, 8), nn.Embedding(CONTEXT, 8)
        self.norm, self.fused, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, N_TOKENS, bias=False)
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).tril() == 0)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length = tokens.shape
        x = self.embed(tokens) + self.place(torch.arange(length))
        q, k, v = (
            t.view(n, length, 2, 4).transpose(1, 2) for t in self.fused(self.norm(x)).split(8, 2)
        )
        scores = (q @ k.mT / 2).masked_fill(self.mask[:length, :length], float("-inf"))  # type: ignore[index]
        z = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, 8)
        return self.head(x + self.out(z))


class Recurrent(nn.Module):
    """A gated recurrent network over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(N_TOKENS, 6), nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, N_TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(tokens))[0])


MODULES: dict[str, tuple[type[nn.Module], tuple[int, ...] | None]] = {
    "unet": (UNet, (3, 16, 16)),
    "dense": (Dense, (3, 16, 16)),
    "shared": (Shared, (3, 16, 16)),
    "functions": (Functions, (3, 16, 16)),
    "row-reader": (RowReader, (3, 16, 16)),
    "mixer": (Mixer, (3, 16, 16)),
    "branches": (Branches, (3, 16, 16)),
    "fourier": (Fourier, (3, 16, 16)),
    "circular": (Circular, (3, 16, 16)),
    "waves": (Waves, (2, 1, 24)),
    "sequence-first": (Sequence, None),
    "written-out": (Written, None),
    "recurrent": (Recurrent, None),
}
"""By name: the class, and the shape of its input (None: it takes tokens)."""
