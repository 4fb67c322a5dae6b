"""What a person has chosen goes along from page to page; pages begin with something to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from circuits import Workspace, load_model
from circuits.cli.main import run
from circuits.faces import faces_of
from circuits.units import Unit
from tests.test_app import page, text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("memory"))
    for model, data, sites in (
        ("cleanroom", "curves", "line,curve"),
        ("induction", "repeats", "z"),
    ):
        at = ["--workspace", str(made.root), "--workers", "1"]
        assert run(["harvest", model, "--data", data, "--sites", sites, *at]) == 0
    return made


def _pages() -> None:
    """Two pages of one session, the second without anything in its URL."""
    import streamlit as st

    from apps.address import choose_model, choose_unit

    if st.session_state.pop("elsewhere", False):
        st.query_params.clear()
    chosen = choose_model()
    assert chosen is not None
    st.title(f"{chosen[0].spec} {choose_unit(*chosen)}")
    st.button("elsewhere", on_click=lambda: st.session_state.update(elsewhere=True))


def test_choices_go_along(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(place.root))
    test = AppTest.from_function(_pages, default_timeout=60)
    for name, value in {"model": "cleanroom", "site": "curve", "unit": "30"}.items():
        test.query_params[name] = value
    test.run()
    assert test.title[0].value == "cleanroom curve:30"
    test.button[0].click().run()
    assert test.title[0].value == "cleanroom curve:30"
    test.sidebar.selectbox(key="choose-model").select("induction").run()
    assert test.title[0].value.startswith("induction blocks.")
    test.sidebar.selectbox(key="choose-model").select("cleanroom").run()
    test.button[0].click().run()
    assert test.title[0].value.startswith("cleanroom")


def test_compare_begins_with_two_units(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    test = page(place, monkeypatch, "compare", True)
    assert not test.exception
    assert not test.error, text(test)
    assert test.query_params["unit"] != test.query_params["other"]


def test_a_unit_without_a_picture_shows_what_excites_it(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("cleanroom")
    face = faces_of(place, model.hash)[Unit("line", 2)]
    test = page(place, monkeypatch, "unit", True, model="cleanroom", site="line", unit="2")
    assert face.about.split(",")[0] in text(test)
    assert "No picture yet" not in text(test)


def test_home_shows_the_network_by_its_sites(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apps.panels import sheets

    shown: list[list] = []
    monkeypatch.setattr(sheets, "sheet", lambda tiles, **_: shown.append(list(tiles)))
    page(place, monkeypatch, "home", True)
    groups = [list(dict.fromkeys(t.group for t in tiles)) for tiles in shown]
    assert ["line", "curve"] in groups
    for tiles in shown:
        assert all(t.picture or t.text for t in tiles), "every tile has a face"


def test_nearly_every_unit_has_a_face(place: Workspace) -> None:
    model = load_model("cleanroom")
    found = faces_of(place, model.hash)
    units = [
        u
        for name in ("line", "curve")
        for u in (Unit(name, i) for i in range(model.site(name).n_units))
    ]
    assert sum(u in found for u in units) >= 0.95 * len(units)
    for face in list(found.values())[:3]:
        assert face.picture().size == (72, 72)
    assert Path(next(iter(found.values())).path).is_file()
