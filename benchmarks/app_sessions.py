"""Many sessions at once on one server of the app: no error, no edit that another session sees, memory bounded.

Sessions speak Streamlit's own protocol over its websocket, as the browser's part of the app does, and fetch the
pictures that a page names: the server cannot tell them from browsers. Twenty-five real ones were too much: a tab
held 220 MB and took 2.4 s of a CPU to draw a unit's page, and what is asked here is about the server; `app.py`
measures in a browser.

Browsing sessions walk over unit, site, circuit and home pages of two models, seeded, with a pause between as people
make; now and then one leaves and comes again as a new session. In between they look at the intact predictions of
examples, on the page for one's own input and on that of edits. Editing sessions put an edit in force that nobody else
makes (`scale curve:30` by a factor of their own, a new one each round), read the predictions that the page shows for
several examples, undo it and read again. Each number shown must be the one that the library computed for exactly this
edit, or for none, in another process beforehand; factors are so far apart that any other session's number would be
seen as wrong. An exception or error message on a page, a traceback in the server's log, a page with another title, a
picture that cannot be fetched, and a run that does not end are errors; with any of these, or a wrong number, the exit
code is 1. There is no peer to compare with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
from app_server import Server, serving
from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df
from streamlit.proto.Alert_pb2 import Alert
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Element_pb2 import Element
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

import circuits
from circuits.demo import PLANS, build
from circuits.edits.records import read_edit
from circuits.effects import predictions
from circuits.models.zoo.loading import load_model
from circuits.workspace import Workspace

MODELS = {"cleanroom": "curves", "shapes": "shapes"}
"""What is browsed, and the data of which examples are looked at."""

TOLERANCE = 1e-6
"""How far a probability may be from the library's."""

APART = 20 * TOLERANCE
"""How far the numbers of two edits are from each other, at least."""

EXAMPLES, LOOKED_AT = 4, 24
"""Examples that each edit is looked at on; examples of each model whose intact predictions are looked at."""

PATIENCE = 180.0
"""Seconds after which a run is given up."""


# --- what the numbers should be ------------------------------------------------------------------


def expected(editing: int, rounds: int, seed: int) -> dict[str, Any]:
    """What the library makes of examples, intact and under every edit that a session will make."""
    found: dict[str, Any] = {"intact": {}}
    for name, data in MODELS.items():
        model = load_model(name)
        all_of = circuits.Examples(model, data, None)
        chosen = np.linspace(0, len(all_of) - 1, LOOKED_AT).astype(int).tolist()
        found["intact"][name] = {
            e: _numbers(predictions(model, all_of.subset([e]))) for e in chosen
        }
    model = load_model("cleanroom")
    all_of = circuits.Examples(model, MODELS["cleanroom"], None)
    examples = _strongest(found["intact"]["cleanroom"], all_of)
    factors = 2 + 0.02 * np.arange(
        editing * rounds
    )  # no two the same; beside 1, and the 3 that examples are chosen by
    np.random.default_rng(seed).shuffle(factors)
    edits: dict[str, dict[int, list[list[Any]]]] = {}
    for factor in factors:
        words = f"scale curve:30 factor={factor:.2f}"
        edits[words] = {e: _edited(model, all_of, words, e) for e in examples}
    _check_apart(edits, examples)
    words = list(edits)
    return found | {
        "examples": [str(e) for e in examples],
        "edits": edits,
        "of": [words[k::editing] for k in range(editing)],
    }


def _numbers(found: list[Any]) -> list[list[Any]]:
    return [[p.index, p.name, p.probability] for p in found]


def _edited(model: Any, all_of: Any, words: str, example: int) -> list[list[Any]]:
    x = all_of.subset([example])
    of = [p.index for p in predictions(model, x)]
    with circuits.edited(model, circuits.Recipe.of(model, [read_edit(model, words)])):
        return _numbers(predictions(model, x, of=of))


def _strongest(intact: dict[int, list[list[Any]]], all_of: Any) -> list[int]:
    """Those whose predictions the edit changes most."""
    change = {}
    for example, before in intact.items():
        after = _edited(all_of.model, all_of, "scale curve:30 factor=3", example)
        change[example] = max(abs(a[2] - b[2]) for a, b in zip(after, before, strict=True))
    return sorted(change, key=lambda e: -change[e])[:EXAMPLES]


def _check_apart(edits: dict[str, dict[int, list[list[Any]]]], examples: list[int]) -> None:
    for example in examples:
        numbers = np.array([[p[2] for p in of[example]] for of in edits.values()])
        near = np.abs(numbers[:, None] - numbers[None]).max(-1) + np.eye(len(numbers))
        if near.min() < APART:
            raise ValueError(
                f"two edits give the same numbers on example {example} ({near.min():.1e} apart)"
            )


