"""The app in headless Chromium: how long until a person sees a page, and how quickly the canvas answers.

Everything is timed inside the browser: a loop over its frames looks whether the content is there, so nothing is
lost to the wire between Python and the browser. Times run from navigation (or the click) to the painted frame.

Unit page: content is its heading, the histogram and the kernels it is built from, drawn; `whole` is when the page has
finished; Streamlit's own frame, which comes before any of it, is told beside. Warm pages have been seen before by
somebody; a new session is a browser with nothing in its cache. Cold is the first view of any unit in a server process
that has only shown the home page; the very first request, which imports torch, is told apart. A site's sheet is there
when all its tiles are and those in sight are decoded. On the canvas of 300 nodes, each press, move and turn of the
wheel is timed from the event to the end of the frame that shows it, and a press also by the browser's own event timing
to its presentation (in steps of 8 ms, 16 at least); the way to Python and back is separate, with the longest frame
that the browser has meanwhile.

Without `--workspace` the demo's is built in a temporary folder, and with CIRCUITS_ASSETS GoogLeNet is harvested on
photographs too, with stand-in pictures where there is no sheet; with `--workspace` all that is added to the one given:
give it a copy. A circuit of 300 nodes is saved in it, with stand-in pictures. There is no peer to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from app_server import NODES, Server, Subject, circuit_name, prepare, serving
from playwright.sync_api import Browser, Page, sync_playwright

from circuits.models.zoo.loading import load_model
from circuits.workspace import Workspace

PARTS = ["cold", "warm", "sheet", "canvas"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]

SCRIPT = """
window.bench ??= (() => {
  const seen = new WeakSet();
  const all = (what) => [...document.querySelectorAll(what)];
  const plot = (key) => document.querySelector(`.st-key-${key} [role=graphics-document]`);
  const app = () => document.querySelector("[data-testid=stApp]");
  const finished = () => app()?.getAttribute("data-test-script-state") === "notRunning";
  const heading = (text, tags = "h1") => all(tags).some((h) => h.getClientRects().length &&
    (h.textContent === text || h.textContent.startsWith(text + " ")));
  const button = (text) => all("button").find((b) => b.textContent.startsWith(text));
  const link = (text) => all("a").find((a) => a.textContent === text);
  // drawn, from data that was not there when `mark` was called
  const drawn = (key) => {
    const found = plot(key);
    return Boolean(found) && !seen.has(found) && found.getBoundingClientRect().height > 0;
  };
  const nodes = () => {
    const cy = document.querySelector(".circuit-canvas")?.cy;
    return cy ? cy.nodes().filter((node) => !node.hasClass("row")) : [];
  };
  const inSight = (image) => {
    const a = image.getBoundingClientRect(), b = image.closest(".unit-sheet").getBoundingClientRect();
    return a.bottom > Math.max(0, b.top) && a.top < Math.min(innerHeight, b.bottom);
  };
  const tests = {
    finished,
    frame: () => Boolean(app()),
    linked: (text) => link(text) !== undefined && finished(),
    home: () => heading("circuits") && finished(),
    heading: (text) => heading(text),
    unit: (text) => heading(text) && drawn("histogram") && drawn("kernels-source"),
    whole: (text) => tests.unit(text) && finished(),
    sheet: (site, n) => {
      if (!heading(site) || all(".unit-tile").length !== n) return false;
      const images = all(".unit-tile img").filter(inSight);
      return images.length > 0 && images.every((i) => i.complete && i.naturalWidth > 0);
    },
    canvas: (n) => nodes().length === n && finished(),
    panel: (text) => heading(text, "h3") && finished(),
  };
  const painted = () => new Promise((done) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => done(performance.now());
    channel.port2.postMessage(0);
  });
  // milliseconds (since navigation) at which each test first held, painted
  async function until(wanted, limit = 120000) {
    const end = performance.now() + limit, times = {};
    while (Object.keys(times).length < wanted.length) {
      await new Promise(requestAnimationFrame);
      for (const [name, ...args] of wanted) {
        if (name in times || !tests[name](...args)) continue;
        if (name === "sheet") await Promise.all(all(".unit-tile img").filter(inSight).map((i) => i.decode()));
        times[name] = await painted();
      }
      if (performance.now() > end) throw new Error(`of ${JSON.stringify(wanted)} seen ${JSON.stringify(times)}`);
    }
    return times;
  }
  async function click(find, wanted) {
    let element; // the sidebar is drawn last
    while (!(element = find())) await new Promise(requestAnimationFrame);
    for (const p of all("[role=graphics-document]")) seen.add(p);
    const begin = performance.now();
    element.click();
    const times = await until(wanted);
    return Object.fromEntries(Object.entries(times).map(([name, t]) => [name, t - begin]));
  }
  // the way to Python and back, from now on: asked for first, awaited later
  let coming = null;
  function expect(id) {
    const begin = performance.now();
    coming = until([["panel", id]]).then((times) => times.panel - begin);
  }
  const back = () => coming;
  // from an event to the end of the frame that shows it
  const input = { down: [], moves: [], wheel: [], gaps: [], shown: [] };
  let watched = null, last = 0;
  const frame = (now) => { if (last) input.gaps.push(now - last); last = now; requestAnimationFrame(frame); };
  function watch() {
    const box = document.querySelector(".circuit-canvas");
    if (watched === box) return;
    watched = box;
    const kinds = { mousedown: "down", mousemove: "moves", wheel: "wheel" };
    for (const [event, kind] of Object.entries(kinds))
      window.addEventListener(event, (e) => {
        if (!box.contains(e.target) || (kind === "moves" && !e.buttons)) return;
        requestAnimationFrame(() => painted().then((t) => input[kind].push(t - e.timeStamp)));
      }, { capture: true, passive: true });
    new PerformanceObserver((list) => {
      for (const e of list.getEntries()) input.shown.push([e.name, e.duration]);
    }).observe({ type: "event", durationThreshold: 16 });
    requestAnimationFrame(frame);
  }
  function take() {
    const taken = JSON.parse(JSON.stringify(input));
    for (const kind of Object.keys(input)) input[kind].length = 0;
    return taken;
  }
  // where on the screen, of nodes that can be pressed without another on top, and of bare ground
  function places() {
    const box = document.querySelector(".circuit-canvas"), cy = box.cy, rect = box.getBoundingClientRect();
    const found = nodes().map((n) => ({ id: n.id(), x: rect.left + n.renderedPosition().x,
      y: rect.top + n.renderedPosition().y, size: n.renderedWidth() }));
    return { nodes: found.filter((n) => n.x > rect.left + 4 && n.x < rect.right - 50 && n.y > rect.top + 40 &&
      n.y < Math.min(innerHeight, rect.bottom) - 4), box: { x: rect.left, y: rect.top, w: rect.width, h: rect.height },
      edges: cy.edges().length, view: [cy.zoom(), cy.pan().x, cy.pan().y] };
  }
  return { until, click, expect, back, button, link, watch, take, places };
})();
"""


@dataclass
class Table:
    """What was measured: milliseconds and the target by what it was.

    Attributes:
        times: of each thing.
        targets: of those that have one.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)

    def add(
        self, what: str, milliseconds: float | list[float], target: float | None = None
    ) -> None:
        """Note one time or several."""
        several = milliseconds if isinstance(milliseconds, list) else [milliseconds]
        self.times.setdefault(what, []).extend(several)
        if target is not None:
            self.targets[what] = target

    def show(self) -> None:
        """Print it."""
        if not self.times:
            return
        width = max(map(len, self.times))
        print(
            f"{'ms':{width}}  {'median':>8} {'90 %':>8} {'n':>4} {'target':>7}  met by the median, by 90 %"
        )
        for what, times in self.times.items():
            median, high = statistics.median(times), float(np.quantile(times, 0.9))
            target = self.targets.get(what)
            met = "" if target is None else f"{_yes(median <= target)}, {_yes(high <= target)}"
            goal = "" if target is None else f"{target:.0f}"
            print(f"{what:{width}}  {median:8.0f} {high:8.0f} {len(times):4} {goal:>7}  {met}")

    def result(self, n: int) -> dict[str, Any]:
        """The last line."""
        medians = {what: round(statistics.median(times), 1) for what, times in self.times.items()}
        return {"name": "app", "ours": medians, "targets": self.targets, "n": n}


