"""Reports of cases: one HTML file with its figures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from circuits.files import replacing

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .9em; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9em; }
td, th { padding: .2rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr + tr { border-top: 1px solid #ddd; }
details { margin: 1rem 0; }
"""


def write_html(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a report of a title and parts that are HTML."""
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style>" + "\n".join(parts) + "</html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(text)


def figures_of(stage: str, shown: Mapping[str, Path]) -> list[str]:
    """A heading and a stage's figures."""
    return [f"<h2>{escape(stage.capitalize())}</h2>", *(_figure(c, f) for c, f in shown.items())]


def _figure(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    image = f"<img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def table_of(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers have three digits."""
    head = "".join(f"<th>{escape(c)}" for c in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(v)}' for v in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else escape(str(value))


def interval_text(measure: Mapping[str, Any], digits: int) -> str:
    """A value with its interval, where it has both."""
    if measure["value"] is None:
        return "n/a"
    low, high = measure["low"], measure["high"]
    between = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{measure['value']:.{digits}f}{between}"
