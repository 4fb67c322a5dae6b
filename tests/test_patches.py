"""Which tokens of vision transformers are patches, and what the others are."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from circuits import HookedModel
from circuits.models.paths.patches import token_map
from tests.conftest import seeded
from tests.vision_transformer import VisionTransformer


@pytest.mark.parametrize(("registers", "last"), [(0, False), (2, False), (1, True)])
@pytest.mark.parametrize("read", ["class", "mean"])
def test_patches_class_token_and_registers(
    read: Literal["class", "mean"], registers: int, last: bool
) -> None:
    model = HookedModel(
        seeded(VisionTransformer(read, registers, last)), VisionTransformer.input_shape
    )
    named = ["class token", *(["register"] if registers == 1 else ["register 1", "register 2"])]
    start, more = (0, 12) if last else (1 + registers, 0)
    for site in ("blocks.0.attn.hook_v", "blocks.1.attn.hook_z"):
        found = token_map(model, model.site(site))
        assert found.patches == "patches"
        assert found.places.tolist() == torch.arange(12).add(start).reshape(3, 4).tolist()
        assert found.others == {more + i: named[i] for i in range(1 + registers)}
        assert (found.n, found.window) == (13 + registers, None)
    assert found.name(start + 5) == "patch 1,1"
    assert found.name(more) == "class token"


class Shifted(nn.Module):
    """Attention in windows of 2 x 2 of 4 x 4 patches, shifted by one, with patches merged before it if asked."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.patches = nn.Conv2d(3, 4, 2, 2)
        self.norm, self.merge = nn.LayerNorm(4), nn.Linear(16, 4)
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        n, _, side, _ = x.shape
        x = self.norm(x.flatten(2).transpose(1, 2))
        if self.merged:
            x = x.reshape(n, side // 2, 2, side // 2, 2, 4).permute(0, 1, 3, 2, 4, 5)
            x, side = self.merge(x.reshape(n, -1, 16)), side // 2
        x = x.reshape(n, side, side, 4).roll((-1, -1), (1, 2))
        x = x.reshape(n, side // 2, 2, side // 2, 2, 4).transpose(2, 3).reshape(-1, 4, 4)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        pattern = (q @ k.transpose(-1, -2)).softmax(-1)
        x = self.out((pattern @ v).transpose(1, 2).reshape(-1, 4, 4))
        return self.head(x.reshape(n, -1, 4).mean(1))


@pytest.mark.parametrize("merged", [False, True])
def test_places_of_shifted_windows(merged: bool) -> None:
    side = 8 if merged else 4
    model = HookedModel(seeded(Shifted(merged)), (3, 2 * side, 2 * side))
    found = token_map(model, model.site("blocks.0.attn.hook_z"))
    expected = torch.zeros(4, 4, dtype=torch.long)
    for y in range(4):
        for x in range(4):
            a, b = (y - 1) % 4, (x - 1) % 4
            expected[y, x] = 4 * (a // 2 * 2 + b // 2) + a % 2 * 2 + b % 2
    if merged:
        expected = expected.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(found.places, expected)
    assert (found.n, found.window, found.others) == (16, 4, {})


def test_what_cannot_be_followed_is_refused(bridge: HookedModel) -> None:
    class Mixed(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks((x + x.roll(1, 1)) / 2)).mean(1))

    model = HookedModel(seeded(Mixed()), VisionTransformer.input_shape)
    for _ in range(2):  # found, and remembered
        with pytest.raises(ValueError, match="the patches of patches cannot be followed to its to"):
            token_map(model, model.site("blocks.0.attn.hook_v"))
    with pytest.raises(ValueError, match=r"site patches has no axis of tokens"):
        token_map(model, model.site("patches"))
    with pytest.raises(ValueError, match="takes tokens: they are no patches of an image"):
        token_map(bridge, bridge.site("blocks.0.attn.hook_v"))


def test_a_token_of_another_name_is_called_by_it() -> None:
    class Prompted(VisionTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.cls = self.cls, None

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
            x = self.stream(torch.cat([self.prompt.expand(len(x), -1, -1), x], 1))
            return self.head(self.norm(self.blocks(x)[:, 0]))

    model = HookedModel(seeded(Prompted()), VisionTransformer.input_shape)
    assert token_map(model, model.site("blocks.0.attn.hook_v")).others == {0: "`prompt`"}
