"""Every page of the app looked at: what axe-core finds, when it is there, and how many units show a face.

axe-core 4.10 (Deque, MPL-2.0) comes from the npm registry, or from --axe FILE; it is no dependency of the package. Each
page is opened in light and in dark, and a picture of it is kept at 800, 1280 and 1920 pixels. The run fails if there is
a fault of the impact `serious` or `critical`. Times run from navigation until Streamlit has nothing left to run, on
whatever else this machine does; there is no peer to compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tarfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from app_server import serving
from playwright.sync_api import Browser, Page, sync_playwright

from circuits.workspace import Workspace

AXE = "https://registry.npmjs.org/axe-core/-/axe-core-4.10.2.tgz"
AXE_SHA256 = "9ea2d2d6917da998122bdacfd3b473e31ead53f4b87146c716a12edf89158100"

VISION = {"model": "efficientnet-lite0", "site": "block2b_expand"}
LANGUAGE = {"model": "induction", "site": "blocks.1.attn.hook_z"}

PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "home": ("", {}), "unit": ("unit", VISION | {"unit": "12"}), "unit-tokens": ("unit", LANGUAGE | {"unit": "1"}),
    "sheet": ("site", VISION | {"as": "sheet"}), "sheet-tokens": ("site", LANGUAGE | {"as": "sheet"}),
    "table": ("site", VISION | {"as": "table"}), "compare": ("compare", {}), "heads": ("heads", LANGUAGE),
    "prompts": ("prompts", {"model": "induction"}), "find": ("find", {"model": "induction"}),
    "circuit": ("circuit", {"model": "cleanroom", "unit": "curve:30"}), "claims": ("claims", {}),
    "edits": ("edits", {"model": "cleanroom", "on": "curve:30"}), "yours": ("yours", VISION),
    "concepts": ("concepts", {}), "case": ("case", {}), "jobs": ("jobs", {}),
}  # fmt: skip

WIDTHS = (800, 1280, 1920)
SCHEMES = ("light", "dark")


@dataclass(frozen=True)
class Seen:
    """One page in one colour scheme.

    Attributes:
        page: which.
        scheme: light or dark.
        seconds: until there was nothing left to run.
        faces: tiles and pictures of units that have a face, and all there are.
        faults: serious ones: the rule, the number of elements, and the first of them.
    """

    page: str
    scheme: str
    seconds: float
    faces: tuple[int, int]
    faults: tuple[tuple[str, int, str], ...]


def axe(path: str) -> str:
    """The source of axe-core."""
    if path:
        return Path(path).read_text(encoding="utf-8")
    with urllib.request.urlopen(AXE, timeout=60) as answer:
        packed = answer.read()
    if hashlib.sha256(packed).hexdigest() != AXE_SHA256:
        sys.exit(f"{AXE} is not the file that was expected")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None, "the package has it"
        return member.read().decode()


def settle(page: Page) -> None:
    """Wait until the page has nothing left to run."""
    state = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state')"
    page.wait_for_function(f"{state} == 'notRunning'", timeout=300_000)
    page.wait_for_timeout(700)
    page.wait_for_function(f"{state} == 'notRunning'", timeout=300_000)


def look(browser: Browser, url: str, name: str, scheme: str, source: str, out: Path) -> Seen:
    """Open a page, keep pictures of it, and have axe-core look for faults."""
    page = browser.new_context(
        color_scheme=scheme, viewport={"width": 1280, "height": 900}
    ).new_page()  # type: ignore[arg-type]
    begin = time.perf_counter()
    page.goto(url)
    page.wait_for_selector("[data-testid=stMainBlockContainer]", timeout=300_000)
    settle(page)
    seconds = time.perf_counter() - begin
    if page.locator("[data-testid=stException]").count():
        sys.exit(f"{name}: the page ended with an error")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        page.set_viewport_size({"width": width, "height": min(6000, height + 20)})
        page.wait_for_timeout(300)
        page.screenshot(path=out / f"{name}-{width}-{scheme}.png")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_timeout(300)
    page.evaluate(source)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    tiles = page.evaluate(
        "[...document.querySelectorAll('.unit-tile')].map(t => !!t.querySelector('img, .word'))"
    )
    page.context.close()
    faults = tuple(
        (v["id"], len(v["nodes"]), v["nodes"][0]["html"][:100])
        for v in found
        if v["impact"] in ("serious", "critical")
    )
    return Seen(name, scheme, seconds, (sum(tiles), len(tiles)), faults)


def main() -> None:
    """Look at all pages, print a line for each, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", required=True, help="the demo's workspace, or a copy of it")
    parser.add_argument("--axe", default="", help="axe.min.js, where there is no registry")
    parser.add_argument("--out", default="artifacts/pages", help="where pictures are kept")
    parser.add_argument(
        "--pages", nargs="+", default=list(PAGES), choices=list(PAGES), help="only these"
    )
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed: `apt-get install chromium`")
    source, out, seen = axe(args.axe), Path(args.out), list[Seen]()
    out.mkdir(parents=True, exist_ok=True)
    place = Path(args.workspace).absolute()
    if not Workspace(place).models():
        sys.exit(
            f"workspace {str(place)!r} has no models: build it with `circuits demo --no-serve`"
        )
    with sync_playwright() as play, serving(place, out / "server.log") as server:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for name in args.pages:
            view, query = PAGES[name]
            for scheme in SCHEMES:
                one = look(
                    browser, f"{server.url}/{view}?{urlencode(query)}", name, scheme, source, out
                )
                seen.append(one)
                shown = f"{one.faces[0]} of {one.faces[1]}" if one.faces[1] else "-"
                said = (
                    "; ".join(f"{rule} ({n}): {first}" for rule, n, first in one.faults) or "none"
                )
                print(
                    f"{name:14} {scheme:6} {one.seconds:6.1f} s  faces {shown:12} serious faults: {said}",
                    flush=True,
                )
        browser.close()
    print(json.dumps({"pages": [vars(one) for one in seen]}))
    if any(one.faults for one in seen):
        sys.exit("there are serious faults")


if __name__ == "__main__":
    main()