# --- a session -----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a run of a page has shown.

    Attributes:
        seconds: that it took.
        elements: by their place.
        troubles: exceptions and error messages on it.
    """

    seconds: float = 0.0
    elements: dict[tuple[int, ...], Element] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def of(self, kind: str) -> Iterator[Any]:
        """The elements of a kind."""
        for element in self.elements.values():
            if element.WhichOneof("type") == kind:
                yield getattr(element, kind)

    def title(self) -> str:
        """The page's title."""
        return next((h.body for h in self.of("heading") if h.tag == "h1"), "")

    def text(self) -> str:
        """All its text."""
        return "\n".join(m.body for m in self.of("markdown"))

    def bars(self) -> dict[str, tuple[list[str], list[float]]]:
        """The labels and lengths of the bars of the chart of predictions, by the run that they are of."""
        for chart in self.of("vega_lite_chart"):
            if '"field": "probability"' not in chart.spec:
                continue
            buffers = [chart.data.data, *(named.data.data for named in chart.datasets)]
            table = convert_arrow_bytes_to_pandas_df(next(filter(None, buffers)))
            return {
                str(run): (of_run["output"].tolist(), of_run["probability"].tolist())
                for run, of_run in table.groupby("run", sort=False)
            }
        return {}

    def widget(self, kind: str, key: str = "", label: str = "") -> str:
        """The id of a widget, by its key or its label."""
        for widget in self.of(kind):
            if (key and widget.id.endswith(f"-{key}")) or (label and widget.label == label):
                return widget.id
        raise LookupError(f"there is no {kind} {key or label!r} on the page {self.title()!r}")


class Session:
    """One person's session: a websocket, and what its page has shown last."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.socket: ClientConnection | None = None
        self.pages: dict[str, str] = {}
        self.page, self.query, self.seen = "", "", Seen()

    async def close(self) -> None:
        """Leave; the next run is a new session's."""
        if self.socket is not None:
            await self.socket.close()
        self.socket, self.pages = None, {}

    async def visit(self, page: str, **choices: object) -> Seen:
        """Go to a page, as a link does."""
        self.page, self.query = page, urlencode({k: str(v) for k, v in choices.items()})
        return await self._run([])

    async def act(self, *widgets: WidgetState) -> Seen:
        """Set widgets of the page, or press its buttons."""
        return await self._run(list(widgets))

    async def press(self, key: str = "", label: str = "") -> Seen:
        """Press a button."""
        return await self.act(
            WidgetState(id=self.seen.widget("button", key, label), trigger_value=True)
        )

    async def _run(self, widgets: list[WidgetState]) -> Seen:
        begin = time.perf_counter()
        if self.socket is None:
            address = f"ws://127.0.0.1:{self.server.port}/_stcore/stream"
            self.socket = await connect(address, subprotocols=["streamlit"], max_size=None)  # type: ignore[list-item]
        message = BackMsg()
        message.rerun_script.query_string = self.query
        if self.page in self.pages:
            message.rerun_script.page_script_hash = self.pages[self.page]
        else:
            message.rerun_script.page_name = self.page
        message.rerun_script.widget_states.widgets.extend(widgets)
        await self.socket.send(message.SerializeToString())
        self.seen = Seen()
        async with asyncio.timeout(PATIENCE):
            while not self._take(ForwardMsg.FromString(await self.socket.recv(decode=False))):
                pass
        self.seen.seconds = time.perf_counter() - begin
        for element in self.seen.elements.values():
            kind = element.WhichOneof("type")
            if kind == "exception":
                self.seen.troubles.append(f"{element.exception.type}: {element.exception.message}")
            elif kind == "alert" and element.alert.format == Alert.ERROR:
                self.seen.troubles.append(f"error message: {element.alert.body}")
        await self._fetch()
        return self.seen

    def _take(self, message: ForwardMsg) -> bool:
        """Take a message in; whether the run has ended with it."""
        kind = message.WhichOneof("type")
        if kind == "new_session":
            self.seen.elements.clear()
        elif kind == "navigation":
            self.pages = {p.url_pathname: p.page_script_hash for p in message.navigation.app_pages}
            here = {p.page_script_hash: p.url_pathname for p in message.navigation.app_pages}
            self.page = here.get(message.navigation.page_script_hash, self.page)
        elif kind == "page_info_changed":
            self.query = message.page_info_changed.query_string
        elif kind == "page_not_found":
            self.seen.troubles.append(f"there is no page {self.page!r}")
        elif kind == "delta":
            place = tuple(message.metadata.delta_path)
            what = message.delta.WhichOneof("type")
            if what == "new_element":
                self.seen.elements[place] = message.delta.new_element
            elif what == "add_block":
                self.seen.elements.pop(place, None)
        elif kind == "script_finished":
            if message.script_finished == ForwardMsg.FINISHED_WITH_COMPILE_ERROR:
                self.seen.troubles.append("the script could not be compiled")
            return message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN
        return False

    async def _fetch(self) -> None:
        """Fetch the page's pictures, as a browser would."""
        addresses = {
            i.url for imgs in self.seen.of("imgs") for i in imgs.imgs if i.url.startswith("/media/")
        }
        for address in sorted(addresses):
            try:
                await asyncio.to_thread(_get, self.server.url + address)
            except OSError as error:
                self.seen.troubles.append(f"picture {address}: {error}")


