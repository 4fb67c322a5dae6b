"""A verification as one page of HTML, which needs no other file, and as JSON."""

from __future__ import annotations

from html import escape
from pathlib import Path

from circuits.claims.drawing import COLOURS, interval_svg
from circuits.claims.verdicts import Quantity
from circuits.claims.verifying import Judged, Report
from circuits.errors import line
from circuits.files import replacing, write_json
from circuits.json_files import read_json
from circuits.tables import between

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b;
       background: #fff; }
h2 { margin: 2rem 0 .3rem; font-size: 1.15rem; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92em; width: 100%; }
td, th { padding: .25rem .6rem; text-align: left; vertical-align: top; } tr + tr { border-top: 1px solid #ddd; }
.verdict { font-weight: 600; padding: .1rem .5rem; border-radius: .3rem; color: #fff; white-space: nowrap; }
.note { color: #444; } svg { display: block; } pre { overflow: auto; background: #f4f4f4; padding: .6rem; }
"""


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html` and `report.json` into a folder; the page's path is returned."""
    write_json(folder / "report.json", report.to_dict())
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page(report), "utf-8")
    return path


def read_report(path: Path) -> Report:
    """The report that `write_report` wrote as JSON.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another form.
    """
    what = f"report {str(path)!r}"
    raw = read_json(path, what)
    try:
        return Report.from_dict(raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} is none that this version of circuits wrote ({line(error)}): expected one of `circuits verify`"
        ) from None


def page(report: Report) -> str:
    """The report as HTML."""
    file = report.file
    summary = report.summary
    rows = "".join(
        f"<tr><td><a href='#c{i}'>{escape(j.claim.name)}</a><td>{escape(j.claim.test)}<td>{_verdict(j)}"
        f"<td>{escape(j.claim.expect)}<td>{escape(j.why)}</tr>"
        for i, j in enumerate(report.judged)
    )
    roles = "".join(
        f"<li><b>{escape(part)}</b>: {escape(role)}" for part, role in file.roles.items()
    )
    head = "".join(f"<th>{escape(c)}" for c in summary.columns)
    task = file.task.spec or "the model’s own"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Claims: {escape(file.name)}</title><style>{_STYLE}</style><h1>{escape(summary.title)}</h1>"
        f"<p>{escape(file.about)}</p>"
        + (f"<ul>{roles}</ul>" if roles else "")
        + f"<table><tr>{head}</tr>{rows}</table><p class=note>{escape(summary.note)}</p>"
        + "".join(_section(i, j) for i, j in enumerate(report.judged))
        + f"<h2>Where the numbers come from</h2><p class=note>model {escape(file.model)}, hash "
        f"{escape(report.model_hash)}; task {escape(task)}, {file.task.examples} examples,"
        f" seed {file.task.seed}</p></html>\n"
    )


def _verdict(judged: Judged) -> str:
    mark = "" if judged.as_expected else " (not as expected)"
    colour = COLOURS[judged.verdict]
    return f"<span class=verdict style='background: {colour}'>{escape(judged.verdict)}</span>{mark}"


def _section(i: int, judged: Judged) -> str:
    claim, measured = judged.claim, judged.measured
    rows = "".join(_row(q) for q in measured.by_doubt)
    notes = "".join(f"<p class=note>{escape(note)}.</p>" for note in measured.notes)
    table = (
        "<table><tr><th>number<th>value<th>interval, and the claimed region (grey)<th>claimed<th>p for<th>p against"
        f"<th>null</tr>{rows}</table>"
        if rows
        else ""
    )
    expected = (
        f"<p>It is here although it is expected to be refuted: {escape(claim.why)}</p>"
        if claim.why
        else ""
    )
    return (
        f"<h2 id=c{i}>{escape(claim.name)} {_verdict(judged)}</h2><p>{escape(claim.statement)}</p>{expected}"
        f"<p>{escape(judged.why)}.</p>{table}{notes}"
        f"<p class=note>{escape(judged.conditions)} {_history(judged)}</p>"
    )


def _history(judged: Judged) -> str:
    made = judged.registration
    if made is None:
        return "Not registered."
    said = f"Registered {escape(made.registered)} as {made.terms[:16]}. "
    if not made.earlier:
        return said + "No earlier run."
    runs = "; ".join(
        escape(", ".join((f"{run.registered} {run.outcome}", *run.changes))) for run in made.earlier
    )
    return f"{said}Earlier runs: {runs}."


def _row(q: Quantity) -> str:
    null = (
        f"{between(min(q.null), max(q.null))} ({escape(q.null_is)}, {len(q.null)})"
        if q.null
        else ""
    )
    return (
        f"<tr><td>{escape(q.name)}<td>{q.value:.4g} {escape(q.unit)}<td>{interval_svg(q)}{escape(q.interval)}<td>"
        f"{escape(str(q.region))}<td>{q.p_holds:.3g}<td>{q.p_refuted:.3g}<td>{null}</tr>"
    )
