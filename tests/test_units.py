from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.units import Direction, Site, Unit, Units, check_site_name, nearest, unknown

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


LAYOUTS = {
    "channels first": Site("a", "channel", ("batch", "channel", "y", "x"), 1, (3, 2, 4)),
    "channels last": Site("b", "neuron", ("batch", "y", "x", "unit"), 3, (2, 4, 3)),
    "heads": Site("c", "head", ("batch", "position", "head", "d_head"), 2, (5, 3, 2)),
    "patterns": Site("d", "pattern", ("batch", "head", "query", "key"), 1, (3, 5, 5)),
    "flat": Site("e", "neuron", ("batch", "unit"), 1, (3,)),
    "volume": Site("f", "channel", ("batch", "channel", "z", "y", "x"), 1, (3, 2, 4, 5)),
}


def numbered(site: Site) -> torch.Tensor:
    """A batch of two in which every number is another."""
    return torch.arange(2.0 * math.prod(site.shape)).reshape(2, *site.shape)


@pytest.mark.parametrize(
    ("name", "inner_axis", "unit_shape", "width", "units_last", "positions"),
    [
        ("channels first", None, (3,), 3, False, (2, 4)),
        ("channels last", None, (3,), 3, True, (2, 4)),
        ("heads", 3, (3, 2), 6, True, (5,)),
        ("patterns", None, (3,), 3, False, (5, 5)),
        ("flat", None, (3,), 3, True, ()),
        ("volume", None, (3,), 3, False, (2, 4, 5)),
    ],
)
def test_layouts(
    name: str,
    inner_axis: int | None,
    unit_shape: tuple[int, ...],
    width: int,
    units_last: bool,
    positions: tuple[int, ...],
) -> None:
    site = LAYOUTS[name]
    found = (site.inner_axis, site.unit_shape, site.width, site.units_last)
    assert found == (inner_axis, unit_shape, width, units_last)
    assert site.positions_of(numbered(site)) == positions


@pytest.mark.parametrize("name", LAYOUTS)
def test_by_unit_writes_into_the_tensor_and_back(name: str) -> None:
    site = LAYOUTS[name]
    value = numbered(site)
    intact = value.clone()
    view = site.by_unit(value)
    assert torch.equal(site.from_by_unit(view), value)
    view[:, 1] = -1.0
    assert (value.select(site.unit_axis, 1) == -1).all()
    assert ((value == -1) | (value == intact)).all()
    assert int((value == -1).sum()) == value.numel() // site.n_units
    site.from_by_unit(view)[0] = 7.0
    assert (view[0] == 7).all(), "a view as well"


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_back(name: str) -> None:
    site = LAYOUTS[name]
    value = numbered(site)
    rows = site.rows(value)
    assert rows.shape == (2, *site.positions_of(value), site.width)
    assert torch.equal(site.from_rows(rows), value)


def test_rows_by_hand() -> None:
    first, last = LAYOUTS["channels first"], LAYOUTS["channels last"]
    value = numbered(first)
    assert torch.equal(first.rows(value)[1, 1, 3], value[1, :, 1, 3])
    assert torch.equal(last.rows(numbered(last)), numbered(last))
    heads = LAYOUTS["heads"]
    z = numbered(heads)
    row = [*z[1, 4, 0].tolist(), *z[1, 4, 1].tolist(), *z[1, 4, 2].tolist()]
    assert heads.rows(z)[1, 4].tolist() == row
    assert heads.row_units.tolist() == [0, 0, 1, 1, 2, 2]
    short = heads.from_rows(torch.arange(12.0).reshape(1, 2, 6))
    assert short.shape == (1, 2, 3, 2), "positions are those of the rows"
    assert short[0, 1, 2].tolist() == [10.0, 11.0]


