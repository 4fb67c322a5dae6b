"""The app's journeys in headless Chromium: what a person sees and clicks. Screenshots go to `artifacts/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from playwright.sync_api import Locator, Page, Request, expect, sync_playwright

from circuits.cli.main import run
from circuits.edits.recipes import Recipe, edited
from circuits.effects import predictions
from circuits.examples import Examples
from circuits.families import Family, Member, save_family
from circuits.harvesting import harvest
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import to_image
from circuits.stimuli.sources import open_source
from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace
from tests import hostile

pytestmark = pytest.mark.browser

ARTIFACTS = Path(__file__).parent.parent / "artifacts"
CURVES = (379, 385, 343, 342, 406, 388, 324, 340, 330, 349)
"""Curve detectors of mixed3b (Cammarata et al. 2020)."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workspace:
    """A small workspace: three models, an autoencoder, and GoogLeNet where its weights are."""
    made = Workspace(tmp_path_factory.mktemp("ws"))
    for spec, data, sites in (
        ("cleanroom", "curves", ["line", "curve"]),
        ("shapes", "shapes", ["mixed3a", "mixed3b"]),
        ("induction", "repeats", ["blocks.1.attn.hook_z"]),
    ):
        model = load_model(spec)
        harvest(model, open_source(data), sites, made, ModelRecord(spec, model.hash))
    more = "--latents 256 --k 8 --steps 30 --batch 512"
    at = ["--workspace", str(made.root)]
    assert run(f"sae train shapes mixed3b --name little --data shapes {more}".split() + at) == 0
    assert (
        run(["harvest", "shapes+sae/little", "--data", "shapes", "--sites", "sae/little", *at]) == 0
    )
    return made


