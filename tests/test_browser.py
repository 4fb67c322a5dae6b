"""The app's journey in headless Chromium: what a person sees and clicks."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from circuits.harvesting import harvest
from circuits.models.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.workspace import ModelRecord, Workspace

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ARTIFACTS = Path(__file__).parent.parent / "artifacts"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The app, as `circuits app` starts it, on a small workspace."""
    place = Workspace(tmp_path_factory.mktemp("ws"))
    model = load_model("shapes")
    record = ModelRecord("shapes", model.hash)
    harvest(model, open_source("shapes"), ["mixed3a", "mixed3b"], place, record, batch=32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "circuits.cli.main", "app", "--workspace", str(place.root), "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=20)


def _wait_for(url: str) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the app did not answer at {url}")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium`")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        expect.set_options(timeout=60_000)  # a loaded machine is slow, not wrong
        yield context.new_page()
        browser.close()


def shoot(page: Page, name: str) -> None:
    """Keep a screenshot of the whole page for people to look at."""
    ARTIFACTS.mkdir(exist_ok=True)
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": 1280, "height": height + 20})
    page.wait_for_timeout(1500)
    page.screenshot(path=ARTIFACTS / f"{name}.png")
    page.set_viewport_size({"width": 1280, "height": 1000})


def test_a_persons_way_through_the_app(server: str, page: Page) -> None:
    outside: list[str] = []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((server, "data:", "blob:", f"ws{server[4:]}")) else None)  # fmt: skip  # noqa: E501
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    page.goto(f"{server}/unit?model=shapes&site=mixed3a&unit=100")
    expect(page.get_by_role("heading", name="mixed3a:100")).to_be_visible()
    expect(page.get_by_role("heading", name="What it does")).to_be_visible()
    expect(page.locator(".js-plotly-plot").last.get_by_text("probability")).to_be_visible()

    page.get_by_role("button", name="Make the picture").click()
    expect(page.get_by_text(re.compile("128 steps, seed 0"))).to_be_visible()
    shoot(page, "unit")

    page.get_by_text("Ablate this unit").click()
    expect(page.get_by_text(re.compile("KL from the intact prediction"))).to_be_visible()
    expect(page.locator(".js-plotly-plot").last.get_by_text("mixed3a:100 removed")).to_be_visible()
    shoot(page, "ablated")
    page.get_by_text("Ablate this unit").click()
    expect(page.get_by_text(re.compile("KL from the intact prediction"))).to_be_hidden()

    page.get_by_role("button", name="mixed3a_5x5_bottleneck").first.click()
    expect(page.get_by_role("heading", name=re.compile("^mixed3a_5x5_bottleneck:"))).to_be_visible()
    assert "site=mixed3a_5x5_bottleneck" in page.url

    page.reload()
    expect(page.get_by_role("heading", name=re.compile("^mixed3a_5x5_bottleneck:"))).to_be_visible()
    assert not errors
    assert not outside, "nothing is loaded from elsewhere"


def test_two_people_do_not_see_each_others_ablation(server: str, page: Page) -> None:
    other = page.context.new_page()
    for one in (page, other):
        one.goto(f"{server}/unit?model=shapes&site=mixed3b&unit=200")
        expect(one.get_by_text("Ablate this unit")).to_be_visible()
    page.bring_to_front()
    page.get_by_text("Ablate this unit").click()
    expect(page.get_by_text(re.compile("KL from the intact prediction"))).to_be_visible()
    other.bring_to_front()
    other.get_by_role("button", name="next →").click()
    expect(other.get_by_role("heading", name="mixed3b:201")).to_be_visible()
    expect(other.get_by_text(re.compile("KL from the intact prediction"))).to_be_hidden()
    other.close()
