"""Publishing: units, circuits and cases of a workspace as a folder of plain files, for any web server or none."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from PIL import Image

from circuits.concepts import names_of
from circuits.examples import Examples
from circuits.faces import box_of, faces_of
from circuits.figures import circuit_figure
from circuits.figures.saving import figure_bytes
from circuits.files import write_json
from circuits.graph.saved import circuits_with, load_circuit, saved_circuits
from circuits.harvesting import find_stores
from circuits.locks import held
from circuits.memory import in_bytes
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.progress import Progress
from circuits.publishing import pages
from circuits.publishing.pages import Entry, Picture, UnitPage
from circuits.stimuli.spelling import words_of
from circuits.store import ActivationStore, Example
from circuits.tables import Table
from circuits.units import Unit, unknown
from circuits.weights import both_ways
from circuits.workspace import Workspace

MARK = "circuits-site.json"
"""The file by which a folder is known to have been published: no other folder is ever replaced."""

SIZE = 100
"""Megabytes that a site takes at most, if nobody says otherwise."""

_EXAMPLE, _LARGE = 160, 300
"""Pixels along a side of an example and of a unit's own picture."""

_NEAR = 6
"""Units at the other ends of weights."""

_STRIP = 8
"""Units of each site in the strip of the network."""

_BEFORE, _AFTER = 24, 8
"""Tokens of a text before and after its peak."""


@dataclass(frozen=True)
class Chosen:
    """What of one model is published.

    Attributes:
        model: the model.
        units: its units, by site, in order.
        store: where activations of a site are; sites that were not harvested are left out.
        examples: the examples of each of these stores, by its folder; those that cannot be read are left out.
        circuits: names of saved circuits.
    """

    model: HookedModel
    units: Mapping[str, Sequence[int]]
    store: Mapping[str, ActivationStore] = field(default_factory=dict)
    examples: Mapping[Path, Examples] = field(default_factory=dict)
    circuits: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        model: HookedModel,
        units: Mapping[str, Sequence[int]],
        circuits: Sequence[str] = (),
        examples: Mapping[Path, Examples] | None = None,
    ) -> Chosen:
        """Some units and circuits of a model, with what the workspace knows of them.

        Raises:
            KeyError: if there is no such site or circuit.
            ValueError: if a site has no such unit.
        """
        wanted = {}
        for name, indices in units.items():
            site = model.site(name)
            wanted[site.name] = sorted({site.unit(i).index for i in indices})
        saved = [r.name for r in saved_circuits(workspace.database, model.hash) if not r.fault]
        for name in circuits:
            if name not in saved:
                raise unknown(f"circuit of {model.name}", name, saved)
        stores = {
            name: store for store in find_stores(workspace, model.hash) for name in store.sites
        }
        return cls(
            model,
            wanted,
            {n: stores[n] for n in wanted if n in stores},
            examples or {},
            tuple(circuits),
        )


@dataclass(frozen=True)
class Published:
    """A site that was written.

    Attributes:
        folder: where it is.
        n_units: how many units have a page.
        n_pages: how many pages there are.
        n_bytes: how large all of it is.
        left_out: what is not in it and why, in lines.
    """

    folder: Path
    n_units: int
    n_pages: int
    n_bytes: int
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "folder": str(self.folder), "units": self.n_units, "pages": self.n_pages, "bytes": self.n_bytes,
            "left_out": list(self.left_out),
        }  # fmt: skip

    def tables(self) -> Iterator[Table | str]:
        """What was written, in a line, and what was left out."""
        yield (
            f"published {self.n_units} units on {self.n_pages} pages, {in_bytes(self.n_bytes)}: open "
            f"{self.folder / 'index.html'}"
        )
        yield from self.left_out