def _yes(met: bool) -> str:
    return "yes" if met else "NO"


# --- the browser ---------------------------------------------------------------------------------


@contextmanager
def session(browser: Browser) -> Iterator[Page]:
    """A page of a browser that has seen nothing yet."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.add_init_script(SCRIPT)
    try:
        yield context.new_page()
    finally:
        context.close()


Wanted = list[list[Any]]


def goto(
    page: Page, server: Server, path: str, wanted: Wanted, **choices: object
) -> dict[str, float]:
    """Milliseconds from navigation until each of the tests held."""
    page.goto(f"{server.url}/{path}?{urlencode(choices)}", wait_until="commit")
    return page.evaluate("(wanted) => bench.until(wanted)", wanted)


def click(page: Page, which: str, text: str, wanted: Wanted) -> dict[str, float]:
    """Milliseconds from the click on a button or link until each of the tests held."""
    return page.evaluate(
        "([which, text, wanted]) => bench.click(() => bench[which](text), wanted)",
        [which, text, wanted],
    )


def unit_page(page: Page, server: Server, subject: Subject, index: int) -> dict[str, float]:
    """Open a unit's page by its URL."""
    choices = {"model": subject.model, "site": subject.site, "unit": index}
    return goto(page, server, "unit", _content(subject, index), **choices)