def _get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read()


# --- what sessions do ----------------------------------------------------------------------------


@dataclass
class Notes:
    """What has happened so far.

    Attributes:
        latencies: seconds of page runs, by what they were.
        errors: in words.
        wrong: numbers that were not the library's, in words.
        numbers: how many were compared.
        memory: the server's, in MB, with when.
    """

    latencies: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    numbers: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)

    def take(self, who: str, what: str, seen: Seen, title: str = "") -> Seen:
        """Note a run, and whether the page is the one that was asked for."""
        self.latencies.setdefault(what, []).append(seen.seconds)
        self.errors += [f"{who}, {what}: {trouble}" for trouble in seen.troubles]
        if title and not f"{seen.title()} ".startswith(f"{title} "):
            self.errors.append(f"{who}, {what}: the title is {seen.title()!r}, not {title!r}")
        return seen

    def compare(
        self, who: str, bars: dict[str, Any], expectations: dict[str, list[list[Any]]]
    ) -> None:
        """Compare the numbers shown with the library's: the same runs, and each number."""
        if set(bars) != set(expectations):
            self.wrong.append(f"{who}: shows {sorted(bars)}, not {sorted(expectations)}")
        for run in set(bars) & set(expectations):
            labels, values = bars[run]
            numbers = [p[2] for p in expectations[run]]
            named = len(labels) == len(numbers) and all(
                label.startswith(p[1]) for label, p in zip(labels, expectations[run], strict=True)
            )
            self.numbers += len(numbers)
            if (
                not named
                or max(abs(a - b) for a, b in zip(values, numbers, strict=True)) > TOLERANCE
            ):
                self.wrong.append(
                    f"{who}, {run}: shows {list(zip(labels, values, strict=False))}, not {numbers}"
                )


@dataclass(frozen=True)
class Setting:
    """What all sessions share.

    Attributes:
        server: that they are on.
        known: what the numbers should be, see `expected`.
        places: the sites of each model with their numbers of units.
        notes: of what happens.
        pause: seconds between pages, on average.
        go_on: whether a session that has made so many page runs goes on.
    """

    server: Server
    known: dict[str, Any]
    places: dict[str, dict[str, int]]
    notes: Notes
    pause: float
    go_on: Callable[[int], bool]


async def browse(setting: Setting, number: int, seed: int) -> None:
    """Walk about until time is up."""
    chance, session, who = (
        random.Random(f"{seed} {number}"),
        Session(setting.server),
        f"browsing {number}",
    )
    steps = [_unit] * 4 + [_next] * 2 + [_site] * 2 + [_circuit, _home, _own, _own, _unedited]
    runs = 0
    while setting.go_on(runs):
        await _guarded(setting, session, who, chance.choice(steps)(setting, session, chance, who))
        runs += 1
        if chance.random() < 0.05:
            await session.close()
        await asyncio.sleep(chance.uniform(0, 2 * setting.pause))
    await session.close()


async def _guarded(setting: Setting, session: Session, who: str, step: Awaitable[None]) -> None:
    """Do a step; what goes wrong on the way is an error, and the session begins anew."""
    try:
        await step
    except (OSError, TimeoutError, LookupError, WebSocketException) as error:
        setting.notes.errors.append(f"{who}: {type(error).__name__}: {error}")
        await session.close()


def _anywhere(setting: Setting, chance: random.Random) -> tuple[str, str, int]:
    model = chance.choice(list(MODELS))
    site = chance.choice(list(setting.places[model]))
    return model, site, chance.randrange(setting.places[model][site])