def publish(
    workspace: Workspace,
    out: str | Path,
    chosen: Sequence[Chosen],
    *,
    cases: Sequence[str] = (),
    title: str = "Circuits",
    names: bool = False,
    notes: bool = False,
    n_examples: int = 6,
    size: float = SIZE,
    replace: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Write a site of chosen units, circuits and cases: HTML, pictures and plain scripts, without any request.

    Nothing but what is chosen goes in. The site is written next to its place and put there when it is whole.

    Args:
        workspace: what it is made from.
        out: its folder.
        chosen: units and circuits, by model.
        cases: names of cases whose reports go in.
        title: of the first page.
        names: whether the names that people gave to units go in.
        notes: whether the notes that people wrote on circuits go in.
        n_examples: the strongest examples that each unit's page shows.
        size: how many megabytes it may have.
        replace: whether a site that is there already is replaced.
        progress: called with the units done and all there are.

    Raises:
        FileExistsError: if there is something at `out` that is not a site of this kind, or is one and `replace` is not
            set.
        BlockingIOError: if another process publishes to the same place.
        FileNotFoundError: if a case has no report in the workspace.
        ValueError: if nothing is chosen, a number is out of range, or the site is larger than `size`.
        OSError: if it cannot be written.
    """
    if not any(c.units or c.circuits for c in chosen) and not cases:
        raise ValueError("nothing is chosen: expected units, circuits or cases to publish")
    if n_examples < 0 or not size > 0:
        raise ValueError(
            f"n_examples {n_examples} and size {size}: expected at least 0, and more than 0"
        )
    place = Path(out).absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    # Not next to the site, where it would be left lying.
    digest = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]
    lock = Path(gettempdir()) / f"circuits-publish-{digest}.lock"
    with held(lock, f"{str(place)!r} is being published by another process"):
        temporary, old = (place.with_name(f".{place.name}.{mark}") for mark in ("new", "old"))
        if old.exists() and not place.exists():  # a run was killed between two renames
            os.rename(old, place)
        _check_place(place, replace)
        reports = {name: _report(workspace, name) for name in cases}
        for left in (temporary, old):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        site = _Site(temporary, workspace, names, notes, n_examples, title)
        try:
            n_units = site.write(chosen, reports, progress)
            n_bytes = _size_of(temporary, size)
            if place.exists():
                os.rename(place, old)
            os.rename(temporary, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not place.exists():
                os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return Published(place, n_units, site.n_pages, n_bytes, tuple(site.left_out))


def _size_of(folder: Path, size: float) -> int:
    """The bytes of a folder's files; raises ValueError if they are more than `size` megabytes."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if n_bytes > size * 1e6:
        raise ValueError(
            f"the site takes {in_bytes(n_bytes)}, and size {size:g} allows {in_bytes(size * 1e6)}: publish "
            "fewer units, show fewer examples, or allow more"
        )
    return n_bytes


def _check_place(place: Path, replace: bool) -> None:
    """Raise FileExistsError unless a site may be written there."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place.is_dir() and (place / MARK).is_file()):
        raise FileExistsError(
            f"{str(place)!r} is there and was not published by circuits: name a folder that is empty or not there"
        )
    if not replace:
        raise FileExistsError(
            f"{str(place)!r} has a site already: name another folder, or ask for it to be replaced (--replace)"
        )


def _report(workspace: Workspace, name: str) -> Path:
    """The report of a case in the workspace."""
    path = workspace.root / "cases" / name.replace("-", "_") / "report.html"
    if not path.is_file():
        path = workspace.root / "cases" / name / "report.html"
    if not path.is_file():
        raise FileNotFoundError(
            f"case {name!r} has no report in {str(workspace.root)!r}: `circuits case {name}` makes it"
        )
    return path


def slug(text: str) -> str:
    """A text as a part of an address, the same each time and safe on every file system.

    >>> slug("shapes+sae/mine"), slug("blocks.0.attn.hook_z"), slug("..")
    ('shapes-sae-mine', 'blocks.0.attn.hook_z', 'x')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:80] or "x"