def _content(subject: Subject, index: int) -> Wanted:
    heading = f"{subject.site}:{index}"
    return [["frame"], ["heading", heading], ["unit", heading], ["whole", heading]]


def warm_units(table: Table, browser: Browser, server: Server, subject: Subject, n: int) -> None:
    """Unit pages that somebody has seen: by URL, by the button, in a new session."""
    indices = range(subject.first, subject.first + min(n, 8) + 1)
    at = f"unit page of {subject.model}"
    with session(browser) as page:
        for index in indices:
            unit_page(page, server, subject, index)
        for i in range(n):
            times = unit_page(page, server, subject, indices[i % len(indices)])
            table.add(f"{at}, warm, by URL: Streamlit's own frame", times["frame"])
            table.add(f"{at}, warm, by URL: content", times["unit"], 500)
            table.add(f"{at}, warm, by URL: whole", times["whole"])
        for i in range(n):
            index = indices[1 + i % (len(indices) - 1)]
            if index == indices[1]:
                unit_page(page, server, subject, indices[0])
            times = click(page, "button", "next", _content(subject, index))
            table.add(f"{at}, warm, next →: content", times["unit"], 500)
            table.add(f"{at}, warm, next →: whole", times["whole"])
    for i in range(n):
        with session(browser) as page:
            times = unit_page(page, server, subject, indices[i % len(indices)])
            table.add(f"{at}, warm, new session: Streamlit's own frame", times["frame"])
            table.add(f"{at}, warm, new session: content", times["unit"], 500)


def sheets(
    table: Table, browser: Browser, server: Server, subject: Subject, units: int, n: int
) -> None:
    """The sheet of a site, by its URL and by the link on a unit's page."""
    wanted: Wanted = [["sheet", subject.sheet, units]]
    choices = {"model": subject.model, "site": subject.sheet}
    at = f"sheet of {units} units, {subject.model} {subject.sheet}"
    with session(browser) as page:
        for i in range(n + 1):
            times = goto(page, server, "site", wanted, **choices)
            table.add(
                f"{at}, {'by URL' if i else 'first time'}", times["sheet"], 2000 if i else None
            )
        for _ in range(n):
            before: Wanted = [
                ["heading", f"{subject.sheet}:0"],
                ["linked", f"All of {subject.sheet}"],
            ]
            goto(page, server, "unit", before, **choices, unit=0)
            times = click(page, "link", f"All of {subject.sheet}", wanted)
            table.add(f"{at}, by link", times["sheet"], 2000)


def canvases(table: Table, browser: Browser, server: Server, subject: Subject, n: int) -> None:
    """The canvas with 300 nodes: press, move, pan, zoom; and the way to Python and back."""
    with session(browser) as page:
        choices = {"model": subject.model, "circuit": circuit_name(subject.model)}
        first = goto(page, server, "circuit", [["canvas", NODES]], **choices)
        page.locator(".circuit-canvas").scroll_into_view_if_needed()
        page.evaluate("bench.watch()")
        places = page.evaluate("bench.places()")
        at = f"canvas of {NODES} nodes, {places['edges']} edges ({subject.model})"
        table.add(f"{at}: there, by URL", first["canvas"])
        _press(table, page, at, n)
        _pan_and_zoom(table, page, at, n)
        _drag(table, page, at, n)


def _press(table: Table, page: Page, at: str, n: int) -> None:
    generator, before = np.random.default_rng(0), ""
    for _ in range(n):
        nodes = [p for p in page.evaluate("bench.places()")["nodes"] if p["id"] != before]
        node = nodes[generator.integers(len(nodes))]
        before = node["id"]
        page.mouse.move(node["x"], node["y"])
        page.wait_for_timeout(100)
        page.evaluate("bench.take()")
        page.mouse.down()
        page.wait_for_timeout(250)
        pressed = page.evaluate("bench.take()")
        table.add(f"{at}: press to frame", pressed["down"], 100)
        shown = [t for name, t in pressed["shown"] if name in ("pointerdown", "mousedown")]
        table.add(f"{at}: press to presentation", max(shown, default=16.0), 100)
        page.evaluate("(id) => bench.expect(id)", node["id"])
        page.mouse.up()
        table.add(f"{at}: click to Python to panel", page.evaluate("bench.back()"))
        page.wait_for_timeout(300)
        table.add(f"{at}: longest frame meanwhile", max(page.evaluate("bench.take()")["gaps"]))


