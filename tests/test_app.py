"""The app under Streamlit's own test runner; `test_browser.py` drives it in a real browser."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

import apps
from apps.address import TITLES
from apps.tab_storage import RECALLED
from circuits.cli.main import run
from circuits.concepts import name_unit, names_of
from circuits.discovery import Alternatives, Discovery, EdgeGraph, edge_graph, edges_of
from circuits.discovery.runs import Ablation
from circuits.discovery.scoring import Method
from circuits.discovery.searching import Search
from circuits.edits.activations import zero
from circuits.edits.ledger import Ledger
from circuits.edits.recipes import Recipe
from circuits.experiments.statistics import Interval
from circuits.families import Family, Member, save_family
from circuits.featurevis.pictures import read_facts
from circuits.featurevis.render import visualize
from circuits.graph import CircuitGraph
from circuits.graph.formats import to_node_link
from circuits.graph.saved import load_circuit
from circuits.harvesting import harvest
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import to_image
from circuits.stimuli.sources import open_source
from circuits.stimuli.texts import TextSource
from circuits.tasks import Task
from circuits.tasks.builtin import load_task
from circuits.units import Unit
from circuits.weights import build_graph
from circuits.workspace import ModelRecord, Workspace
from tests import canned, hostile
from tests.commands import given
from tests.markdown import live

pytestmark = pytest.mark.usefixtures("fewer_drawings")


@pytest.fixture(scope="module")
def built(fewer_drawings: None, tmp_path_factory) -> Workspace:
    """A small workspace: the clean room with one picture, and the induction model."""
    place = Workspace(tmp_path_factory.mktemp("ws"))
    model = load_model("cleanroom")
    harvest(model, open_source("curves"), ["line"], place, ModelRecord("cleanroom", model.hash))
    picture = visualize(model, "line:2", steps=3)
    picture.save(place.picture_path(model.hash, "line:2", "3steps-64px-seed0"))
    heads = load_model("induction")
    source = open_source("repeats")
    assert isinstance(source, TextSource)
    harvest(heads, source, ["blocks.1.attn.hook_z"], place, ModelRecord("induction", heads.hash))
    return place


def show(name: str, guard: bool) -> None:
    """A page as the app shows it; runs as a script of its own."""
    from importlib import import_module

    from apps.address import guarded

    view = import_module(f"apps.views.{name}").page
    (guarded(view) if guard else view)()


def page(
    place: Workspace, monkeypatch, view: str = "unit", guard: bool = False, **query: str
) -> AppTest:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(place.root))
    test = AppTest.from_function(show, default_timeout=120, kwargs={"name": view, "guard": guard})
    for key, value in query.items():
        test.query_params[key] = value
    return test.run()


def read(part: Any) -> str:
    """What a person reads: without the marks that keep Markdown from making something of it."""
    return re.sub(r"\\(.)|`+", r"\1", str(getattr(part, "value", part)))


def text(test: AppTest) -> str:
    parts = [*test.title, *test.subheader, *test.caption, *test.info, *test.warning, *test.error]
    return "\n".join(map(read, parts))


def test_newcomer_sees_the_clean_room_first(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch)
    assert not test.exception
    assert test.sidebar.selectbox[0].value == "cleanroom"
    assert read(test.title[0]) == "line:0 — line 0°"
    for heading in ("What excites it most", "How active it is", "Built from", "What it does"):
        assert heading in text(test)


def test_the_choice_is_in_the_url_both_ways(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="2")
    assert read(test.title[0]) == "line:2 — line 30°"
    assert "Mean activation" in text(test), "the picture made before is shown"
    test.sidebar.selectbox(key="choose-unit").select("7").run()
    assert test.query_params["unit"] == "7"
    assert read(test.title[0]).startswith("line:7")
    next(b for b in test.button if b.label == "next →").click().run()
    assert read(test.title[0]).startswith("line:8")


def test_weights_lead_to_the_unit_at_the_other_end(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="3")
    first = next(b for b in test.button if read(b.label).startswith("complex:"))
    first.click().run()
    assert not test.exception
    assert read(test.title[0]).startswith(read(first.label).split()[0])
    assert "circuits harvest cleanroom --data DATA --sites complex" in text(test)


def test_ablation_shows_its_baseline_and_is_undone(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="4")
    assert "Null:" not in text(test)
    test.toggle(key="ablate").set_value(True).run()
    assert not test.exception
    assert test.selectbox(key="effects-task").options[0] == "curves", "the model's own task first"
    assert "Null: 19 " in text(test)
    assert "p is at least 0.05" in text(test)
    assert "identical to the bit" in text(test)
    test.selectbox(key="effects-task").select("prediction").run()
    assert not test.exception
    assert "prediction on curves: 16 of 48, spread evenly (seed 0)" in text(test)


def test_the_picture_can_be_made_here(built: Workspace, monkeypatch) -> None:
    monkeypatch.setattr("apps.panels.pictures.STEPS", 2)
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="9")
    assert "No picture yet" in text(test)
    test.button(key="make-picture").click().run()
    assert not test.exception
    assert "2 steps, seed 0" in text(test)


def test_other_pictures_and_the_badge_can_be_made_here(built: Workspace, monkeypatch) -> None:
    monkeypatch.setattr("apps.panels.pictures.STEPS", 4)
    monkeypatch.setattr("apps.panels.pictures.COMPARED", 24)
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="2")
    for key in ("make-negative", "make-diverse"):
        test.button(key=key).click().run()
        assert not test.exception
    folder = built.model_folder(load_model("cleanroom").hash) / "pictures"
    kinds = [read_facts(path)["kind"] for path in sorted(folder.glob("line:2-4steps*.png"))]
    assert sorted(kinds) == ["diverse"] * 4 + ["negative"]
    test.button(key="make-badge").click().run()
    assert not test.exception
    assert test.metric[0].label == "Reliability"
    shown = float(test.metric[0].value)
    assert 0 <= shown <= 1
    assert "The same made on shuffled weights" in text(test)
    again = page(built, monkeypatch, model="cleanroom", site="line", unit="2")
    assert float(again.metric[0].value) == shown, "it is kept with the picture"
    again.toggle(key="range").set_value(True).run()
    assert "made: positive" in text(again)
    assert "made: negative" in text(again)


def test_transformer_heads_have_a_page(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, model="induction", site="blocks.1.attn.hook_z", unit="1")
    assert not test.exception
    assert read(test.title[0]) == "blocks.1.attn.hook_z:1"
    before = next(b for b in test.button if read(b.help).startswith("blocks.0.attn.hook_z:"))
    assert read(before.label).startswith("0 z:"), "as short as it can be said"
    test.toggle(key="ablate").set_value(True).run()
    assert "repeats: 16" in text(test)
    effects = next(d.value for d in test.dataframe if "measure" in d.value).set_index("measure")
    assert effects.loc["cross_entropy", "change"] > 0


def test_odd_urls_get_a_message(built: Workspace, monkeypatch) -> None:
    odd = "<script>alert(1)</script>"
    test = page(built, monkeypatch, model=odd, site="nope", unit="-5", data="../../etc")
    assert not test.exception
    assert "There is no model" in text(test)
    assert read(test.title[0]).startswith("line:0")


def test_a_link_in_the_url_does_not_become_one(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, model="![x](https://example.org/a.png)`")
    assert test.warning[0].value.startswith(
        "There is no model `` ![x](https://example.org/a.png)` ``"
    )


@pytest.mark.parametrize("scheme", ["python:", ""])
def test_a_workspace_runs_no_code_unasked(scheme: str, tmp_path: Path, monkeypatch) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    place = Workspace(tmp_path / "ws")
    place.register(ModelRecord(f"{scheme}{code}:f", "1" * 64))
    assert "--trust-python" in text(page(place, monkeypatch))
    assert not (tmp_path / "ran").exists()


def test_without_its_images_the_rest_is_shown(tmp_path: Path, monkeypatch) -> None:
    folder, place = tmp_path / "images", Workspace(tmp_path / "ws")
    folder.mkdir()
    to_image(torch.rand(3, 64, 64)).save(folder / "a.png")
    model = load_model("cleanroom")
    record = ModelRecord("cleanroom", model.hash)
    harvest(model, open_source(f"folder:{folder}"), ["line"], place, record)
    (folder / "a.png").unlink()
    test = page(place, monkeypatch, site="line")
    assert not test.exception
    assert "The examples cannot be shown" in text(test)
    assert "How active it is" in text(test)
    assert "Built from" in text(test)


def test_a_balanced_kernel_is_not_called_inhibiting(built: Workspace, monkeypatch) -> None:
    seen = text(page(built, monkeypatch, model="cleanroom", site="gabor", unit="0"))
    assert "excites and inhibits, strength 0.333" in seen, "a Gabor filter sums to zero"


def test_a_depthwise_unit_is_shown_with_what_its_only_input_reads(
    tmp_path: Path, monkeypatch
) -> None:
    place, model = Workspace(tmp_path / "ws"), load_model("efficientnet-lite0")
    record, folder = ModelRecord("efficientnet-lite0", model.hash), tmp_path / "images"
    folder.mkdir()
    to_image(torch.rand(3, 64, 64)).save(folder / "a.png")
    harvest(model, open_source(f"folder:{folder}"), ["block3a_depthwise"], place, record)
    test = page(place, monkeypatch, model="efficientnet-lite0", site="block3a_depthwise", unit="7")
    assert not test.exception
    seen = text(test)
    assert "Built from, further back" in seen
    assert "It reads one unit only, block3a_expand:7" in seen
    labels = [b.label.replace("\\", "") for b in test.button]
    for unit in ("block3a_expand:7", "block2b:18"):
        assert any(label.startswith(unit) for label in labels)


def test_empty_workspace_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    test = page(Workspace(tmp_path / "none"), monkeypatch)
    assert not test.exception
    assert "circuits demo" in text(test)


def test_broken_workspaces_say_what_is_wrong(tmp_path: Path, monkeypatch) -> None:
    place = Workspace(tmp_path)
    place.register(ModelRecord("cleanroom", "0" * 64))
    assert "is another one" in text(page(place, monkeypatch))
    gone = Workspace(tmp_path / "gone")
    gone.register(ModelRecord("shapes", "1" * 64, str(tmp_path / "gone.safetensors")))
    assert "does not exist" in text(page(gone, monkeypatch))


def test_the_whole_range_is_shown_with_its_seed(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="2")
    assert "Across its whole range" in text(test)
    assert "top 10 %" not in text(test)
    test.toggle(key="range").set_value(True).run()
    assert not test.exception
    assert all(f"{10 * i}–{10 * i + 10} %" in text(test) for i in range(1, 10))
    before = text(test)
    test.number_input(key="range-seed").set_value(1).run()
    assert text(test) != before, "another seed, another sample"
    test = page(built, monkeypatch, model="induction")
    test.toggle(key="range").set_value(True).run()
    assert not test.exception
    assert "90–100 %" in text(test)


def test_a_person_names_a_unit_and_sees_what_it_was_called_before(
    built: Workspace, monkeypatch
) -> None:
    test = page(built, monkeypatch, model="cleanroom", site="line", unit="7")
    assert "No name yet." in text(test)
    for name, said in (("vertical [line]", "version 1"), ("a steep line", "version 2")):
        test.text_input[0].set_value(name)
        test.text_input[1].set_value("seen on its examples")
        next(b for b in test.button if b.label == "Keep").click()
        test.run()
        assert not test.exception
        assert f"Called “{name}” by" in text(test)
        assert said in text(test)
    next(b for b in test.button if b.label == "Keep").click()
    test.run()
    assert "must have 1 to 200 characters" in text(test)
    assert "a steep line" in text(
        page(built, monkeypatch, model="cleanroom", site="line", unit="7")
    )


def test_autoencoders_have_a_page_with_their_nulls_and_named_latents(
    tmp_path: Path, monkeypatch
) -> None:
    shown = page(Workspace(tmp_path), monkeypatch, "concepts")
    assert "No autoencoder yet" in text(shown)
    more = "--latents 320 --k 8 --steps 20 --batch 512"
    assert run(f"sae train shapes mixed3a --name a --data shapes {more}".split()) == 0
    assert "Not measured yet: circuits sae eval a." in text(shown.run())
    assert run(["sae", "eval", "a", "--limit", "20", "--rows", "2000"]) == 0
    assert run(["harvest", "shapes+sae/a", "--data", "shapes", "--sites", "sae/a"]) == 0
    assert run(["sae", "name", "a", "--unit", "7", "--as", "a [round] one"]) == 0
    test = shown.run()
    assert not test.exception
    numbers, behaviour, latents = (frame.value for frame in test.dataframe[:3])
    for null in ("random dictionary", "shuffled rows", "pca"):
        assert null in numbers.index
    assert behaviour.loc["kl", "with codes"] < behaviour.loc["kl", "zero"]
    assert latents.iloc[0]["name"] == "a [round] one"
    assert "site=sae%2Fa&unit=7" in latents.iloc[0]["page"]
    assert "1 have a name" in text(test)
    test.radio[0].set_value("those used most").run()
    assert test.dataframe[2].value["active in %"].is_monotonic_decreasing
    # trained again: what was measured of the old one is not shown
    assert (
        run(f"sae train shapes mixed3a --name a --data shapes {more} --seed 1 --overwrite".split())
        == 0
    )
    assert "Not measured yet" in text(shown.run())
    (tmp_path / "saes" / "a" / "sae.safetensors").write_bytes(b"x")
    assert "is not a safetensors file" in text(shown.run())


# --- other pages ---------------------------------------------------------------------------------


def test_home_shows_models_and_the_way_through(
    built: Workspace, tmp_path: Path, monkeypatch
) -> None:
    test = page(built, monkeypatch, "home")
    assert not test.exception
    assert "New here? Two minutes" in text(test)
    assert "Also built in" in text(test)
    assert "circuits demo" in text(page(Workspace(tmp_path / "none"), monkeypatch, "home"))


def test_a_site_says_whether_its_basis_is_privileged(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "site", model="cleanroom", site="line", **{"as": "table"})
    next(b for b in test.button if b.label == "Measure").click().run()
    assert not test.exception
    assert "random bases, seed 0; no p is below 0.025" in text(test)
    assert "random bases: median (95 %)" in test.dataframe[-1].value.columns


def test_a_site_is_sorted_and_filtered(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "site", model="cleanroom", site="line", **{"as": "table"})
    assert not test.exception
    assert len(test.dataframe[0].value) == 12
    test.text_input(key="site-filter").set_value("line 15").run()
    assert test.dataframe[0].value["name"].tolist() == ["line 15°", "line 150°"]
    test.text_input(key="site-filter").set_value("").run()
    test.selectbox(key="site-sort").set_value("largest").run()
    test.toggle(key="site-down").set_value(True).run()
    assert test.dataframe[0].value["largest"].is_monotonic_decreasing
    maps = page(built, monkeypatch, "site", model="cleanroom", site="line", **{"as": "map"})
    assert not maps.exception
    assert "nearest neighbours" in text(maps)


def test_edits_are_stacked_undone_and_kept(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "edits", model="cleanroom", on="line:3")
    assert not test.exception
    assert "None: the model is as it is." in text(test)
    test.button(key="edit-add").click().run()
    assert "scale units=line:3 factor=0" in [c.value for c in test.code]
    test.text_input(key="edit-words").set_value("scale line:4 factor=2")
    test.button(key="edit-add-words").click().run()
    assert "scale units=line:4 factor=2" in [c.value for c in test.code]
    test.button(key="edit-undo").click().run()
    assert "scale units=line:4 factor=2" not in [c.value for c in test.code]
    test.button(key="edit-redo").click().run()
    test.button(key="edit-remove-0").click().run()
    assert not test.exception
    test.button(key="effects-measure").click().run()
    assert not test.exception
    assert "identical to the bit" in text(test)
    measured = test.dataframe[0].value.set_index("measure")
    assert measured.loc["kl", "change"] > 0
    assert " to " in measured.loc["kl", "null"]
    test.button(key="edit-ledger").click().run()
    assert "1 on branch main" in test.success[0].value
    model = load_model("cleanroom")
    assert str(Ledger(built.database, model).recipe().edits[0]) == "scale units=line:4 factor=2"


def test_what_the_tab_kept_is_in_force_again(built: Workspace, monkeypatch) -> None:
    model_hash = load_model("cleanroom").hash
    test = page(built, monkeypatch, "edits", model="cleanroom", on="line:3")
    test.button(key="edit-add").click().run()
    edits = test.session_state[f"edits {model_hash}"].text
    test = page(built, monkeypatch, "circuit", model="cleanroom", unit="line:3")
    test.text_input[0].set_value("line:4")
    next(b for b in test.button if b.label == "Add").click().run()
    drawn = test.session_state[f"drawing {model_hash}"].text
    grown = next(c.value for c in test.caption if "nodes" in c.value)

    kept = {f"edits {model_hash}": edits, f"drawing {model_hash}": drawn}
    test = page(built, monkeypatch, "edits", model="cleanroom")
    assert "None: the model is as it is." in text(test)
    test.session_state[RECALLED] = dict(kept)
    test.run()
    assert "scale units=line:3 factor=0" in [c.value for c in test.code]
    test.button(key="edit-undo").click().run()
    assert "None: the model is as it is." in text(test)
    for early in (False, True):  # the tab may answer before the page has begun a circuit
        test = AppTest.from_function(
            show, default_timeout=120, kwargs={"name": "circuit", "guard": False}
        )
        test.query_params["model"], test.query_params["unit"] = "cleanroom", "line:3"
        if not early:
            test.run()
        test.session_state[RECALLED] = dict(kept)
        test.run()
        assert next(c.value for c in test.caption if "nodes" in c.value) == grown
        test.button(key="canvas-undo").click().run()
        assert next(c.value for c in test.caption if "nodes" in c.value) != grown
        assert not test.exception


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"schema": 2, "edits": [{"operator": "explode"}]}', "explode"),
        ('{"schema": 2, "edits": [' + ",".join(["{}"] * 1001) + "]}", ""),
        (" " * 3_000_000, "3000000 characters"),
    ],
)
def test_nonsense_from_the_tab_is_refused(
    built: Workspace, monkeypatch, kept: str, said: str
) -> None:
    model_hash = load_model("cleanroom").hash
    for view in ("edits", "circuit"):
        test = page(built, monkeypatch, view, model="cleanroom")
        slot = ("edits " if view == "edits" else "drawing ") + model_hash
        test.session_state[RECALLED] = {slot: kept}
        test.run()
        assert not test.exception
        (warning,) = [read(w) for w in test.warning]
        assert "could not be taken up again" in warning
        assert said in warning or view == "circuit"
        test.run()
        assert not test.warning


def test_units_from_the_tab_that_are_not_there_are_named(built: Workspace, monkeypatch) -> None:
    model_hash = load_model("cleanroom").hash
    edit = {"operator": "scale", "units": "curve:999", "factor": 0.0}
    test = page(built, monkeypatch, "edits", guard=True, model="cleanroom")
    test.session_state[RECALLED] = {
        f"edits {model_hash}": json.dumps({"schema": 2, "edits": [edit]})
    }
    test.run()
    assert not test.exception
    assert any("unit curve:999 does not exist" in read(e) for e in test.error)
    test.button(key="edit-undo").click().run()
    assert not test.error
    graph = CircuitGraph()
    graph.add_nodes_from([Unit("curve", 999), Unit("nope", 0), Unit("line", 3)])
    drawn = {"graph": to_node_link(graph), "origin": "unit=line:3", "version": 0}
    for selected in ("", "curve:999", "nope:0"):
        test = page(built, monkeypatch, "circuit", guard=True, model="cleanroom", unit="line:3")
        test.session_state[RECALLED] = {f"drawing {model_hash}": json.dumps(drawn)}
        test.session_state[f"selected {model_hash}"] = selected
        test.run()
        assert not test.exception
        assert "3 nodes" in text(test)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("set line:0 values=@/etc/passwd", "names a file: expected numbers"),
        ("explode line:0", "unknown edit operator"),
        ("scale nope:0 factor=1", "nope"),
        ("scale line:99 factor=1", "line:99"),
    ],
)
def test_bad_edits_are_refused(built: Workspace, monkeypatch, words: str, said: str) -> None:
    test = page(built, monkeypatch, "edits", model="cleanroom")
    test.text_input(key="edit-words").set_value(words)
    test.button(key="edit-add-words").click().run()
    assert not test.exception
    assert said in read(test.error[0])
    assert "None: the model is as it is." in text(test)


def test_a_connection_and_a_family_can_be_edited(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "edits", model="cleanroom", on="complex_pool:2->line:3")
    assert not test.exception
    assert test.selectbox(key="edit-way").options[0] == "Cut the connection"
    model = load_model("cleanroom")
    members = tuple(Member(15.0 * i, Unit("line", i), 1.0) for i in range(3))
    nan = float("nan")
    save_family(
        built.database,
        Family(
            "slow", "line", "rotation", 180.0, members, nan, nan, "", 0, model.hash, "by hand", 0
        ),
    )
    test = page(built, monkeypatch, "edits", model="cleanroom", on="slow")
    test.button(key="edit-add").click().run()
    assert "scale units=line:0-2 factor=0" in [c.value for c in test.code]
    assert "Family “slow”" in text(
        page(built, monkeypatch, model="cleanroom", site="line", unit="1")
    )


def test_a_circuit_is_drawn_changed_and_compared(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "circuit", model="cleanroom", unit="line:3")
    assert not test.exception
    before = next(c.value for c in test.caption if "nodes" in c.value)
    test.text_input[0].set_value("line:4 line:5")
    next(b for b in test.button if b.label == "Add").click().run()
    assert not test.exception
    assert next(c.value for c in test.caption if "nodes" in c.value) != before
    test.text_input(key="circuit-name").set_value("lines")
    test.button(key="circuit-save").click().run()
    assert "version 1 of lines" in test.success[0].value
    test.button(key="canvas-undo").click().run()
    assert next(c.value for c in test.caption if "nodes" in c.value) == before
    assert "lines" in [o for s in test.selectbox for o in s.options]
    assert "Seen in circuits" in text(
        page(built, monkeypatch, model="cleanroom", site="line", unit="4")
    )
    odd = page(built, monkeypatch, "circuit", model="cleanroom", circuit="none such")
    assert "no circuit 'none such'" in read(odd.error[0])
    odd = page(built, monkeypatch, "circuit", model="cleanroom", circuit="lines", version="x1")
    assert "version 'x1' of a circuit is not a whole number" in read(odd.error[0])


# --- circuits that are found ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> tuple[Task, Discovery]:
    """A circuit of ten edges, with numbers made up."""
    model = load_model("induction")
    task = load_task(model, "repeats", n=16)
    return task, canned.discovery(edge_graph(model), task)


@pytest.fixture
def finding(found: tuple[Task, Discovery], monkeypatch) -> list[dict[str, Any]]:
    """Finding takes no time; with which settings it was asked for."""
    asked: list[dict[str, Any]] = []

    def at_once(graph: EdgeGraph, task: Task, method: str, **settings: Any) -> Discovery:
        assert task.hash == found[0].hash
        asked.append({"method": method, **settings})
        for stage in ("scores", "agreement", "search", "evaluation"):
            settings["stage"](stage)(1, 2)
        return found[1]

    monkeypatch.setattr("apps.cached.discover", at_once)
    return asked


ASKED = {"model": "induction", "n": "16", "method": "eap"}
"""With a size of its own in each test: what was found is kept for all."""


def test_a_circuit_is_found_and_shown_with_its_evidence(
    built: Workspace, found: tuple[Task, Discovery], finding: list[dict[str, Any]], monkeypatch
) -> None:
    test = page(built, monkeypatch, "find", **ASKED, size="10")
    assert not test.exception
    assert "Edges by score" not in text(test)
    assert "106 edges between heads and MLPs" in text(test)
    test.button(key="find-run").click().run()
    assert not test.exception
    (asked,) = finding
    wanted = {"method": "eap", "search": "greedy", "size": 10, "ablation": "counterpart", "seed": 0}
    assert wanted.items() <= asked.items()
    made = found[1].evaluation
    rows = next(d.value for d in test.dataframe if "p" in d.value).set_index("of")
    assert rows.loc["circuit", "f"] == pytest.approx(made.faithfulness.value)
    assert rows.loc["random circuits (3)", "f"] == pytest.approx(np.mean(made.random_faithfulness))
    edges = next(d.value for d in test.dataframe if "score" in d.value)
    order = found[1].scores.order()
    assert list(edges["edge"][:5]) == [" -> ".join(found[1].scores.edges[i]) for i in order[:5]]
    assert "not stable: circuits of 100 bootstraps have a mean Jaccard index of 0.75" in text(test)
    assert "(find half)" in text(test)
    assert "(test half)" in text(test)
    again = page(built, monkeypatch, "find", **ASKED, size="10")
    assert "Edges by score" in text(again), "it is kept"
    assert len(finding) == 1
    said = next(read(c) for c in test.caption if "The same:" in c.value)
    asked["n_random"] = 19
    told = given("discovering.found_circuit", *shlex.split(said.partition("circuits ")[2]))
    assert {k: told[k] for k in asked if k != "stage"} == {
        k: asked[k] for k in asked if k != "stage"
    }
    assert told["task"].hash == found[0].hash
    monkeypatch.setattr(
        "circuits.discovery.discover", lambda *_, **more: finding.append(more) or found[1]
    )
    exec(compile(test.code[0].value, "copied", "exec"), {})
    assert finding[1].items() <= asked.items()


def test_either_run_is_patched_and_other_circuits_are_shown(
    built: Workspace, found: tuple[Task, Discovery], finding: list[dict[str, Any]], monkeypatch
) -> None:
    f, edges = Interval(0.9, 0.8, 1.0), (("token", "logits"),)
    others = Alternatives((edges, edges), 106, 2, (1.0, 1.0), (f, f), edges, f, edges, f, (), 0)
    made = replace(found[1], alternatives=others)
    monkeypatch.setattr("apps.cached.discover", lambda *_, **more: finding.append(more) or made)
    choices = {"method": "exact", "direction": "denoising", "alternatives": "2", "size": "17"}
    test = page(built, monkeypatch, "find", **(ASKED | choices))
    test.button(key="find-run").click().run()
    assert not test.exception
    assert finding[0]["direction"] == "denoising"
    assert finding[0]["alternatives"] == 2
    assert "Other circuits that do it" in text(test)
    assert "alternatives, 1 of 2 that were asked for" in text(test)
    said = next(read(c) for c in test.caption if "The same:" in c.value)
    assert "--direction denoising --alternatives 2" in said


def test_unreliable_scores_are_called_so(
    built: Workspace, found: tuple[Task, Discovery], finding: list[dict[str, Any]], monkeypatch
) -> None:
    assert found[1].checked is not None
    for causes, said in (
        (("the scores [are](http://a.example) bad", "few"), ["Unreliable here: the scores"]),
        ((), []),
    ):
        checked = replace(found[1].checked, causes=causes)
        monkeypatch.setattr(
            "apps.cached.discover", lambda *_, c=checked, **__: replace(found[1], checked=c)
        )
        test = page(built, monkeypatch, "find", **ASKED, size=str(12 + len(causes)))
        test.button(key="find-run").click().run()
        assert not test.exception
        assert [read(w)[: len("Unreliable here: the scores")] for w in test.warning] == said
        assert ("nothing speaks against these scores" in text(test)) == (not causes)


def test_the_strongest_edges_are_saved_and_opened(
    built: Workspace, found: tuple[Task, Discovery], finding: list[dict[str, Any]], monkeypatch
) -> None:
    made = found[1].evaluation
    test = page(built, monkeypatch, "find", **ASKED, size="11", edges="16")
    test.button(key="find-run").click().run()
    connected, f = next((c, f) for size, c, f, _ in made.by_size() if size == 16)
    assert test.select_slider(key="find-edges").value == 16
    assert f"The 16 strongest edges, of which {connected} lie on a path" in text(test)
    assert f"faithfulness {f:.3f}" in text(test)
    test.select_slider(key="find-edges").set_value(25).run()
    assert test.query_params["edges"] == "25"
    test.select_slider(key="find-edges").set_value(16).run()
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "apps.panels.discoveries.open_page",
        lambda page, **choices: opened.append({"page": page, **choices}),
    )
    for key, name, n in (("size", "sixteen", connected), ("own", "ten", len(made.edges))):
        test.text_input(key="find-name").set_value(name)
        test.button(key=f"find-save-{key}").click().run()
        assert not test.exception
        assert opened.pop() == {
            "page": "circuit",
            "model": "induction",
            "circuit": name,
            "version": 1,
        }
        saved = load_circuit(built.database, name, load_model("induction").hash)
        assert len(edges_of(saved)) == n
        drawn = page(built, monkeypatch, "circuit", model="induction", circuit=name)
        assert not drawn.exception
        assert "found on repeats (find half): scores by eap" in text(drawn)
    test.text_input(key="find-name").set_value("")
    test.button(key="find-save-own").click().run()
    assert "name" in read(test.error[0])
    assert not opened


def test_what_cannot_be_found_is_said_in_one_line(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "find", guard=True, model="cleanroom", sites="line, curv")
    assert [read(e) for e in test.error] == [
        "unknown site of cleanroom 'curv': did you mean curve, curve_pre_relu?"
    ]
    test.text_input(key="find-sites").set_value("line, curve").run()
    assert not test.error
    assert test.query_params["sites"] == "line, curve"
    assert "edges between channels" in text(test)
    odd = page(
        built, monkeypatch, "find", model="induction", n="16", size="9999", seed="x", method="magic"
    )
    assert not odd.exception
    assert {
        "There is no size 9999 here: showing 26.", "There is no seed x here: showing 0.",
        "There is no method magic here: showing eap-ig.",
    } == {read(w) for w in odd.warning}  # fmt: skip
    assert odd.query_params["size"] == "26"


def test_a_refusal_is_said_once_and_nothing_starts_again(
    built: Workspace, finding: list[dict[str, Any]], monkeypatch
) -> None:
    tried = []

    def refuse(*_: Any, **__: Any) -> Discovery:
        tried.append(1)
        raise ValueError("the score of 0.1 -> logits is not finite")

    monkeypatch.setattr("apps.cached.discover", refuse)
    test = page(built, monkeypatch, "find", guard=True, **ASKED, size="15")
    test.button(key="find-run").click().run()
    assert not test.exception
    assert [read(e) for e in test.error] == ["the score of 0.1 -> logits is not finite"]
    test.run()
    assert not test.error
    assert test.button(key="find-run")
    assert tried == [1]


def test_a_stopped_run_goes_on_unless_it_was_cancelled(
    built: Workspace, found: tuple[Task, Discovery], finding: list[dict[str, Any]], monkeypatch
) -> None:
    """A run of the page is stopped by a newer one, which the tab's answer may ask for as well as a person."""
    stopped = []

    def stop(*_: Any, **__: Any) -> Discovery:
        stopped.append(1)
        st.stop()

    monkeypatch.setattr("apps.cached.discover", stop)
    test = page(built, monkeypatch, "find", **ASKED, size="17")
    test.button(key="find-run").click().run()
    assert "find-run" not in [b.key for b in test.button]
    test.button(key="find-cancel").click().run()
    assert test.button(key="find-run")
    assert stopped == [1]
    test.button(key="find-run").click().run()
    monkeypatch.setattr("apps.cached.discover", lambda *_, **__: found[1])
    test.run()
    assert "Edges by score" in text(test)


