from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.units import Direction, Site, Unit, check_site_name, nearest, unknown

site_names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Z", "C"), exclude_characters=":,+*"),
    min_size=1,
).filter(lambda name: not name.startswith("-") and not any(c.isspace() for c in name))


@given(site_names, st.integers(0, 10**9))
def test_unit_parses_what_it_prints(site: str, index: int) -> None:
    unit = Unit(site, index)
    assert Unit.parse(str(unit)) == unit


@given(
    site_names,
    st.lists(
        st.floats(-1e6, 1e6, allow_nan=False, width=64).filter(lambda x: x == 0 or abs(x) > 1e-9),
        min_size=1,
        max_size=6,
    ).filter(any),
)
def test_direction_parses_what_it_prints(site: str, weights: list[float]) -> None:
    direction = Direction(site, torch.tensor(weights, dtype=torch.float64))
    assert Direction.parse(str(direction), len(weights)) == direction


def test_direction_by_hand() -> None:
    direction = Direction.parse("a.b:2 - 0.5*a.b:0 + a.b:2", 4)
    assert direction.vector.tolist() == [-0.5, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    "text", ["", "mixed3b", "mixed3b:", ":3", "mixed3b:-1", "mixed3b:03", "a b:1"]
)
def test_bad_units_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SITE:INDEX"):
        Unit.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1+b:2", "names 2 sites"),
        ("a:7", "units 0 to 3"),
        ("2*", "not a sum of terms"),
        ("0*a:1", "not all zero"),
    ],
)
def test_bad_directions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Direction.parse(text, 4)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a,b", "-a", "a+b", "a*b"])
def test_bad_site_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="site name"):
        check_site_name(name)


def test_site_knows_its_units_and_positions() -> None:
    site = Site("z", "head", ("batch", "position", "head", "d_head"), 2, (7, 4, 3))
    assert site.n_units == 4
    assert site.position_axes == ("position",)
    assert site.position_shape == (7,)
    assert site.unit(3) == Unit("z", 3)
    with pytest.raises(ValueError, match="units 0 to 3"):
        site.unit(4)


def test_unknown_offers_the_nearest_names() -> None:
    assert nearest("mixed3", ["mixed3a", "conv2d0"], 1) == ["mixed3a"]
    assert "did you mean mixed3b" in unknown("site", "mixd3b", ["mixed3b"]).args[0]
    assert "expected one of a, b" in unknown("site", "xyzzy", ["a", "b"]).args[0]