class Server:
    """The app, as `circuits app` starts it: on a free port, and on the same one if it is started again."""

    def __init__(self, place: Workspace, *more: str) -> None:
        self.root, self.more = place.root, more
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [
            sys.executable, "-m", "circuits.cli.main", "app", "--workspace", str(self.root), "--port", str(self.port),
            *self.more,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(self.url, timeout=2):
                return
            time.sleep(0.1)
        self.stop()
        raise TimeoutError(f"the app did not answer at {self.url}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        os.killpg(self.process.pid, how)
        self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def running(place: Workspace) -> Iterator[Server]:
    made = Server(place)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def server(running: Server) -> str:
    return running.url


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium`")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        expect.set_options(timeout=120_000)  # a loaded machine is slow, not wrong
        context.set_default_timeout(120_000)
        yield context.new_page()
        browser.close()


ON_CANVAS = "id => document.querySelector('.circuit-canvas')?.cy?.getElementById(id).length > 0"
"""Whether a node is on the canvas."""


def shoot(page: Page, name: str) -> None:
    """Keep a screenshot of the whole page for people to look at."""
    quiet(page)
    ARTIFACTS.mkdir(exist_ok=True)
    size = page.viewport_size
    assert size is not None
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": height + 20})
    page.wait_for_timeout(300)
    page.screenshot(path=ARTIFACTS / f"{name}.png")
    page.set_viewport_size(size)


def quiet(page: Page) -> None:
    """Wait until the page has nothing left to compute, and shows no error of Python's."""
    state = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state')"
    page.wait_for_timeout(150)
    page.wait_for_function(f"{state} == 'notRunning'", timeout=120_000)
    expect(page.get_by_test_id("stException")).to_have_count(0)


def pick(page: Page, label: str, option: str) -> None:
    """Choose in a select box."""
    page.get_by_role("combobox", name=re.compile(re.escape(label))).click()
    page.get_by_role("option", name=option, exact=True).click()
    quiet(page)


def on_canvas(page: Page, node: str) -> None:
    """Click a node of the canvas."""
    there = """id => { const box = document.querySelector('.circuit-canvas'), at = box.getBoundingClientRect(),
        p = box.cy.getElementById(id).renderedPosition(); return [at.x + p.x, at.y + p.y]; }"""
    chosen = "document.querySelector('.circuit-canvas').cy.$(':selected').map(one => one.id())"
    page.wait_for_function(f"({ON_CANVAS})({json.dumps(node)})")
    quiet(page)
    before = None
    while (at := page.evaluate(there, node)) != before:  # still being laid out
        page.locator(".circuit-canvas").scroll_into_view_if_needed()
        page.wait_for_timeout(200)
        before = at
    page.mouse.click(*at)
    waited(lambda: page.evaluate(chosen) == [node])
    quiet(page)


def number(text: str, before: str) -> float:
    """The number that follows some words."""
    found = re.search(re.escape(before) + r"\s*([-+0-9.e]+)", text)
    assert found is not None, f"{before!r} is not in {text!r}"
    return float(found[1])


def waited(found: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def caption(page: Page, words: str) -> Locator:
    return page.get_by_test_id("stCaptionContainer").filter(has_text=words)


# --- journeys ------------------------------------------------------------------------------------


def test_a_newcomer_takes_negative_weights_away_and_an_echo_appears(
    server: str, page: Page
) -> None:
    outside: list[str] = []
    own = (server, "data:", "blob:", f"ws{server[4:]}")
    page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    page.goto(server)
    expect(page.get_by_role("heading", name="New here? Two minutes")).to_be_visible()
    shoot(page, "a-home")
    page.get_by_role("link", name="1. A curve unit").click()
    expect(page.get_by_role("heading", name="curve:30 — curve 90°, radius 26")).to_be_visible()
    expect(page.get_by_role("heading", name="Built from")).to_be_visible()
    assert "unit=30" in page.url
    shoot(page, "a-unit")
    page.get_by_role("link", name="These as a circuit").click()
    on_canvas(page, "curve:30")
    expect(page.get_by_role("heading", name="curve:30 · curve 90°, radius 26")).to_be_visible()
    shoot(page, "a-canvas")
    page.get_by_role("link", name="Edit it").click()
    expect(page.get_by_role("heading", name="Edits", exact=True)).to_be_visible()
    expect(caption(page, "intact: mean direction")).to_be_visible()
    assert number(caption(page, "intact: mean direction").inner_text(), "echo") == 0.0

    pick(page, "How", "Its weights: keep only positive ones")
    page.get_by_role("button", name="Add this edit").click()
    expect(caption(page, "edited: mean direction")).to_be_visible()
    assert number(caption(page, "edited: mean direction").inner_text(), "echo") > 0.1
    assert number(caption(page, "intact: mean direction").inner_text(), "echo") == 0.0
    shoot(page, "a-echo")
    page.get_by_role("button", name="Undo").click()
    expect(caption(page, "edited: mean direction")).to_have_count(0)
    expect(page.get_by_text("None: the model is as it is.")).to_be_visible()
    page.get_by_role("button", name="Redo").click()
    expect(caption(page, "edited: mean direction")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    quiet(page)
    assert not errors
    assert not outside, "nothing is loaded from elsewhere"


def test_googlenets_curves_are_ablated_and_a_script_gives_the_same_numbers(
    place: Workspace, server: str, page: Page, assets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    images = sorted((assets / "images" / "imagenet500").glob("*.jpg"))
    clock = next(p for p in images if "wall_clock" in p.name)
    for path in [clock, *images[::40]]:
        shutil.copy(path, folder)
    model = load_model("googlenet")
    source = open_source(f"folder:{folder}")
    harvest(model, source, ["mixed3b"], place, ModelRecord("googlenet", model.hash))
    members = tuple(Member(float(i), Unit("mixed3b", u), 1.0) for i, u in enumerate(CURVES))
    nan = float("nan")
    save_family(
        place.database,
        Family(
            "curves",
            "mixed3b",
            "rotation",
            360.0,
            members,
            nan,
            nan,
            "",
            0,
            model.hash,
            "published",
            0,
        ),
    )
    place.writable()

    page.goto(f"{server}/site?model=googlenet&site=mixed3b")
    page.wait_for_function("document.querySelectorAll('.unit-tile').length == 480")
    shoot(page, "b-sheet")
    page.locator(".unit-tile", has_text=re.compile("^379$")).click()
    expect(page.get_by_role("heading", name="mixed3b:379")).to_be_visible()
    expect(page.get_by_role("heading", name="Family “curves”")).to_be_visible()
    shoot(page, "b-unit")
    page.get_by_role("link", name="Edit the family").click()
    expect(page.get_by_role("heading", name="Edits", exact=True)).to_be_visible()
    quiet(page)
    at = next(i for i, name in enumerate(source.names) if "wall_clock" in name)
    pick(page, "Example", f"{at} · {source.names[at]}")
    page.get_by_role("button", name="Add this edit").click()
    expect(page.get_by_text("scale units=mixed3b")).to_be_visible()
    quiet(page)
    page.get_by_role("button", name="Python").first.click()
    code = page.get_by_test_id("stPopoverBody").locator("code").inner_text()
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the recipe").click()
    download.value.save_as(tmp_path / "recipe.json")
    shoot(page, "b-edited")

    recipe = Recipe.load(tmp_path / "recipe.json")
    x = Examples(model, source, None).subset([at])
    before = predictions(model, x)
    with edited(model, recipe):
        after = predictions(model, x, of=[p.index for p in before])
    shown = dict(re.findall(r"#  (.+): ([0-9.]+)", code))
    assert shown == {p.name: f"{p.probability:.6f}" for p in after}
    assert any(
        abs(a.probability - b.probability) > 1e-3 for a, b in zip(before, after, strict=True)
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    printed = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert {name: f"{float(p):.6f}" for name, p in printed} == shown, (
        "the script that was copied out"
    )


@pytest.mark.nightly
def test_without_its_induction_head_repeated_text_costs_more(server: str, page: Page) -> None:
    page.goto(f"{server}/unit?model=induction&site=blocks.1.attn.hook_z&unit=1")
    expect(page.get_by_role("heading", name="Where it looks")).to_be_visible()
    expect(page.get_by_role("heading", name="What it copies and changes")).to_be_visible()
    shoot(page, "c-head")
    page.get_by_role("link", name="Edit it", exact=True).click()
    expect(page.get_by_role("heading", name="Edits", exact=True)).to_be_visible()
    quiet(page)
    pick(page, "Input from", "your own")
    once = "0 7 18 36 46 21 40 27 58 14 20 63 47 15 42 19"
    page.get_by_label("A text").fill(f"{once} {once[2:]} {once[2:]}")
    page.get_by_label("A text").press("Enter")
    quiet(page)
    page.get_by_role("button", name="Add this edit").click()
    expect(caption(page, "edited: loss")).to_be_visible()
    intact, without = (
        float(re.findall(r"[0-9.]+", caption(page, f"{name}: loss").inner_text())[1])
        for name in ("intact", "edited")
    )
    assert without > 1.2 * intact, "where the text repeats"
    page.get_by_role("button", name="Compare with random edits").click()
    expect(caption(page, "Undone afterwards: identical to the bit")).to_be_visible()
    shoot(page, "c-loss")
    page.get_by_role("button", name="Undo").click()
    quiet(page)


@pytest.mark.nightly
def test_a_concept_is_named_and_switched_off(place: Workspace, server: str, page: Page) -> None:
    page.goto(f"{server}/concepts?sae=little")
    expect(page.get_by_role("heading", name="Decisions by latents")).to_be_visible()
    quiet(page)
    page.get_by_role("link", name="Name one on its page").click()
    expect(page.get_by_role("heading", name=re.compile("^sae.little:"))).to_be_visible()
    quiet(page)
    page.get_by_role("button", name="Name it").click()
    page.get_by_label("What it is").fill("round <b>things</b>")
    page.get_by_label("Why").fill("its examples")
    page.get_by_role("button", name="Keep").click()
    expect(caption(page, "Called “round")).to_be_visible()
    shoot(page, "d-named")
    page.get_by_role("link", name="Concepts").click()
    expect(page.get_by_role("heading", name="Decisions by latents")).to_be_visible()
    quiet(page)
    box = page.get_by_role("combobox", name="Switch latents")
    box.scroll_into_view_if_needed()
    box.click()
    box.press("ArrowDown")
    page.get_by_role("option").nth(1).click()  # the first stands for all
    expect(caption(page, "Accuracy on")).to_be_visible()
    assert "about as active" in caption(page, "Accuracy on").inner_text()
    shoot(page, "d-switched")
    page.keyboard.press("Escape")  # the open list hides what is around it
    quiet(page)
    page.get_by_role("button", name="Put in force as edits of the model").click()
    expect(page.get_by_text("In force in your session.")).to_be_visible()
    page.goto(f"{server}/edits?model=shapes%2Bsae/little")  # a new session: the tab has kept them
    expect(page.get_by_text(re.compile("units=sae/little:"))).to_be_visible()


def test_a_job_edits_and_a_circuit_outlive_a_reload_and_the_server(
    running: Server, page: Page
) -> None:
    url = running.url
    page.goto(f"{url}/edits?model=cleanroom&on=line:3")
    page.get_by_role("button", name="Add this edit").click()
    expect(page.get_by_text("scale units=line:3 factor=0")).to_be_visible()
    quiet(page)
    page.goto(f"{url}/circuit?model=shapes&unit=mixed3b:200")
    expect(page.get_by_role("button", name="Add", exact=True)).to_be_visible()  # Enter clicks it
    page.get_by_label("Add units").fill("mixed3a:0")
    page.get_by_label("Add units").press("Enter")
    page.wait_for_function(ON_CANVAS, arg="mixed3a:0")
    quiet(page)
    page.goto(f"{url}/jobs?model=shapes&do=sae&site=mixed3b")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("▶ running")).to_be_visible()
    page.reload()
    expect(page.get_by_text("▶ running")).to_be_visible()
    moved = page.get_by_text(re.compile(r"^\d+ of \d+$")).first
    expect(moved).to_be_visible()
    shoot(page, "e-running")
    running.stop(signal.SIGKILL)
    running.start()
    page.goto(f"{url}/jobs")
    expect(page.get_by_text("▶ running")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("◼ cancelled")).to_be_visible()
    shoot(page, "e-cancelled")
    page.goto(f"{url}/circuit?model=shapes&unit=mixed3b:200")
    page.wait_for_function(ON_CANVAS, arg="mixed3a:0")
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function(f"id => !({ON_CANVAS})(id)", arg="mixed3a:0")
    page.goto(f"{url}/edits?model=cleanroom")
    expect(page.get_by_text("scale units=line:3 factor=0")).to_be_visible()
    other = page.context.new_page()  # another tab
    other.goto(f"{url}/edits?model=cleanroom")
    quiet(other)
    expect(other.get_by_text("None: the model is as it is.")).to_be_visible()
    other.close()
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("None: the model is as it is.")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Edits in force")).to_be_visible()
    quiet(page)
    expect(page.get_by_text("None: the model is as it is.")).to_be_visible()


# --- other promises ------------------------------------------------------------------------------


def test_two_people_do_not_see_each_others_edits(server: str, page: Page) -> None:
    other = page.context.new_page()
    for one in (page, other):
        one.goto(f"{server}/edits?model=shapes&on=mixed3b:200")
        expect(one.get_by_role("button", name="Add this edit")).to_be_visible()
        quiet(one)
    page.bring_to_front()
    page.get_by_role("button", name="Add this edit").click()
    expect(page.get_by_text("edited", exact=True).first).to_be_visible()
    other.bring_to_front()
    other.get_by_label("Watch unit").fill("mixed3b:201")
    other.get_by_label("Watch unit").press("Enter")
    quiet(other)
    expect(other.get_by_text("None: the model is as it is.")).to_be_visible()
    expect(caption(other, "edited: mean direction")).to_have_count(0)
    other.close()


def test_a_circuit_is_grown_saved_and_opened_again(server: str, page: Page) -> None:
    page.goto(f"{server}/circuit?model=shapes&unit=mixed3b:200")
    on_canvas(page, "logits:6")
    pushed = "document.querySelector('h1').insertAdjacentHTML('afterend', '<div style=\"height: 60px\"></div>')"
    page.evaluate(pushed)  # as what is drawn late above the canvas does
    on_canvas(page, "mixed3b:200")
    nodes = "document.querySelector('.circuit-canvas').cy.nodes('[^count]').filter(n => !n.hasClass('row')).length"
    before = page.evaluate(nodes)
    page.get_by_label("How many").fill("12")
    page.get_by_label("How many").press("Enter")
    quiet(page)
    page.get_by_role("button", name="Add what builds it").click()
    waited(lambda: page.evaluate(nodes) > before)
    grown = page.evaluate(nodes)
    page.get_by_text("Save, open, compare, export").click()
    page.get_by_label("Name", exact=True).fill("mine")
    page.get_by_label("Name", exact=True).press("Enter")
    quiet(page)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Saved as version 1 of mine.")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    assert len(json.loads(Path(download.value.path()).read_text())["nodes"]) == grown
    page.goto(f"{server}/circuit?model=shapes&circuit=mine")
    page.wait_for_function("document.querySelector('.circuit-canvas')?.cy?.nodes().length > 0")
    assert page.evaluate(nodes) == grown
    page.goto(f"{server}/unit?model=shapes&site=mixed3b&unit=200")
    expect(page.get_by_role("link", name="mine (version 1)")).to_be_visible()


def test_a_circuit_is_found_and_opened_on_the_canvas(server: str, page: Page) -> None:
    button = page.get_by_role("button", name="Find the circuit")
    cancel = page.get_by_role("button", name="Cancel")
    page.goto(f"{server}/find?model=induction&n=256&size=20")
    button.click()
    cancel.click()
    expect(button).to_be_visible()
    expect(cancel).to_have_count(0)
    quiet(page)
    expect(page.get_by_role("heading", name="Edges by score")).to_have_count(0)
    pick(page, "Examples", "16")
    expect(page).to_have_url(re.compile("n=16"))
    button.click()
    expect(page.get_by_role("heading", name="Edges by score")).to_be_visible()
    expect(cancel).to_have_count(0)
    quiet(page)
    expect(button).to_have_count(0)
    expect(page.locator(".st-key-faithfulness svg.marks")).to_be_visible()
    shoot(page, "found-circuit")
    connected = int(number(caption(page, "strongest edges, of which").inner_text(), "of which"))
    page.get_by_label("Name", exact=True).fill("found here")
    page.get_by_label("Name", exact=True).press("Enter")
    quiet(page)
    page.get_by_role("button", name="Save the strongest").click()
    expect(page.get_by_role("heading", name="Circuit", exact=True)).to_be_visible()
    said = caption(page, "found on repeats (find half)").inner_text()
    assert f"{connected} edges" in said
    assert "circuit=found+here" in page.url or "circuit=found%20here" in page.url
    page.wait_for_function("document.querySelector('.circuit-canvas')?.cy?.edges().length > 0")
    edges = "document.querySelector('.circuit-canvas').cy.edges().length"
    assert page.evaluate(edges) == connected
    quiet(page)


def test_a_key_leads_to_the_search_which_finds_classes(server: str, page: Page) -> None:
    page.goto(f"{server}/unit?model=shapes&site=mixed3b&unit=200")
    expect(page.get_by_role("button", name="next →")).to_be_visible()  # the sidebar is drawn last
    quiet(page)

    def led() -> bool:
        page.keyboard.press("/")
        return page.evaluate("document.activeElement.tagName") == "INPUT"

    waited(led)
    page.keyboard.type("curve 210")  # in the field, keys are letters
    page.keyboard.press("Enter")
    page.get_by_role("link", name="logits:7 · curve 210°").click()
    expect(page.get_by_role("heading", name="logits:7", level=1)).to_be_visible()


@pytest.mark.nightly
def test_pages_can_be_read_wide_and_narrow_in_light_and_dark(server: str, page: Page) -> None:
    for name in (
        "unit?model=cleanroom&site=curve&unit=30",
        "circuit?model=cleanroom&unit=curve:30",
        "case",
    ):
        page.goto(f"{server}/{name}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        for scheme, width in (("light", 1280), ("dark", 800)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 1000})
            quiet(page)
            main = page.get_by_test_id("stMain")
            assert main.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), (
                f"{name} is wider than {width}"
            )
            shoot(page, f"theme-{name.partition('?')[0]}-{scheme}-{width}")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 1000})


def test_odd_urls_and_uploads_get_a_message(server: str, page: Page, tmp_path: Path) -> None:
    script = "<script>window.hacked=1</script>"
    page.goto(
        f"{server}/edits?model=cleanroom&on=line:3"
    )  # the tab keeps something: it runs pages once more
    page.get_by_role("button", name="Add this edit").click()
    expect(page.get_by_text("scale units=line:3 factor=0")).to_be_visible()
    quiet(page)
    for name, said in (
        (f"unit?model={script}", "There is no model"),
        ("unit?model=cleanroom&site=curve&unit=99999", "There is no unit"),
        ("circuit?model=cleanroom&unit=nope:1", "nope"),
        (f"circuit?model=cleanroom&circuit={script}", "no circuit"),
        (f"edits?model=cleanroom&on={script}", "not of the form"),
        ("compare?model=cleanroom&unit=curve:99999&other=x", "99999"),
    ):
        page.goto(f"{server}/{name}")
        quiet(page)
        expect(page.get_by_test_id("stAlert").filter(has_text=said).first).to_be_visible()
        assert page.evaluate("window.hacked") is None
    page.goto(f"{server}/yours?model=shapes&from=your own")
    quiet(page)  # a file that is chosen while the page is still being built is lost
    fake = tmp_path / "a.png"
    fake.write_text("no picture")
    page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(fake)
    expect(page.get_by_test_id("stAlert").filter(has_text="a.png")).to_be_visible()
    good = tmp_path / "good.png"
    to_image(torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))).save(good)
    page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(good)
    expect(page.get_by_role("heading", name=re.compile("^Most active at"))).to_be_visible()
    quiet(page)


MARKUP = """() => {
  const found = [], own = location.origin;
  for (const e of document.querySelectorAll('[data-testid=stApp] *, #vg-tooltip-element *')) {
    const at = ['href', 'src', 'srcset', 'action', 'data'].map(name => e.getAttribute(name)).filter(Boolean);
    const away = at.filter(url => !/^(data:image|blob:|#)/.test(url) && new URL(url, own).origin != own);
    const runs = e.getAttributeNames().some(name => name.startsWith('on'));
    if (away.length || runs || e.matches('iframe, script, object, embed, s, del, em, .katex, .stMarkdownBadge, ' +
      '.stMarkdownColoredText, [data-testid=stMarkdownContainer] :is(b, ol li p, table, blockquote, img)'))
      found.push(e.outerHTML.slice(0, 200));
  }
  return found; }"""
"""What of a page leads elsewhere, runs, or is more than text."""


@pytest.mark.nightly  # three minutes: 67 pages, each with what unfolds on it
def test_hostile_names_stay_text(page: Page, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CIRCUITS_TRUST_PYTHON", "1")
    place = hostile.hostile(tmp_path)
    running = Server(place, "--trust-python")
    outside: list[str] = []
    own = (running.url, "data:", "blob:", f"ws{running.url[4:]}/")

    def listen(request: Request) -> None:
        if not request.url.startswith(own):
            outside.append(request.url)

    page.context.on("request", listen)  # popups too
    views = [*hostile.pages(place), *hostile.asked()]
    views += [("unit", {"model": name, "site": name, "data": name}) for name in hostile.NAMES]
    try:
        for view, query in views:
            page.goto(f"{running.url}/{view}?{urlencode(query)}")
            quiet(page)
            _unfold(page)
            assert not page.evaluate(MARKUP), (view, query)
            assert page.evaluate("window.hacked") is None, (view, query)
            assert not outside, (view, query)
        eyes = next(query["model"] for view, query in views if view == "unit")
        page.goto(f"{running.url}/yours?{urlencode({'model': eyes, 'from': 'your own'})}")
        quiet(page)
        for name in hostile.NAMES[0], hostile.NAMES[13]:
            fake = {"name": f"{name}.png", "mimeType": "image/png", "buffer": b"no picture"}
            page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files([fake])
            expect(page.get_by_test_id("stAlert")).to_be_visible()
            quiet(page)
            assert not page.evaluate(MARKUP), name
        assert not outside
    finally:
        page.context.remove_listener("request", listen)
        running.stop()


def _unfold(page: Page) -> None:
    """Open what is folded, and let the pointer rest on charts."""
    for folded in page.locator("[data-testid=stExpander] details:not([open]) summary").all():
        folded.click()
    quiet(page)
    for chart in page.get_by_test_id("stVegaLiteChart").all():
        box = chart.bounding_box()
        if box is not None:
            for share in 0.2, 0.5, 0.8:
                page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
    for popover in page.get_by_test_id("stPopover").locator("button:visible").all():
        popover.click()
        page.wait_for_timeout(100)
        assert not page.evaluate(MARKUP)
        page.keyboard.press("Escape")