def test_the_grain_is_that_of_the_command_line(
    built: Workspace, found: tuple[Task, Discovery], monkeypatch
) -> None:
    asked: list[tuple[EdgeGraph, dict[str, Any]]] = []
    monkeypatch.setattr(
        "apps.cached.discover", lambda graph, *_, **more: asked.append((graph, more)) or found[1]
    )
    choices = ASKED | {"size": "12", "spans": "0-8,9-", "kv": "head"}
    test = page(built, monkeypatch, "find", guard=True, **choices)
    assert not test.exception
    assert [e.label for e in test.expander] == ["Grain"]
    assert "212 edges between heads and MLPs at spans 0-8,9-" in text(test)
    assert "find-latents" not in [t.key for t in test.text_input], "it has no autoencoder"
    test.button(key="find-run").click().run()
    ((graph, _),) = asked
    assert graph.choices == {"kv": "head", "spans": "0-8,9-"}
    said = next(read(c) for c in test.caption if "The same:" in c.value)
    told = given("discovering.found_circuit", *shlex.split(said.partition("circuits ")[2]))
    assert told["graph"].choices == graph.choices
    monkeypatch.setattr(
        "circuits.discovery.discover",
        lambda graph, *_, **more: asked.append((graph, more)) or found[1],
    )
    exec(compile(test.code[0].value, "copied", "exec"), {})
    assert asked[1][0].choices == graph.choices
    assert "what head 3 of layer 0 adds to the keys" in text(test)
    test.text_input(key="find-spans").set_value("0-4,9-").run()
    assert test.query_params["spans"] == "0-4,9-"
    assert "expected ranges that hold each position once" in read(test.error[0])