async def _unit(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    model, site, unit = _anywhere(setting, chance)
    seen = await session.visit("unit", model=model, site=site, unit=unit)
    setting.notes.take(who, "unit", seen, f"{site}:{unit}")


async def _next(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    if session.page != "unit" or session.socket is None:
        await _unit(setting, session, chance, who)
        return
    at = dict(parse_qsl(session.query))
    units, after = setting.places[at["model"]][at["site"]], int(at["unit"]) + 1
    if after < units:
        setting.notes.take(
            who, "next unit", await session.press(label="next →"), f"{at['site']}:{after}"
        )


async def _site(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    model, site, _ = _anywhere(setting, chance)
    seen = await session.visit(
        "site", model=model, site=site, **{"as": chance.choice(("sheet", "sheet", "table"))}
    )
    setting.notes.take(who, "site", seen, site)


async def _circuit(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    model, site, unit = _anywhere(setting, chance)
    setting.notes.take(
        who,
        "circuit",
        await session.visit("circuit", model=model, unit=f"{site}:{unit}"),
        "Circuit",
    )


async def _home(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    setting.notes.take(who, "home", await session.visit(""), "circuits")


async def _own(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    """The intact predictions of an example, on the page for one's own input."""
    model, site, _ = _anywhere(setting, chance)
    example, numbers = chance.choice(list(setting.known["intact"][model].items()))
    choices = {"model": model, "site": site, "from": MODELS[model], "example": example}
    seen = setting.notes.take(
        who, "own input", await session.visit("yours", **choices), "Your own input"
    )
    setting.notes.compare(f"{who}, {model}, example {example}", seen.bars(), {"intact": numbers})


async def _unedited(setting: Setting, session: Session, chance: random.Random, who: str) -> None:
    """The page of edits, of a session that has made none."""
    example, numbers = chance.choice(list(setting.known["intact"]["cleanroom"].items()))
    choices = {"model": "cleanroom", "from": MODELS["cleanroom"], "example": example}
    seen = setting.notes.take(who, "edits, none", await session.visit("edits", **choices), "Edits")
    setting.notes.compare(f"{who}, example {example}", seen.bars(), {"intact": numbers})
    if "None: the model is as it is." not in seen.text():
        setting.notes.wrong.append(f"{who}: the page shows an edit, and the session has made none")


async def edit(setting: Setting, number: int, seed: int) -> None:
    """Put one edit in force after another, look at what it does, and undo it."""
    chance, session, who = (
        random.Random(f"{seed} edit {number}"),
        Session(setting.server),
        f"editing {number}",
    )
    runs, words = 0, setting.known["of"][number]
    while setting.go_on(runs):
        step = _edit_and_undo(setting, session, chance, who, words[runs % len(words)])
        await _guarded(setting, session, who, step)
        runs += 1
    await session.close()


async def _edit_and_undo(
    setting: Setting, session: Session, chance: random.Random, who: str, words: str
) -> None:
    notes, known = setting.notes, setting.known
    intact, edited = known["intact"]["cleanroom"], known["edits"][words]
    first, *others = chance.sample(known["examples"], len(known["examples"]))
    choices = {"model": "cleanroom", "from": MODELS["cleanroom"]}

    def check(seen: Seen, example: str, in_force: bool) -> None:
        expectations = {"intact": intact[example]} | (
            {"edited": edited[example]} if in_force else {}
        )
        notes.compare(f"{who}, {words!r}, example {example}", seen.bars(), expectations)

    seen = await session.visit("edits", **choices, example=first)
    check(notes.take(who, "edits", seen, "Edits"), first, False)
    text = WidgetState(id=session.seen.widget("text_input", "edit-words"), string_value=words)
    add = WidgetState(id=session.seen.widget("button", "edit-add-words"), trigger_value=True)
    check(notes.take(who, "edit made", await session.act(text, add), "Edits"), first, True)
    for example in others:
        await asyncio.sleep(chance.uniform(0, 2 * setting.pause))
        seen = await session.visit("edits", **choices, example=example)
        check(notes.take(who, "edits, one in force", seen, "Edits"), example, True)
    await asyncio.sleep(chance.uniform(0, 2 * setting.pause))
    check(
        notes.take(who, "edit undone", await session.press("edit-undo"), "Edits"), others[-1], False
    )


# --- all of it -----------------------------------------------------------------------------------


async def together(setting: Setting, browsing: int, editing: int, seed: int) -> None:
    """All sessions at once, and the server's memory beside them."""
    begin = time.perf_counter()

    async def sample() -> None:
        while True:
            setting.notes.memory.append((time.perf_counter() - begin, setting.server.memory()))
            await asyncio.sleep(1.0)

    sampling = asyncio.create_task(sample())
    try:
        await asyncio.gather(
            *(browse(setting, k, seed) for k in range(browsing)),
            *(edit(setting, k, seed) for k in range(editing)),
        )
    finally:
        sampling.cancel()
    setting.notes.memory.append((time.perf_counter() - begin, setting.server.memory()))


def show(notes: Notes) -> dict[str, float]:
    """Print what happened; the numbers of the last line."""
    everything = [t for times in notes.latencies.values() for t in times]
    print(f"{'page runs, ms':22} {'n':>6} {'median':>8} {'95 %':>8} {'longest':>8}")
    for what, times in [*sorted(notes.latencies.items()), ("all", everything)]:
        if times:
            middle, high = 1e3 * statistics.median(times), 1e3 * float(np.quantile(times, 0.95))
            print(f"{what:22} {len(times):6} {middle:8.0f} {high:8.0f} {1e3 * max(times):8.0f}")
    end = notes.memory[-1][0]
    warm = next(m for t, m in notes.memory if t >= min(60.0, 0.2 * end))
    later = np.array([(t / 60, m) for t, m in notes.memory if t >= 0.5 * end])
    growth = float(np.polyfit(*later.T, 1)[0]) if len(later) > 2 else float("nan")
    memory = {
        "start": notes.memory[0][1], "warm": warm, "end": notes.memory[-1][1], "most": max(m for _, m in notes.memory),
        "MB a minute in the second half": growth,
    }  # fmt: skip
    print(
        "server's memory, MB: " + ", ".join(f"{what} {value:.0f}" for what, value in memory.items())
    )
    print(
        f"{notes.numbers} numbers compared, {len(notes.wrong)} times wrong; {len(notes.errors)} errors"
    )
    for kind, found in (("WRONG", notes.wrong), ("ERROR", notes.errors)):
        for text, times in Counter(found).most_common(20):
            print(f"{kind} ({times}x) {text[:400]}")
    return {
        "median": 1e3 * statistics.median(everything), "95 %": 1e3 * float(np.quantile(everything, 0.95)),
        **{f"memory {what}": value for what, value in memory.items()},
    }  # fmt: skip


def asked() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browsing", type=int, default=20, help="sessions that browse")
    parser.add_argument("--editing", type=int, default=5, help="sessions that edit")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--n", type=int, default=0, help="so many steps of each session, instead of minutes"
    )
    parser.add_argument(
        "--pause", type=float, default=3.0, help="seconds between pages, on average"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workspace", default="", help="of the demo; built in a temporary folder if not given"
    )
    parser.add_argument("--expect", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run it and print what happened, and one JSON line at the end."""
    args = asked()
    if args.expect:
        print(json.dumps(expected(args.editing, args.expect, args.seed)))
        return
    rounds = args.n or max(4, round(8 * args.minutes))
    with tempfile.TemporaryDirectory() as folder:
        place = Workspace(Path(args.workspace or Path(folder) / "workspace").absolute())
        build(place)
        # in a process of its own: nothing of the app can have touched it
        command = [
            sys.executable,
            __file__,
            "--expect",
            str(rounds),
            "--editing",
            str(args.editing),
        ]
        run = subprocess.run(
            [*command, "--seed", str(args.seed)], check=True, stdout=subprocess.PIPE
        )
        known = json.loads(run.stdout)
        places = {
            plan.model: {site: load_model(plan.model).site(site).n_units for site in plan.sites}
            for plan in PLANS
            if plan.model in MODELS
        }
        notes = Notes()
        with serving(place.root, Path(folder) / "server.log") as server:
            end = time.monotonic() + 60 * args.minutes
            setting = Setting(
                server, known, places, notes, args.pause,
                lambda runs: runs < args.n if args.n else time.monotonic() < end,
            )  # fmt: skip
            asyncio.run(together(setting, args.browsing, args.editing, args.seed))
            notes.errors += [f"server's log: {line}" for line in server.tracebacks()]
    runs = sum(map(len, notes.latencies.values()))
    print(
        f"{args.browsing} sessions browsing and {args.editing} editing for {notes.memory[-1][0]:.0f} s, "
        f"{os.cpu_count()} CPUs, seed {args.seed}"
    )
    result = {
        "name": "app_sessions",
        "ours": show(notes),
        "errors": len(notes.errors),
        "wrong": len(notes.wrong),
    }
    print(json.dumps(result | {"numbers": notes.numbers, "n": runs}))
    sys.exit(1 if notes.errors or notes.wrong else 0)


if __name__ == "__main__":
    main()
