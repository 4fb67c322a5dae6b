from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from circuits.stimuli.patterns import (
    STRAIGHT,
    angles,
    arcs,
    checkerboards,
    circles,
    contrasts,
    enlarged,
    frequency_edges,
    gratings,
    lines,
    surrounds,
    turned,
)
from circuits.stimuli.tokens import prefixed, repeated, swapped

close = torch.testing.assert_close


def ink_of(image: Tensor) -> float:
    """How much dark there is on white."""
    return float((1 - image[0]).sum())


def test_an_arc_has_the_ink_of_its_length_and_bulges_where_it_says() -> None:
    degrees = torch.arange(0, 360, 30.0)
    drawn = arcs(degrees, 20.0, 96, length=40.0, thickness=3.0)
    for angle, image in zip(degrees.tolist(), drawn, strict=True):
        assert ink_of(image) == pytest.approx(40 * 3 + math.pi * 1.5**2, rel=0.02)
        y, x = torch.meshgrid(torch.arange(96) - 47.5, torch.arange(96) - 47.5, indexing="ij")
        dark = 1 - image[0]
        way = (-float((dark * x).sum()), float((dark * y).sum()))  # from the ink to the middle
        found = math.degrees(math.atan2(way[1], way[0]))
        assert abs((found - angle + 180) % 360 - 180) < 2


def test_turning_an_image_is_drawing_it_turned() -> None:
    first = arcs(torch.tensor([10.0]), 20.0, 64, length=30.0)
    again = arcs(torch.tensor([100.0]), 20.0, 64, length=30.0)
    close(turned(first, 90.0), again, atol=0.02, rtol=0)
    wide = turned(first[..., 8:56, :], 180.0)
    close(wide, first[..., 8:56, :].flip(2, 3), atol=1e-3, rtol=0)
    large = enlarged(circles(torch.tensor([8.0]), 64, filled=True), 2.0)
    close(
        ink_of(large[0]),
        ink_of(circles(torch.tensor([16.0]), 64, filled=True)[0]),
        rtol=0.02,
        atol=0,
    )


def test_a_morph_keeps_length_and_ends_in_an_angle() -> None:
    turn = math.degrees(40 / 20)
    made = arcs(torch.full((3,), 90.0), 20.0, 96, length=40.0, corner=torch.tensor([0.0, 0.5, 1.0]))
    inks = [ink_of(image) for image in made]
    assert max(inks) / min(inks) < 1.05
    close(made[2], angles(torch.tensor([90.0]), 180 - turn, 96, length=40.0)[0], atol=0.25, rtol=0)


def test_straight_arcs_are_lines() -> None:
    close(
        arcs(torch.tensor([90.0]), STRAIGHT, 64, length=30.0),
        lines(torch.tensor([0.0]), 64, length=30.0),
        atol=0.01, rtol=0,
    )  # fmt: skip
    line = lines(torch.tensor([0.0]), 64, length=30.0, thickness=3.0)[0, 0]
    assert (line[31:33, 20:44] < 0.1).all()
    assert (line[:28] > 0.99).all()


def test_colours_fill_and_backgrounds() -> None:
    red = arcs(
        torch.tensor([0.0]), 10.0, 48, filled=True, ink=(1.0, 0.0, 0.0), paper=(0.0, 0.0, 1.0)
    )
    close(red[0, :, 24, 14], torch.tensor([1.0, 0.0, 0.0]))
    close(red[0, :, 2, 2], torch.tensor([0.0, 0.0, 1.0]))
    under = torch.rand(1, 3, 48, 48)
    on = arcs(torch.tensor([0.0]), 10.0, 48, background=under)
    close(on[0, :, 0], under[0, :, 0])
    halves = contrasts(torch.tensor([0.0]), 1.0, 0.0, 32)[0, 0]
    assert halves[:, 17:].min() == 1
    assert halves[:, :15].max() == 0
    spot = surrounds(torch.tensor([6.0]), (1.0, 0.0, 0.0), 0.5, 32)[0]
    close(spot[:, 16, 16], torch.tensor([1.0, 0.0, 0.0]))
    close(spot[:, 0, 0], torch.tensor([0.5, 0.5, 0.5]))


def test_textures_have_their_wavelengths() -> None:
    wave = gratings(torch.tensor([0.0]), 8.0, 64)[0, 0]
    close(wave[8:], wave[:-8], atol=1e-4, rtol=0)
    assert wave.std(dim=1).max() < 1e-5, "stripes run to the right"
    gabor = gratings(torch.tensor([90.0]), 8.0, 64, sigma=6.0, contrast=0.5)[0, 0]
    assert gabor.max() <= 0.75
    close(gabor[0], torch.full((64,), 0.5), atol=1e-3, rtol=0)
    edge = frequency_edges(torch.tensor([0.0]), 4.0, 24.0, 64)[0, 0]
    change = edge.diff(dim=0).abs().mean(0)
    assert change[40:].mean() > 2 * change[:24].mean()
    board = checkerboards(torch.tensor([8.0]), 32)[0, 0]
    close(board.mean(), torch.tensor(0.5), atol=0.02, rtol=0)
    close(board[4, 4], board[12, 12])
    assert board[4, 4] != board[4, 12]


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"^radius -1 must be positive"):
        arcs(torch.tensor([0.0]), -1.0)
    with pytest.raises(ValueError, match=r"corner 2.0 in 0..1"):
        arcs(torch.tensor([0.0]), 5.0, corner=2.0)


def test_tokens_are_swapped_prefixed_and_repeated() -> None:
    tokens = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]])
    assert swapped(tokens, 1, 3).tolist() == [[0, 3, 2, 1], [0, 6, 5, 4]]
    longer = prefixed(tokens, 5, 9, torch.Generator().manual_seed(0), bos=0)
    assert longer.shape == (2, 9)
    assert (longer[:, 0] == 0).all()
    assert (longer[:, 1:6] != 0).all()
    assert longer[:, 6:].tolist() == tokens[:, 1:].tolist()
    assert repeated(tokens, 2, bos=0).shape == (2, 7)
    assert prefixed(tokens, 2, 9, torch.Generator().manual_seed(0)).shape == (2, 6)
    with pytest.raises(ValueError, match=r"^position 4 must be from 0 to 3"):
        swapped(tokens, 0, 4)
    with pytest.raises(ValueError, match=r"^times 0"):
        repeated(tokens, 0)
    with pytest.raises(ValueError, match=r"^n -1"):
        prefixed(tokens, -1, 9, torch.Generator())