class _Site:
    """A site that is being written.

    Args:
        folder: where.
        workspace: what it is made from.
        names: whether people's names of units go in.
        notes: whether people's notes on circuits go in.
        n_examples: examples on each unit's page.
        title: of the first page.
    """

    def __init__(
        self,
        folder: Path,
        workspace: Workspace,
        names: bool,
        notes: bool,
        n_examples: int,
        title: str,
    ) -> None:
        self.folder, self.workspace = folder, workspace
        self.names, self.notes, self.n_examples, self.title = names, notes, n_examples, title
        self.n_pages = 0
        self.left_out: list[str] = []
        self._slugs: dict[str, str] = {}

    def write(
        self, chosen: Sequence[Chosen], reports: Mapping[str, Path], progress: Progress | None
    ) -> int:
        """Write all of it; returns the number of units with a page."""
        folder = self.folder / "static"
        folder.mkdir(parents=True)
        for file in ("style.css", "script.js"):
            text = (
                resources.files("circuits.publishing").joinpath("static", file).read_text("utf-8")
            )
            (folder / file).write_text(text, encoding="utf-8")
        total = sum(len(indices) for c in chosen for indices in c.units.values())
        done, sections, listed = 0, list[str](), list[list[str]]()
        for one in chosen:
            writer = _ModelWriter(self, one)
            for _ in writer.units():
                done += 1
                if progress is not None:
                    progress(done, total)
            sections += writer.section()
            listed += [[e.title, e.page] for e in writer.entries.values()]
        if reports:
            sections.append("<h2>Cases</h2><ul>")
            for name, path in reports.items():
                to = f"cases/{self.unique(name)}/index.html"
                self.put(to, path.read_text(encoding="utf-8"))
                sections.append(f'<li><a href="{to}">{pages.escape(name)}</a></li>')
            sections.append("</ul>")
        self.put("data/units.js", pages.as_script("CIRCUITS_UNITS", listed))
        found = (
            '<input type="search" id="search" hidden placeholder="Find a unit by number or name" '
            'aria-label="Find a unit">'
            '<p id="told" class="soft" role="status"></p><ul id="found"></ul>'
        )
        parts = [found if listed else "", *sections]
        self.put("index.html", pages.page(self.title, "", (), parts, "data/units.js"))
        write_json(self.folder / MARK, {"made_by": "circuits", "units": total})
        return total

    def unique(self, text: str) -> str:
        """A part of an address that no other text has."""
        if text not in self._slugs:
            wanted, n = slug(text), 1
            while (one := wanted if n == 1 else f"{wanted}-{n}") in self._slugs.values():
                n += 1
            self._slugs[text] = one
        return self._slugs[text]

    def put(self, to: str, content: str | bytes) -> None:
        """Write a file of the site."""
        path = self.folder / to
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        self.n_pages += to.endswith(".html")


