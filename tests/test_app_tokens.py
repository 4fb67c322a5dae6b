"""Pages of language models: readable texts, what units write, heads and their roles, circuits of many weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from apps import address, cached
from apps.panels import tokens
from circuits.harvesting import harvest
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.workspace import ModelRecord, Workspace
from tests.random_models import booted
from tests.test_app import page, read, text

HEAD = {"model": "induction", "site": "blocks.1.attn.hook_z", "unit": "0"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The induction model, and a random one of 31 words."""
    place = Workspace(tmp_path_factory.mktemp("ws"))
    heads = load_model("induction")
    record = ModelRecord("induction", heads.hash)
    harvest(heads, open_source("repeats"), ["blocks.1.attn.hook_z"], place, record)
    folder = tmp_path_factory.mktemp("model")
    model = booted(folder, "gpt2")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(" ".join("abcdefghij"[i:] + "klmnopq" * 6) for i in range(8)))
    spec = f"tl:{folder}"
    sites = ["blocks.1.mlp.hook_post"]
    harvest(model, open_source(f"tokens:{texts}"), sites, place, ModelRecord(spec, model.hash))
    return place


def words_model(place: Workspace) -> str:
    return next(r.spec for r in place.models() if r.spec.startswith("tl:"))


def drawn(test: AppTest) -> str:
    """What the page has as HTML."""
    return "\n".join(e.proto.body for e in test.get("html"))


def shown_words(row: str) -> str:
    return re.sub("<[^>]+>", "", row)


def test_texts_are_shown_around_the_peak(built: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(tokens, "BEFORE", 3)
    monkeypatch.setattr(tokens, "AFTER", 2)
    asked = {"model": words_model(built), "site": "blocks.1.mlp.hook_post", "unit": "3"}
    test = page(built, monkeypatch, **asked)
    assert not test.exception
    rows = re.findall(r"<div class='text'>(.*?)</div>", drawn(test))
    assert len(rows) == 8
    for row in rows:
        assert row.count("<span") <= 6
        assert row.count("peak") == 1
        assert "…" in shown_words(row)
    whole = test.toggle(key="whole-texts-best").set_value(True).run()
    first = re.findall(r"<div class='text'>(.*?)</div>", drawn(whole))[0]
    assert first.count("<span") > 40
    assert "…" not in shown_words(first)


def test_what_a_neuron_and_the_stream_write_is_said_in_words(built: Workspace, monkeypatch) -> None:
    spec = words_model(built)
    for site in ("blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"):
        test = page(built, monkeypatch, model=spec, site=site, unit="3")
        assert not test.exception
        assert "What it adds to logits" in text(test)
        raises, lowers = (
            next(d.value for d in test.dataframe if way in d.value) for way in ("raises", "lowers")
        )
        assert raises["by"].is_monotonic_decreasing
        assert lowers["by"].is_monotonic_increasing
        assert raises["by"].iloc[0] > lowers["by"].iloc[0]
        assert set(raises["raises"]) <= set(load_model(spec).input.vocabulary)  # type: ignore[union-attr]
    assert "the mean over all 31 tokens" in text(test)


def test_a_person_types_a_text(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, **HEAD)
    before = len(test.get("vega_lite_chart"))
    test.text_input(key="unit-text").set_value("5 9 2 7 5 9 2").run()
    assert not test.exception
    assert "5 9 2 7 5 9 2" in test.query_params["text"], "the next unit is shown on the same text"
    assert len(test.get("vega_lite_chart")) == before + 1, "where the head looks there"
    last = re.findall(r"<div class='text'>(.*?)</div>", drawn(test))[-1]
    assert shown_words(last).split()[-7:] == ["5", "9", "2", "7", "5", "9", "2"]
    test.text_input(key="unit-text").set_value("no number").run()
    assert not test.exception
    assert "is no token" in text(test)


def test_heads_have_roles_with_chance(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, **HEAD)
    assert "All heads of the model are scored together" in text(test)
    test.button(key="score-heads").click().run()
    assert not test.exception
    rows = next(d.value for d in test.dataframe if "by chance" in d.value).set_index("kind")
    assert rows.loc["induction", "attention there"] > 0.5 > rows.loc["induction", "by chance"]
    n = sum(s.n_units for s in load_model("induction").sites if s.name.endswith("hook_pattern"))
    assert rows.loc["induction", "rank"] in {f"{i + 1} of {n}" for i in range(n)}
    every = page(built, monkeypatch, "heads", model="induction")
    assert not every.exception
    assert "Induction heads" in text(every), "they are known now"
    assert "another earlier token" in text(every), "what chance is"
    best = next(d.value for d in every.dataframe)
    assert best["attention there"].is_monotonic_decreasing


def test_pairs_of_a_large_vocabulary_are_asked_for(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, **HEAD)
    moved = next(d.value for d in test.dataframe if "attended token" in d.value)
    assert (moved["attended token"] == moved["raises"]).all(), "an induction head copies"
    assert "raise themselves most (by chance" in text(test)
    monkeypatch.setattr(tokens, "MANY", 8)
    test = page(built, monkeypatch, **HEAD)
    assert not [d for d in test.dataframe if "attended token" in d.value]
    test.toggle(key="all-pairs").set_value(True).run()
    assert [d for d in test.dataframe if "attended token" in d.value]


def test_many_sites_are_listed_by_layer(built: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(address, "FEW", 3)
    test = page(built, monkeypatch, **HEAD)
    layer, site = (test.sidebar.selectbox(key=f"choose-{what}") for what in ("layer", "site"))
    assert layer.value == "blocks.1"
    assert layer.options[0] == "outside the layers"
    assert "attn.hook_z ✓" in site.options
    assert not any("blocks.0" in option for option in site.options)
    test.sidebar.selectbox(key="choose-layer").select("blocks.0").run()
    assert read(test.title[0]) == "blocks.0.attn.hook_z:0", "the same place in the other layer"
    assert "attn.hook_z" in test.sidebar.selectbox(key="choose-site").options


def test_units_of_a_vocabulary_are_typed(built: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(address, "MOST_LISTED", 20)
    test = page(built, monkeypatch, model=words_model(built), site="hook_unembed", unit="7")
    assert read(test.title[0]) == "hook_unembed:7 — c"
    test.sidebar.number_input(key="choose-unit").set_value(8).run()
    assert read(test.title[0]) == "hook_unembed:8 — d"
    found = page(built, monkeypatch, "site", model=words_model(built), site="hook_unembed")
    assert found.dataframe[0].value["name"].tolist()[7:9] == ["c", "d"]


def test_a_circuit_of_too_many_weights_is_read_as_it_is_asked_for(
    built: Workspace, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cached, "MOST_EDGES", 10)
    test = page(built, monkeypatch, "circuit", model="induction")
    assert not test.exception
    model = load_model("induction")
    assert not (built.model_folder(model.hash) / "graph.h5").exists(), "nothing is written"
    assert "composition scores" in text(test)
    assert "red excites" not in text(test), "they have no sign"
    assert "LiveGraph" in "".join(c.value for c in test.code)
    test = page(
        built, monkeypatch, "circuit", model=words_model(built), unit="blocks.1.mlp.hook_post:3"
    )
    assert not test.exception
    assert "red excites" in text(test)
