"""The pages of a published site, as HTML: what they say, with every word of others escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import log1p
from typing import Any

from circuits.store import UnitStatistics

_BARS = 44
"""Bars of a spectrum."""


@dataclass(frozen=True)
class Picture:
    """A picture on a page.

    Attributes:
        file: its address from the site's root; empty where a word stands in for it.
        about: what it is, for those who do not see it.
        word: the token that stands in for it.
    """

    file: str
    about: str
    word: str = ""


@dataclass(frozen=True)
class Entry:
    """A unit as others link to it.

    Attributes:
        unit: as it is written, `SITE:INDEX`.
        page: its page from the site's root; empty if it is not published.
        face: what it is shown by; None if there is nothing.
        name: what people call it; empty if it has no name, or names are not published.
    """

    unit: str
    page: str
    face: Picture | None = None
    name: str = ""

    @property
    def title(self) -> str:
        """The unit and its name."""
        return f"{self.unit} · {self.name}" if self.name else self.unit


@dataclass(frozen=True)
class UnitPage:
    """All that a unit's page says.

    Attributes:
        entry: the unit.
        model: the model's name.
        facts: lines on where its numbers are from.
        statistics: how active it is; None if it was not harvested.
        examples: the strongest examples: pictures with captions.
        texts: the strongest texts: before the peak, at it, after it, and a caption.
        read: what it reads: units with the strength of the weights.
        feeds: what it feeds, likewise.
        circuits: names and pages of the circuits that it is in.
        neighbours: the pages before and after it; empty at the ends.
    """

    entry: Entry
    model: str
    facts: Sequence[str]
    statistics: UnitStatistics | None = None
    examples: Sequence[tuple[Picture, str]] = ()
    texts: Sequence[tuple[str, str, str, str]] = ()
    read: Sequence[tuple[Entry, str]] = ()
    feeds: Sequence[tuple[Entry, str]] = ()
    circuits: Sequence[tuple[str, str]] = ()
    neighbours: tuple[str, str] = ("", "")
    above: Sequence[tuple[str, str]] = field(default=())


def page(
    title: str, root: str, trail: Sequence[tuple[str, str]], parts: Iterable[str], data: str = ""
) -> str:
    """A whole page.

    Args:
        title: of the page.
        root: the way to the site's root: empty, or `../` as often as the page is deep.
        trail: names and addresses, from the root, of the pages above it.
        parts: HTML.
        data: a script with data that the page needs, from the root.
    """
    links = " › ".join(f'<a href="{escape(root + to)}">{escape(name)}</a>' for name, to in trail)
    scripts = "".join(
        f'<script src="{escape(root + s)}"></script>' for s in (data, "static/script.js") if s
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="stylesheet" href="{escape(root)}static/style.css"></head>'
        f"<body><header>{links}</header><main><h1>{escape(title)}</h1>{''.join(parts)}</main>"
        f"<footer>Published with circuits.</footer>{scripts}</body></html>\n"
    )


def face(picture: Picture | None, root: str, size: int = 76) -> str:
    """A unit's face; an empty frame if it has none."""
    if picture is None:
        return '<span class="face" title="nothing that was harvested makes it active"></span>'
    if not picture.file:
        return f'<span class="face word" title="{escape(picture.about)}">{escape(_shown(picture.word))}</span>'
    return (
        f'<img class="face" src="{escape(root + picture.file)}" alt="{escape(picture.about)}" width="{size}" '
        f'height="{size}" loading="lazy">'
    )


def _shown(word: str) -> str:
    """A token as it can be seen."""
    return word.replace("\n", "↵").replace("\t", "⇥")


def wall(entries: Iterable[Entry], root: str, filtered: bool = False) -> str:
    """Units by their faces, each a link to its page."""
    items = []
    for e in entries:
        words = f' data-words="{escape(e.title.lower())}"' if filtered else ""
        label = e.unit.rpartition(":")[2] + (f" {e.name}" if e.name else "")
        items.append(
            f'<li{words}><a href="{escape(root + e.page)}" title="{escape(e.title)}">{face(e.face, root)}'
            f"{escape(label)}</a></li>"
        )
    return f'<ul class="wall">{"".join(items)}</ul>'


def strip(layers: Iterable[tuple[str, str, Sequence[Entry]]], root: str) -> str:
    """A network as a strip of its sites, each with some of its units: names, pages and units."""
    made = [
        f'<section class="layer"><h3><a href="{escape(root + to)}">{escape(name)}</a></h3>{wall(some, root)}</section>'
        for name, to, some in layers
    ]
    about = 'tabindex="0" role="region" aria-label="the network, layer by layer"'
    return f'<div class="strip" {about}>{"".join(made)}</div>'