def test_choices_of_a_search_are_explained(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "find", **ASKED)
    for key, options in (("method", Method), ("search", Search), ("ablation", Ablation)):
        said = re.findall(r"[a-z][a-z-]*", read(test.selectbox(key=f"choose-{key}").help))
        assert [name for name in get_args(options) if name not in said] == []


def test_acdc_takes_a_threshold(
    built: Workspace, finding: list[dict[str, Any]], monkeypatch
) -> None:
    test = page(built, monkeypatch, "find", **{**ASKED, "search": "acdc", "threshold": "0.5"})
    test.button(key="find-run").click().run()
    assert finding[0]["threshold"] == 0.5
    assert "size" not in finding[0]
    test.number_input(key="choose-threshold").set_value(0.25).run()
    assert test.query_params["threshold"] == "0.25"
    assert test.button(key="find-run").label == "Find the circuit", "another one"


def test_ones_own_text_and_what_is_responsible(built: Workspace, monkeypatch) -> None:
    test = page(
        built,
        monkeypatch,
        "yours",
        model="induction",
        site="blocks.1.attn.hook_z",
        **{"from": "your own"},
    )
    assert not test.exception
    assert "Most active at" in text(test)
    assert "Rank correlation with true ablation" in text(test)
    test.text_input(key="own text").set_value("1 2 999").run()
    assert "999" in read(test.error[0])