def _drag(table: Table, page: Page, at: str, n: int) -> None:
    """Take nodes along; where they are put goes to Python, which is waited for."""
    for i in range(n):
        node = page.evaluate("bench.places()")["nodes"][i]
        page.mouse.move(node["x"], node["y"])
        page.mouse.down()
        page.evaluate("bench.take()")
        for step in range(20):
            page.mouse.move(node["x"] + step, node["y"] + step)
        page.wait_for_timeout(50)
        table.add(f"{at}: drag a node, move to frame", page.evaluate("bench.take()")["moves"], 100)
        page.mouse.up()
        page.wait_for_timeout(100)
        page.evaluate("bench.until([['finished']])")


def _pan_and_zoom(table: Table, page: Page, at: str, n: int) -> None:
    places = page.evaluate("bench.places()")
    box, before = places["box"], places["view"]
    x, y = box["x"] + 12, box["y"] + box["h"] - 12  # the corner: bare ground
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate("bench.take()")
    for i in range(20 * n):
        page.mouse.move(x + 60 * np.sin(i / 5), y - 40 + 40 * np.cos(i / 5))
    page.wait_for_timeout(50)
    panned, during = page.evaluate("[bench.take(), bench.places().view]")
    page.mouse.up()
    if during == before:
        raise RuntimeError("the canvas was not moved")
    table.add(f"{at}: pan, move to frame", panned["moves"], 100)
    table.add(f"{at}: pan, frame to frame", panned["gaps"], 100)
    page.wait_for_timeout(500)
    page.mouse.move(box["x"] + box["w"] / 2, box["y"] + box["h"] / 2)
    page.evaluate("bench.take()")
    for i in range(10 * n + 5):  # five more inwards than out again
        page.mouse.wheel(0, -60 if i // 5 % 2 == 0 else 60)
    page.wait_for_timeout(50)
    zoomed, after = page.evaluate("[bench.take(), bench.places().view]")
    if after[0] == during[0]:
        raise RuntimeError("the canvas was not zoomed")
    table.add(f"{at}: zoom, wheel to frame", zoomed["wheel"], 100)
    table.add(f"{at}: zoom, frame to frame", zoomed["gaps"], 100)


# --- all of it -----------------------------------------------------------------------------------


def cold(
    table: Table, browser: Browser, place: Workspace, subjects: list[Subject], n: int, log: Path
) -> None:
    """First views, each in a server process of its own."""
    for _ in range(n):
        for subject in subjects:
            with serving(place.root, log) as server, session(browser) as page:
                times = goto(page, server, "", [["home"]])
                table.add("the very first request: home, whole (imports torch)", times["home"])
                times = unit_page(page, server, subject, subject.first)
                table.add(f"unit page of {subject.model}, cold: content", times["unit"], 3000)
                table.add(f"unit page of {subject.model}, cold: whole", times["whole"])
        with serving(place.root, log) as server, session(browser) as page:
            times = unit_page(page, server, subjects[0], subjects[0].first)
            table.add(
                f"unit page of {subjects[0].model}, as the very first request: content",
                times["unit"],
            )


def measure(
    table: Table, browser: Browser, place: Workspace, subjects: list[Subject], args: argparse.Namespace, folder: Path,
) -> None:  # fmt: skip
    """Cold pages, then all others on one server."""
    log, n = folder / "server.log", args.n
    if "cold" in args.parts:
        cold(table, browser, place, subjects, min(args.cold, n), log)
    with serving(place.root, log) as server:
        last = subjects[-1]
        if "warm" in args.parts:
            for subject in subjects:
                warm_units(table, browser, server, subject, n)
        if "sheet" in args.parts:
            units = load_model(last.model).site(last.sheet).n_units
            sheets(table, browser, server, last, units, n)
        if "canvas" in args.parts:
            canvases(table, browser, server, last, n)
        for line in server.tracebacks():
            print(f"traceback in the server's log: {line}")


def main() -> None:
    """Measure everything, print it, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="", help="use this one, and add what is missing")
    parser.add_argument("--n", type=int, default=10, help="how often each")
    parser.add_argument(
        "--cold", type=int, default=3, help="how many servers for cold pages; at most --n"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="only these")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed: `apt-get install chromium`")
    table = Table()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        place = Workspace(Path(args.workspace or Path(folder) / "workspace").absolute())
        begin = time.perf_counter()
        subjects = prepare(place)
        print(
            f"workspace {place.root}, ready after {time.perf_counter() - begin:.0f} s; {os.cpu_count()} CPUs"
        )
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            measure(table, browser, place, subjects, args, Path(folder))
        finally:
            table.show()
            browser.close()
    print(json.dumps(table.result(args.n)))


if __name__ == "__main__":
    main()
