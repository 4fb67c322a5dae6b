"""Published sites: every link leads somewhere inside, hostile words stay words, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from circuits import Examples, HookedModel, Unit, Workspace, load_model
from circuits.cli.main import run
from circuits.concepts import name_unit
from circuits.faces import make_faces
from circuits.graph.circuit import CircuitGraph
from circuits.graph.saved import save_circuit
from circuits.harvesting import harvest
from circuits.models.adapter.inputs import ImageInput
from circuits.publishing import Chosen, publish, writing
from circuits.stimuli.sources import open_source
from circuits.workspace import ModelRecord
from tests.test_faces import Bright

EVIL = "</script><img src=x onerror=alert(1)>\u2028'\""
PRIVATE, SECRET = "a note for me alone", "what I call it"


@dataclass(frozen=True)
class Made:
    """A workspace with a model, a store of three images, faces, and a circuit."""

    place: Workspace
    model: HookedModel
    examples: dict[Path, Examples]

    def chosen(self, **more: object) -> Chosen:
        return Chosen.of(self.place, self.model, {"relu": [0, 1, 2]}, ["ring"], self.examples)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("publish")
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(images / f"{i}<b>.png")
    place = Workspace(folder / "ws")
    model = HookedModel(Bright(), ImageInput(3, 48, 48), f"bright{EVIL}")
    source = open_source(f"folder:{images}")
    store = harvest(model, source, ["relu", "sees"], place, ModelRecord("bright", model.hash))
    examples = Examples(model, source, None)
    make_faces(place, model, store, source)
    circuit = CircuitGraph(model_hash=model.hash)
    circuit.add_edge(
        Unit("sees", 0), Unit("relu", 0), "w", kind="weight", norm=1.0, sum=1.0, typical=1.0
    )
    name_unit(place.database, model.hash, Unit("relu", 1), f"{SECRET}{EVIL}")
    save_circuit(place.database, "ring", circuit, f"{PRIVATE}{EVIL}")
    return Made(place, model, {store.folder: examples})


class _Links(HTMLParser):
    """The addresses that a page names, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def _pages(folder: Path) -> Iterator[tuple[Path, _Links]]:
    for path in folder.rglob("*.html"):
        links = _Links()
        links.feed(path.read_text(encoding="utf-8"))
        yield path, links


def test_every_link_leads_somewhere_inside(made: Made, tmp_path: Path) -> None:
    found = publish(made.place, tmp_path / "site", [made.chosen()])
    assert found.n_units == 3
    assert found.n_pages == len(list(found.folder.rglob("*.html"))) == 3 + 1 + 1 + 1
    seen = set()
    for path, links in _pages(found.folder):
        for link in links.found:
            parts = urlsplit(link)
            assert not parts.scheme, link
            assert not parts.netloc, link
            target = (path.parent / unquote(parts.path)).resolve()
            assert target.is_file(), (path, link)
            assert target.is_relative_to(found.folder.resolve())
            seen.add(target)
        for tag, attributes in links.tags:
            assert tag != "img" or attributes.get("alt"), path
    files = {p.resolve() for p in found.folder.rglob("*") if p.is_file()}
    assert files - seen == {found.folder / writing.MARK}, "no file is in vain"
    assert found.n_bytes == sum(f.stat().st_size for f in files)


def test_hostile_words_stay_words_and_private_ones_at_home(made: Made, tmp_path: Path) -> None:
    for notes, names in ((False, True), (True, False)):
        found = publish(
            made.place,
            tmp_path / f"site{notes}",
            [made.chosen()],
            title=EVIL,
            names=names,
            notes=notes,
        )
        for path, links in _pages(found.folder):
            assert all(a.get("src") != "x" and "onerror" not in a for _, a in links.tags), path
            scripts = [a for tag, a in links.tags if tag == "script"]
            assert all(a.get("src") for a in scripts), "no script inside a page"
        script = (found.folder / "data" / "units.js").read_text()
        assert "<" not in script
        assert script.isascii()
        units = json.loads(
            script.removeprefix("window.CIRCUITS_UNITS = ").rstrip().removesuffix(";")
        )
        name = f" · {SECRET}{EVIL}" if names else ""
        assert [u[0] for u in units] == ["relu:0", f"relu:1{name}", "relu:2"]
        everything = b"".join(p.read_bytes() for p in found.folder.rglob("*") if p.is_file())
        assert (PRIVATE.encode() in everything) == notes
        assert (SECRET.encode() in everything) == names


