"""Kinds of drawings, and which of them units prefer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.kinds import HUES, KINDS, Kind, draw_kind, hue_colour
from circuits.tuning import preferences

SIZE = 32


@pytest.mark.parametrize("kind", KINDS)
def test_drawings_are_turned_by_their_angles(kind: Kind) -> None:
    drawn = draw_kind(kind, SIZE)
    assert len(drawn.images) == len(drawn.angles) == len(drawn.looks)
    assert drawn.images.min() >= 0
    assert drawn.images.max() <= 1
    # a quarter of a turn, counter-clockwise; textures are noise, and drawn anew at each angle
    at = {
        (look, float(a)): k
        for k, (look, a) in enumerate(zip(drawn.looks, drawn.angles, strict=True))
    }
    if drawn.period and kind != "high-low frequency edge":
        for (look, angle), k in at.items():
            other = at[look, (angle + 90) % drawn.period]
            turned = drawn.images[k].rot90(1, (1, 2))
            # a line is an arc of radius 1e5, which float32 places to within a hundredth of a pixel
            torch.testing.assert_close(drawn.images[other], turned, atol=0.02, rtol=0)
    else:
        assert drawn.period in (0, 360)
        assert bool(drawn.angles.isnan().all()) == (drawn.period == 0)


def test_angles_are_where_the_docstring_says() -> None:
    edge = draw_kind("edge", SIZE)
    right = edge.images[edge.angles == 0.0][0]
    assert right[0, SIZE // 2, -1] > right[0, SIZE // 2, 0]  # lighter on the side of 0 degrees
    end = draw_kind("line end", SIZE)
    up = end.images[(end.angles == 90.0) & torch.tensor([v == "dark, thick" for v in end.looks])][0]
    assert up[0, SIZE - 1, SIZE // 2] < 0.1  # it comes from below
    assert up[0, 0, SIZE // 2] == 1  # and ends in the middle
    both = draw_kind("high-low frequency edge", 64)
    one = both.images[both.angles == 0.0][0, 0]
    rough = (one[:, 1:] - one[:, :-1]).abs()
    assert rough[:, 40:].mean() > 1.5 * rough[:, :24].mean()  # finer at 0 degrees


def test_hues_are_as_bright_as_grey_and_opposed() -> None:
    luminance = torch.tensor([0.299, 0.587, 0.114])
    for k, hue in enumerate(HUES):
        one, other = (torch.tensor(hue_colour(h)) for h in (hue, HUES[(k + 3) % 6]))
        torch.testing.assert_close((one * luminance).sum(), torch.tensor(0.5))
        torch.testing.assert_close(one - 0.5, 0.5 - other)
    with pytest.raises(ValueError, match="hue 'brown' is not one of red, yellow"):
        hue_colour("brown")


def test_replicates_differ_but_little() -> None:
    plain, other = draw_kind("line", SIZE), draw_kind("line", SIZE, 3)
    assert not torch.equal(plain.images, other.images)
    assert torch.equal(other.images, draw_kind("line", SIZE, 3).images)
    assert 0.55 < other.images.max() - other.images.min() < 0.85


def test_what_is_too_small_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="size 8 must be at least 16"):
        draw_kind("line", 8)


class Templates(nn.Module):
    """Units whose weights are a drawing each: a line, half a line, an edge of two colours; and one that is silent."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Conv2d(3, 4, SIZE - 1, padding=SIZE // 2 - 1)
        self.act = nn.ReLU6()
        looks = (
            ("line", "dark, thick", 45.0),
            ("line end", "dark, thick", 90.0),
            ("colour edge", "red and cyan", 0.0),
        )
        with torch.no_grad():
            self.pre.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
            for u, (kind, look, angle) in enumerate(looks):
                drawn = draw_kind(kind, SIZE - 1)  # pyright: ignore[reportArgumentType]
                k = [v == look for v in drawn.looks].index(True)
                k += int((drawn.angles[k:] == angle).nonzero()[0])
                image = drawn.images[k] - drawn.images[k].mean((1, 2), keepdim=True)
                self.pre.weight[u] = image / image.norm() ** 2
            self.pre.weight[3], self.pre.bias[3] = 0, -1  # pyright: ignore[reportOptionalSubscript]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.pre(x))


def test_units_that_are_drawings_prefer_them() -> None:
    model = HookedModel(Templates(), ImageInput(3, SIZE, SIZE), "templates")
    found = preferences(model, "pre", size=SIZE - 1, least=1.0)
    assert [p.kind for p in found[:3]] == ["line", "line end", "colour edge"]
    assert [p.angle for p in found[:3]] == [45.0, 90.0, 0.0]
    assert found[2].holds
    assert found[2].p_value < 0.05
    assert found[2].look == "red and cyan"
    assert int(found[2].curve.argmax()) == 0
    assert found[2].angles.tolist() == sorted(found[2].angles.tolist())
    silent = found[3]
    assert not silent.holds
    assert silent.peak < 0


def test_too_few_replicates_are_refused() -> None:
    model = HookedModel(Templates(), ImageInput(3, SIZE, SIZE), "templates")
    with pytest.raises(ValueError, match="replicates 4 must be at least 5"):
        preferences(model, "pre", replicates=4)
    with pytest.raises(ValueError, match="level 2 must be between 0 and 1"):
        preferences(model, "pre", level=2)