def test_the_case_is_live(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "case")
    assert not test.exception
    assert "Not measured here yet" in text(test)
    test.slider(key="case-angle").set_value(180).run()
    assert not test.exception


def test_two_units_side_by_side(built: Workspace, monkeypatch) -> None:
    test = page(built, monkeypatch, "compare", model="cleanroom", unit="line:1", other="line:2")
    assert not test.exception
    assert "line:1 · line 15°" in text(test)
    assert "line:2 · line 30°" in text(test)
    assert "line:999" in read(
        page(built, monkeypatch, "compare", model="cleanroom", unit="line:999").error[0]
    )


def test_what_is_copied_out_runs(built: Workspace, monkeypatch) -> None:
    """The Python of a unit's page and of its edits."""
    shown = page(built, monkeypatch, model="cleanroom", site="line", unit="2")
    edits = page(built, monkeypatch, "edits", model="cleanroom", on="line:3")
    codes = [
        c.value
        for test in (shown, edits)
        for c in test.code
        if c.value.startswith("import circuits")
    ]
    assert len(codes) >= 3
    monkeypatch.chdir(built.root)
    Recipe.of(load_model("cleanroom"), [zero("line:3")]).save(built.root / "recipe.json")
    for code in codes:
        exec(compile(code, "copied", "exec"), {})