def test_activations_by_hand() -> None:
    heads = LAYOUTS["heads"]
    z = torch.zeros(1, 5, 3, 2)
    z[0, 4, 1] = torch.tensor([3.0, 4.0])
    expected = torch.zeros(1, 3, 5)
    expected[0, 1, 4] = 5.0  # the norm of (3, 4)
    assert torch.equal(heads.activations(z), expected)
    for name in ("channels first", "patterns", "volume"):
        site = LAYOUTS[name]
        assert torch.equal(site.activations(numbered(site)), numbered(site).flatten(2))
    last = LAYOUTS["channels last"]
    assert last.activations(numbered(last))[1, 2, 1 * 4 + 3] == numbered(last)[1, 1, 3, 2]
    flat = LAYOUTS["flat"]
    assert flat.activations(torch.tensor([[1.0, -2.0, 3.0]])).tolist() == [[[1.0], [-2.0], [3.0]]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_spread_reaches_every_position_of_its_unit(name: str) -> None:
    site = LAYOUTS[name]
    vector = torch.arange(1.0, 1 + site.width).reshape(site.unit_shape)
    made = torch.zeros(2, *site.shape) + site.spread(vector)
    assert (site.rows(made) == vector.flatten()).all()


def test_spread_of_one_number_a_head_and_of_some_units() -> None:
    heads = LAYOUTS["heads"]
    made = torch.zeros(2, 5, 3, 2) + heads.spread(torch.tensor([1.0, 2.0, 3.0]))
    assert made[1, 4].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    site = LAYOUTS["channels first"]
    assert site.spread(torch.tensor([4.0, 5.0])).tolist() == [[[[4.0]], [[5.0]]]]


def test_at_is_a_view_of_one_position() -> None:
    site = LAYOUTS["channels first"]
    value = numbered(site)
    assert torch.equal(site.at(value, (1, -1)), value[:, :, 1, 3])
    site.at(value, (1, -1))[0] = -5.0
    assert value[0, :, 1, 3].tolist() == [-5.0, -5.0, -5.0]
    heads = LAYOUTS["heads"]
    assert torch.equal(heads.at(numbered(heads), (2,)), numbered(heads)[:, 2])
    with pytest.raises(ValueError, match="position 2 along y of a must be from -2 to 1"):
        site.at(value, (2, 0))
    with pytest.raises(ValueError, match=r"position \(1,\) does not fit the axes of a \(y, x\)"):
        site.at(value, (1,))


def test_unknown_offers_the_nearest_names() -> None:
    assert nearest("mixed3", ["mixed3a", "conv2d0"], 1) == ["mixed3a"]
    assert "did you mean mixed3b" in unknown("site", "mixd3b", ["mixed3b"]).args[0]
    assert "expected one of a, b" in unknown("site", "xyzzy", ["a", "b"]).args[0]


@given(site_names, st.none() | st.lists(st.integers(0, 40), min_size=1, unique=True))
def test_units_parse_what_they_print(site: str, indices: list[int] | None) -> None:
    units = Units(site, None if indices is None else tuple(indices))
    assert Units.parse(str(units)) == units
    assert Units.of(str(units)) == Units.of(units) == units


@pytest.mark.parametrize(
    ("text", "indices", "written"),
    [
        ("a:*", None, "a:*"),
        ("a:7", (7,), "a:7"),
        ("a:3-5,1", (3, 4, 5, 1), "a:3-5,1"),
        ("a:1,2,4", (1, 2, 4), "a:1-2,4"),
        ("a:0-0", (0,), "a:0"),
    ],
)
def test_units_by_hand(text: str, indices: tuple[int, ...] | None, written: str) -> None:
    units = Units.parse(text)
    assert (units.site, units.indices, str(units)) == ("a", indices, written)


def test_units_of_whatever_names_them() -> None:
    assert Units.of(Unit("a", 3)) == Units("a", (3,))
    assert Units.of([Unit("a", 3), "a:1"]) == Units("a", (3, 1))
    site = Site("a", "channel", ("batch", "channel", "y"), 1, (5, 2))
    assert Units.parse("a:*").among(site) == (0, 1, 2, 3, 4)
    assert Units.parse("a:4,2").among(site) == (4, 2)
    with pytest.raises(ValueError, match="a has units 0 to 4"):
        Units.parse("a:2-5").among(site)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "'a' are not of the form SITE:1,2,5-9"),
        ("a:", "are not of the form"),
        ("a:1,,2", "are not of the form"),
        ("a:5-3", "5-3 runs backwards"),
        ("a:0-99999999", "0-99999999 names more than"),
        ("a:2,1,2", "unit a:2 is listed twice"),
    ],
)
def test_bad_units_lists_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Units.parse(text)


def test_units_of_two_sites_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"units name 2 sites \(a, b\): expected one"):
        Units.of(["a:1", "b:1"])
    with pytest.raises(ValueError, match="units of a are an empty list"):
        Units("a", ())


@pytest.mark.parametrize("unit_axis", [0, 3, -1])
def test_the_unit_axis_is_one_of_the_axes_but_the_first(unit_axis: int) -> None:
    with pytest.raises(ValueError, match=f"unit_axis {unit_axis} of site a is not in"):
        Site("a", "channel", ("batch", "channel", "y"), unit_axis, (5, 2))