class _ModelWriter:
    """The pages of one model."""

    def __init__(self, site: _Site, chosen: Chosen) -> None:
        self.site, self.chosen, self.model = site, chosen, chosen.model
        self.folder = site.unique(chosen.model.name)
        database = site.workspace.database
        self.faces = faces_of(site.workspace, self.model.hash)
        self.names = (
            {unit: str(r.body["text"]) for unit, r in names_of(database, self.model.hash).items()}
            if site.names
            else {}
        )
        units = [Unit(name, i) for name, some in chosen.units.items() for i in some]
        self.entries = {unit: self._entry(unit, True) for unit in units}
        self.circuits = [
            (name, f"{self.folder}/circuits/{site.unique(f'{self.folder} {name}')}.html")
            for name in chosen.circuits
        ]

    # --- units -----------------------------------------------------------------------------------

    def _entry(self, unit: Unit, published: bool) -> Entry:
        to = f"{self.folder}/{self.site.unique(unit.site)}/{unit.index}.html" if published else ""
        return Entry(str(unit), to, self._face(unit), self.names.get(str(unit), ""))

    def _face(self, unit: Unit) -> Picture | None:
        known = self.faces.get(unit)
        if known is None:
            return None
        if known.kind == "token":
            return Picture("", known.about, known.text) if known.text else None
        to = f"{self.folder}/{self.site.unique(unit.site)}/faces/{unit.index}.jpg"
        if not (self.site.folder / to).is_file():
            with suppress(OSError):
                self.site.put(to, _jpeg(known.picture(), _LARGE))
        return Picture(to, known.about) if (self.site.folder / to).is_file() else None

    def units(self) -> Iterator[Unit]:
        """Write the pages of all units, and say which is done."""
        order = list(self.entries)
        with self.model.steady():
            for k, unit in enumerate(order):
                near = tuple(
                    self.entries[order[j]].page
                    if 0 <= j < len(order) and order[j].site == unit.site
                    else ""
                    for j in (k - 1, k + 1)
                )
                entry = self.entries[unit]
                self.site.put(
                    entry.page, pages.unit_page(self._page(unit, (near[0], near[1])), "../../")
                )
                yield unit
        for name, some in self.chosen.units.items():
            entries = [self.entries[Unit(name, i)] for i in some]
            told = (
                '<input type="search" id="filter" hidden placeholder="Number or name" '
                'aria-label="Show units that contain">'
                f'<p id="told" class="soft" role="status">{len(entries)} units</p>'
            )
            to = f"{self.folder}/{self.site.unique(name)}/index.html"
            trail = [(self.site.title, "index.html")]
            parts = [told, pages.wall(entries, "../../", filtered=True)]
            self.site.put(to, pages.page(f"{self.model.name}, {name}", "../../", trail, parts))
        self._circuits()

    def _page(self, unit: Unit, near: tuple[str, str]) -> UnitPage:
        store = self.chosen.store.get(unit.site)
        facts = [f"{self.model.name}, weights {self.model.hash[:16]}"]
        examples: list[tuple[Picture, str]] = []
        texts: list[tuple[str, str, str, str]] = []
        statistics = None
        if store is not None:
            made = store.provenance
            facts.append(f"measured on {len(made.examples)} examples of {made.data}")
            facts.append(f"positions drawn with seed {made.depth.seed}")
            statistics = store.statistics(unit)
            best = store.top_examples(unit, self.site.n_examples)
            given = self.chosen.examples.get(store.folder)
            if given is not None and isinstance(self.model.input, ImageInput):
                examples = list(self._pictures(unit, given, best))
            elif given is not None and isinstance(self.model.input, TokenInput):
                texts = [_context(self.model.input, given, one) for one in best]
        read, feeds = self._weights(unit)
        here = {r.name for r in circuits_with(self.site.workspace.database, self.model.hash, unit)}
        above = [
            (self.site.title, "index.html"),
            (
                f"{self.model.name}, {unit.site}",
                f"{self.folder}/{self.site.unique(unit.site)}/index.html",
            ),
        ]
        return UnitPage(
            self.entries[unit], self.model.name, facts, statistics, examples, texts, read, feeds,
            [(name, to) for name, to in self.circuits if name in here], near, above,
        )  # fmt: skip

    def _pictures(
        self, unit: Unit, given: Examples, best: Sequence[Example]
    ) -> Iterator[tuple[Picture, str]]:
        """The parts of images that excite a unit most."""
        spec = self.model.input
        assert isinstance(spec, ImageInput), "checked by the caller"
        for k, one in enumerate(best):
            to = f"{self.folder}/{self.site.unique(unit.site)}/examples/{unit.index}-{k}.jpg"
            image = spec.fit(given.picture(one.index)).convert("RGB")
            top, left, bottom, right = box_of(self.model, unit.site, one, image.size)
            self.site.put(to, _jpeg(image.crop((left, top, right, bottom)), _EXAMPLE))
            at = f" at {one.position}" if one.position else ""
            yield Picture(to, f"part of {one.name}{at}"), f"{one} · {one.name}"

    def _weights(self, unit: Unit) -> tuple[list[tuple[Entry, str]], list[tuple[Entry, str]]]:
        """The strongest weights on both sides; none where they are not known."""
        try:
            read, feeds = both_ways(self.model, unit, _NEAR)
        except ValueError:  # the app's page says why; here there is just no such part
            return [], []
        return (
            [(self._other(c.source), f"{c.norm:.3g} (typical {c.typical:.3g})") for c in read],
            [(self._other(c.target), f"{c.norm:.3g} (typical {c.typical:.3g})") for c in feeds],
        )

    def _other(self, unit: Unit) -> Entry:
        return self.entries.get(unit) or self._entry(unit, False)

    # --- circuits, and the first page -------------------------------------------------------------

    def _circuits(self) -> None:
        database = self.site.workspace.database
        records = {r.name: r for r in saved_circuits(database, self.model.hash)}
        for name, to in self.circuits:
            graph = load_circuit(database, name, self.model.hash)
            drawing = f"{to.removesuffix('.html')}.svg"
            faces = {
                node: self.faces[node]
                for node in graph
                if isinstance(node, Unit) and node in self.faces
            }
            self.site.put(drawing, figure_bytes(circuit_figure(graph, faces), "svg"))
            about = f"circuit {name} of {self.model.name}: {len(graph)} nodes, {graph.number_of_edges()} edges"
            parts = [
                f'<p><img class="figure" src="../../{pages.escape(drawing)}" alt="{pages.escape(about)}"></p>'
            ]
            if self.site.notes and records[name].note:
                parts.append(f"<p>{pages.escape(records[name].note)}</p>")
            rows = [
                (str(a), str(b), str(d["kind"]), f"{d['norm']:.3g}")
                for a, b, d in sorted(graph.edges(data=True), key=lambda e: -e[2]["norm"])
            ]
            parts.append(pages.table(("from", "to", "kind", "strength"), rows))
            units = [self.entries[n] for n in graph if isinstance(n, Unit) and n in self.entries]
            if units:
                parts.append(f"<h2>Its units</h2>{pages.wall(units, '../../')}")
            trail = [(self.site.title, "index.html")]
            self.site.put(to, pages.page(name, "../../", trail, parts))

    def section(self) -> list[str]:
        """The model on the first page."""
        made = [f"<h2>{pages.escape(self.model.name)}</h2>"]
        layers = []
        for name, some in self.chosen.units.items():
            having = [i for i in some if self.entries[Unit(name, i)].face is not None] or list(some)
            n = min(_STRIP, len(having))
            shown = [self.entries[Unit(name, having[k * len(having) // n])] for k in range(n)]
            layers.append(
                (
                    f"{name} ({len(some)})",
                    f"{self.folder}/{self.site.unique(name)}/index.html",
                    shown,
                )
            )
        made.append(pages.strip(layers, ""))
        if self.circuits:
            links = ", ".join(
                f'<a href="{pages.escape(to)}">{pages.escape(name)}</a>'
                for name, to in self.circuits
            )
            made.append(f"<p>Circuits: {links}</p>")
        return made


def _jpeg(image: Image.Image, side: int) -> bytes:
    """A picture at most this large, never made larger than four times."""
    scale = min(side / max(image.size), 4.0)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _context(spec: TokenInput, given: Examples, one: Example) -> tuple[str, str, str, str]:
    """A text around the token at which a unit is most active."""
    words = words_of(spec.vocabulary, given.tokens(one.index))
    gap = "" if spec.vocabulary else " "
    at = one.position[0] if one.position else len(words) - 1
    before, after = words[max(0, at - _BEFORE) : at], words[at + 1 : at + 1 + _AFTER]
    return gap.join([*before, ""]), words[at], gap.join(["", *after]), str(one)