def test_no_page_is_long() -> None:
    views = Path(show.__code__.co_filename).parents[1] / "apps" / "views"
    assert all(len(path.read_text().splitlines()) <= 150 for path in views.glob("*.py"))
    cached = [
        p.name
        for p in views.parent.rglob("*.py")
        if "@st.cache_" in p.read_text() and p.name != "cached.py"
    ]
    assert not cached


# --- what others write ---------------------------------------------------------------------------

AS_TEXT = {
    "text", "code", "json", "arrow_data_frame", "empty", "text_input", "vega_lite_chart", "html",
}  # fmt: skip
"""Elements whose contents are no Markdown; their labels and help texts are."""


def tags(test: AppTest) -> set[str]:
    """The tags in the HTML of a page, whose pictures hold what they show: nothing is fetched."""
    bodies = [e.proto.body for part in (test.main, test.sidebar) for e in part if e.type == "html"]
    for body in bodies:
        sources = re.findall(r"<\s*img[^>]*\ssrc='([^']*)'", body)
        assert len(sources) == body.count("<img")
        assert all(re.fullmatch(r"data:image/\w+;base64,[\w+/=]*", source) for source in sources)
    return {tag for body in bodies for tag in re.findall(r"<\s*/?\s*([^\s>/]*)", body)}