def test_a_site_is_replaced_only_if_asked_and_nothing_else_ever(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "site"
    publish(made.place, out, [made.chosen()])
    with pytest.raises(FileExistsError, match="has a site already"):
        publish(made.place, out, [made.chosen()])
    (out / "old.txt").write_text("x")
    publish(made.place, out, [made.chosen()], replace=True)
    assert not (out / "old.txt").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="was not published by circuits"):
        publish(made.place, other, [made.chosen()], replace=True)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "site"], "nothing is left behind"


def test_what_is_too_large_or_stopped_leaves_the_old_site(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "site"
    publish(made.place, out, [made.chosen()], title="first")
    with pytest.raises(
        ValueError, match=r"the site takes .* and size 0\.001 allows 1 kB|0\.001 MB"
    ):
        publish(made.place, out, [made.chosen()], size=0.001, replace=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(made.place, out, [made.chosen()], replace=True, progress=stop)
    assert "<title>first</title>" in (out / "index.html").read_text()
    # Killed between the two renames: the next run finds the old site again.
    os.rename(out, tmp_path / ".site.old")
    with pytest.raises(FileExistsError, match="has a site already"):
        publish(made.place, out, [made.chosen()])
    assert "<title>first</title>" in (out / "index.html").read_text()


def test_bad_input_is_one_line(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "site"
    for error, said, call in (
        (ValueError, "nothing is chosen", lambda: publish(made.place, out, [])),
        (ValueError, "n_examples -1", lambda: publish(made.place, out, [made.chosen()], n_examples=-1)),
        (FileNotFoundError, "case 'ioi' has no report", lambda: publish(made.place, out, [], cases=["ioi"])),
        (KeyError, "circuit", lambda: Chosen.of(made.place, made.model, {}, ["rung"])),
        (KeyError, "relo", lambda: Chosen.of(made.place, made.model, {"relo": [0]})),
        (ValueError, "7", lambda: Chosen.of(made.place, made.model, {"relu": [7]})),
    ):  # fmt: skip
        with pytest.raises(error, match=said) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not out.exists()


def test_a_language_model_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--workspace", str(tmp_path / "ws")]
    model = load_model("induction")
    command = [
        "harvest",
        "induction",
        "--data",
        "repeats",
        "--sites",
        "blocks.1.attn.hook_z",
        "--workers",
        "1",
    ]
    assert run([*command, *at]) == 0
    report = tmp_path / "ws" / "cases" / "curve_detector" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<!doctype html><title>a case</title>")
    out = str(tmp_path / "site")
    assert run(["publish", "induction", out, "--cases", "curve-detector", "--sites", "z", *at]) == 0
    n = model.site("blocks.1.attn.hook_z").n_units
    assert (
        f"published {n + model.site('blocks.0.attn.hook_z').n_units} units"
        in capsys.readouterr().out
    )
    text = next((tmp_path / "site").rglob("blocks.1.attn.hook_z/1.html")).read_text()
    assert "<mark>" in text
    assert (tmp_path / "site" / "cases" / "curve-detector" / "index.html").is_file()
    assert run(["publish", "induction", out, "--sites", "z", *at]) == 2
    assert "has a site already" in capsys.readouterr().err
    assert (
        run(["publish", "induction", str(tmp_path / "b"), "--sites", "z", "--size", "0", *at]) == 2
    )
    assert not (tmp_path / "b").exists()