def unit_page(unit: UnitPage, root: str) -> str:
    """A unit's page."""
    before, after = unit.neighbours
    near = "".join(
        f'<a rel="{rel}" href="{escape(root + to)}">{label}</a> '
        for rel, to, label in (("prev", before, "← previous"), ("next", after, "next →"))
        if to
    )
    main = [
        f"<p>{near}</p>" if near else "",
        '<div class="unit"><div class="portrait">',
        face(unit.entry.face, root, 300),
    ]
    main += [f'<p class="soft">{escape(unit.entry.face.about)}</p>' if unit.entry.face else ""]
    main += [f'<p class="soft">{"<br>".join(map(escape, unit.facts))}</p></div><div>']
    if unit.examples:
        main.append("<h2>Examples that excite it most</h2><div class='examples'>")
        main += [
            f"<figure>{face(picture, root, 120)}<figcaption>{escape(caption)}</figcaption></figure>"
            for picture, caption in unit.examples
        ]
        main.append("</div>")
    if unit.texts:
        main.append("<h2>Texts that excite it most</h2><div class='scroll'><table class='texts'>")
        main += [
            f"<tr><td>{escape(before)}<mark>{escape(_shown(peak))}</mark>{escape(after)}</td>"
            f"<td class='soft'>{escape(said)}</td></tr>"
            for before, peak, after, said in unit.texts
        ]
        main.append("</table></div>")
    if unit.statistics is not None:
        main += ["<h2>How active it is</h2>", spectrum(unit.statistics), _numbers(unit.statistics)]
    for title, rows in (("What it reads", unit.read), ("What it feeds", unit.feeds)):
        if rows:
            main.append(f"<h2>{title}</h2>{_weights(rows, root)}")
    if unit.circuits:
        found = ", ".join(
            f'<a href="{escape(root + to)}">{escape(name)}</a>' for name, to in unit.circuits
        )
        main.append(f"<h2>In circuits</h2><p>{found}</p>")
    main.append("</div></div>")
    return page(unit.entry.title, root, unit.above, main)


def _weights(rows: Sequence[tuple[Entry, str]], root: str) -> str:
    """Units at the other end of weights, with the strength below; a link where they are published."""
    items = []
    for e, said in rows:
        inner = f"{face(e.face, root)}{escape(e.unit)}"
        linked = (
            f'<a href="{escape(root + e.page)}" title="{escape(e.title)}">{inner}</a>'
            if e.page
            else inner
        )
        items.append(f'<li>{linked}<span class="soft"><br>{escape(said)}</span></li>')
    return f'<ul class="wall">{"".join(items)}</ul>'


def _numbers(found: UnitStatistics) -> str:
    rows = [
        ("largest", found.maximum), ("mean", found.mean), ("standard deviation", found.std),
        ("share above 0", found.density),
    ]  # fmt: skip
    return table(("activation", "value"), [(name, f"{value:.3g}") for name, value in rows])


def spectrum(found: UnitStatistics) -> str:
    """How often each activation occurs, as bars on a logarithmic scale."""
    edges, counts = found.edges.tolist(), found.histogram[1:-1].tolist()
    last = max((i for i, n in enumerate(counts) if n), default=0) + 1
    first = min((i for i, n in enumerate(counts) if n), default=0)
    counts, low, high = counts[first:last], edges[first], edges[last]
    step = -(-len(counts) // _BARS) or 1
    bars = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    heights = [log1p(n) for n in bars]
    tall = max(heights) or 1
    drawn = "".join(
        f'<rect x="{i * 12:d}" y="{100 - 92 * h / tall:.1f}" width="10" height="{92 * h / tall:.1f}"/>'
        for i, h in enumerate(heights)
    )
    wide = 12 * len(bars)
    return (
        f'<svg class="spectrum" viewBox="-2 0 {wide + 4:d} 118" role="img" aria-label="histogram of activations from '
        f'{low:.3g} to {high:.3g}, logarithmic">{drawn}<text x="0" y="114">{low:.3g}</text>'
        f'<text x="{wide:d}" y="114" text-anchor="end">{high:.3g}</text></svg>'
        '<p class="soft">How often each activation occurs; heights are logarithmic.</p>'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of escaped texts; the last column is numbers."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape(v)}</td>" for v in row[:-1])
        + f'<td class="number">{escape(row[-1])}</td></tr>'
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def as_script(name: str, value: Any) -> str:
    """A classic script that puts data into a variable of the window, safe inside a page as well.

    >>> as_script("X", ["</script>"])
    'window.X = ["\\\\u003c/script\\\\u003e"];\\n'
    """
    text = json.dumps(value)  # ASCII, so that no line separator of Unicode ends a line
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return f"window.{name} = {text};\n"