def markdown(test: AppTest) -> set[str]:
    """All texts of a page that Streamlit reads as Markdown."""
    found = set()
    for part in test.main, test.sidebar:
        for element in part:
            proto = getattr(element, "proto", None)
            for name in "label", "help", "body", "caption", "text", "delta":
                if name not in ("body", "text") or element.type not in AS_TEXT:
                    found.add(getattr(proto, name, ""))
            if element.type in ("imgs", "image"):
                found |= {image.caption for image in getattr(proto, "imgs", ())}
    return {str(text) for text in found if isinstance(text, str) and text}


def runs(code: str) -> bool:
    """Whether a script or a command line to copy does more than it should."""
    if code.startswith(("import ", "from ")):
        return any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(code)))
    words = shlex.shlex(code, posix=True, punctuation_chars=True)
    return code.startswith("circuits ") and not {*";&|<>$`", "("}.isdisjoint(words)


def test_nothing_that_others_write_becomes_markdown(tmp_path: Path, monkeypatch) -> None:
    """Names, notes, URLs: a picture in them would be fetched by everybody who looks."""
    monkeypatch.setenv("CIRCUITS_TRUST_PYTHON", "1")
    place = hostile.hostile(tmp_path)
    sources = [ast.parse(path.read_text()) for path in Path(apps.__file__).parent.rglob("*.py")]
    own = {n.value for tree in sources for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    seen = set()
    shown = [*hostile.pages(place)][:14] + [*hostile.asked()][:5]  # `test_browser` sees all
    assert {view for view, _ in shown} == set(TITLES)
    for view, query in shown:
        test = page(place, monkeypatch, view, guard=True, **query)
        assert not test.exception, (view, query, test.exception)
        for written in markdown(test) - own:
            assert not live(written.replace("**", "")), (view, written)
            assert "\u202e" not in written, (view, written)
            seen.add(read(written))
        assert tags(test) <= {"style", "div", "span", "img"}, (view, query)
        assert not [c.value for c in test.code if runs(c.value)], (view, query)
    for name in hostile.NAMES:
        assert re.search("[\u202e`\n]", name) or any(name in text for text in seen), name


def test_damaged_files_leave_the_rest_to_be_seen(tmp_path: Path, monkeypatch) -> None:
    place, model = Workspace(tmp_path), load_model("cleanroom")
    harvest(model, open_source("curves"), ["line"], place, ModelRecord("cleanroom", model.hash))
    (place.database.path).write_bytes(b"no database" * 100)
    for view in ("home", "unit", "site", "circuit"):
        test = page(place, monkeypatch, view, model="cleanroom", guard=True)
        assert not test.exception, view
        assert "cannot be read" in text(test), view
    place.database.path.unlink()
    folder = place.model_folder(model.hash)
    build_graph(model, folder).close()
    whole = (folder / "graph.h5").read_bytes()
    (folder / "graph.h5").write_bytes(whole[: len(whole) // 2])
    test = page(place, monkeypatch, "circuit", model="cleanroom", unit="line:1")
    assert not test.exception
    assert "nodes" in text(test), "it is made anew"
    statistics = next(folder.glob("*/*/statistics.h5"))
    statistics.write_bytes(statistics.read_bytes()[:5000])
    test = page(place, monkeypatch, "home", guard=True)
    assert not test.exception
    assert "Models in this workspace" in text(test)
    statistics.write_bytes(b"nothing")
    assert "has a damaged statistics.h5" in text(page(place, monkeypatch, "home", guard=True))
    statistics.unlink()
    assert "is not finished" in text(page(place, monkeypatch, "home", guard=True))


def test_a_database_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch) -> None:
    place = Workspace(tmp_path)
    name_unit(place.database, "h", Unit("a", 1), "kept")
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert names_of(place.database, "h")["a:1"].body["text"] == "kept"


def test_a_click_is_done_though_its_run_of_the_page_is_stopped() -> None:
    def page() -> None:
        import streamlit as st

        from apps.address import action

        def do() -> str:
            done = st.session_state.setdefault("done", [])
            done.append(1)
            if len(done) == 3:
                raise ValueError("the third [is](http://a.example) refused")
            return f"Done {len(done)}."

        if st.session_state.get("stop"):
            st.stop()  # as when a newer run takes this one's place before its button is reached
        action("Do it", do, "it")

    test = AppTest.from_function(page, default_timeout=60).run()
    test.button("it").click().run()
    assert [box.value for box in test.success] == ["Done 1."]
    test.session_state["stop"] = True
    test.button("it").click().run()
    assert test.session_state["done"] == [1, 1]
    test.session_state["stop"] = False
    test.run()
    assert [box.value for box in test.success] == ["Done 2."], "said when it can be"
    test.button("it").click().run()
    assert [box.value for box in test.error] == ["the third `[is](http://a.example)` refused"]
    assert not test.run().error, "said once"
