"""Reading figures: the views of a Vega-Lite specification with their data, and where an SVG has its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from circuits.figures import Figure, figure_bytes

SVG = "{http://www.w3.org/2000/svg}"


@dataclass
class View:
    """One mark with its data.

    Attributes:
        panel: the number of the panel it is in.
        mark: its type.
        look: the mark's other properties.
        encoding: by channel.
        rows: its data.
    """

    panel: int
    mark: str
    look: dict[str, Any]
    encoding: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)

    def values(self, name: str) -> list[Any]:
        """A field of all rows."""
        return [row[name] for row in self.rows]


def views(figure: Figure, mark: str = "") -> list[View]:
    """All views, or those with a mark; the specification is checked against the schema."""
    spec = figure.to_dict()
    held, panels = spec.get("datasets", {}), iter(range(1000))

    def inside(part: dict[str, Any], above: dict[str, Any], panel: int | None) -> Iterator[View]:
        data = part.get("data", above.get("data"))
        encoding = {**above.get("encoding", {}), **part.get("encoding", {})}
        here = {"data": data, "encoding": encoding}
        for key in ("concat", "hconcat", "vconcat"):
            for one in part.get(key, ()):
                yield from inside(one, here, None)
        number = next(panels) if panel is None and ("layer" in part or "mark" in part) else panel
        for one in part.get("layer", ()):
            yield from inside(one, here, number)
        if "mark" in part:
            look = part["mark"] if isinstance(part["mark"], dict) else {"type": part["mark"]}
            rows = held[data["name"]] if "name" in data else data["values"]
            assert number is not None, "a mark is in a panel"
            yield View(number, look["type"], look, encoding, rows)

    return [v for v in inside(spec, {}, None) if not mark or v.mark == mark]


def unlabelled(figure: Figure) -> list[tuple[int, str]]:
    """Panels and axes that are drawn and have no title of their own."""
    found = views(figure)
    missing = []
    for panel in sorted({v.panel for v in found}):
        for channel in ("x", "y"):
            drawn = [v.encoding.get(channel, {}) for v in found if v.panel == panel]
            drawn = [e for e in drawn if "field" in e and e.get("axis", True) is not None]
            if drawn and not any(e.get("title") for e in drawn):
                missing.append((panel, channel))
    return missing


def svg_texts(figure: Figure, role: str = "") -> list[tuple[float, float, str]]:
    """Every line of text in the figure's SVG with its place; of one role where it is named."""
    root = ElementTree.fromstring(figure_bytes(figure, "svg"))
    found: list[tuple[float, float, str]] = []

    def walk(element: ElementTree.Element, x: float, y: float, inside: bool) -> None:
        moved = re.match(r"translate\(([-\d.]+),([-\d.]+)\)", element.get("transform", ""))
        if moved:
            x, y = x + float(moved[1]), y + float(moved[2])
        inside = inside or role in element.get("class", "")
        if element.tag == f"{SVG}text" and inside:
            lines = [element] if element.text else list(element)
            dy = 0.0
            for line in lines:
                dy += float(line.get("dy", 0)) if line is not element else 0.0
                found.append((x, y + dy, line.text or ""))
        for child in element:
            walk(child, x, y, inside)

    walk(root, 0.0, 0.0, not role)
    return found
