"""The report in a real browser, started once: hover, legends, zoom, dark, narrow, print, no script, and --watch."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddk_ds.report.page import write_page
from tests.terminal import hear_signals
from tests.unit.report.browser import CHROMIUM, Browser
from tests.unit.report.made_run import DOMAINS, make_run

ROOT = Path(__file__).parents[3]
READY = "document.documentElement.classList.contains('ready')"
# Bokeh's tooltips lie in shadow roots.
TOOLTIPS = """(() => { const found = [];
  const look = (node) => { for (const one of node.querySelectorAll('*')) {
    if (one.shadowRoot) { if (one.className.includes('bk-Tooltip')) {
      const text = one.shadowRoot.querySelector('.bk-tooltip-content'); if (text) found.push(text.innerText); }
      look(one.shadowRoot); } } };
  look(document); return found.join(' | '); })()"""
FIGURE = "Bokeh.documents[0].roots().find((one) => Bokeh.index.get_by_id(one.id).el.parentElement.id === '{}')"
# The middle of the first picture's visible arrow, in a shadow root too.
RESET = """(() => { const look = (node) => { for (const one of node.querySelectorAll('*')) {
    if (one.title.startsWith('Reset') && one.checkVisibility()) return one;
    const found = one.shadowRoot && look(one.shadowRoot); if (found) return found; } };
  const box = look(document.getElementById('live-mixture-0')).getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2]; })()"""
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
    pytest.mark.long("half a minute for a browser and its pages; test_report reads the same page without one"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on two runs of which the first was started again; its directory holds `first` too."""
    folder = tmp_path_factory.mktemp("report")
    events = [{"event": "resume", "time_s": 1.79e9 + 60, "step": 30, "world_size": 2}]
    runs = [make_run(folder, name="first", events=events, better=0.1), make_run(folder, name="second")]
    return write_page(runs, folder)


def place_of(browser: Browser, element: str) -> tuple[float, float, float, float]:
    """Scroll to an element and return its left, top, width and height in the window."""
    browser.evaluate(f"document.getElementById('{element}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.evaluate(f"document.getElementById('{element}').getBoundingClientRect().toJSON()")
    return box["left"], box["top"], box["width"], box["height"]


def click(browser: Browser, selector: str) -> None:
    """Press an element of the page as a user does: the mouse leaves what it was over."""
    found = f"document.querySelector({json.dumps(selector)})"
    browser.evaluate(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.evaluate(f"{found}.getBoundingClientRect().toJSON()")
    browser.click(box["left"] + box["width"] / 2, box["top"] + box["height"] / 2)


def zoom(browser: Browser, element: str) -> None:
    """Drag the mouse over a part of a live picture."""
    left, top, width, height = place_of(browser, element)
    browser.mouse("mouseMoved", left + 0.4 * width, top + 0.5 * height)
    browser.mouse("mousePressed", left + 0.4 * width, top + 0.5 * height, 1)
    for part in (0.5, 0.6, 0.7):
        browser.mouse("mouseMoved", left + part * width, top + 0.7 * height, 1)
    browser.mouse("mouseReleased", left + 0.7 * width, top + 0.7 * height)


def nothing_wrong(browser: Browser, page: Path) -> None:
    """Raise AssertionError if the console has a complaint, or anything but the page itself was asked for."""
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]


def test_values_on_hover_and_legends_that_switch(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri())
    browser.wait(READY)
    left, top, width, height = place_of(browser, "live-ratio-0")
    browser.mouse("mouseMoved", left + width / 2, top + height / 2)
    browser.mouse("mouseMoved", left + width / 2 + 2, top + height / 2)
    browser.wait(f"({TOOLTIPS}).includes('python')")
    shown = browser.evaluate(TOOLTIPS)
    assert all(domain in shown for domain in DOMAINS)
    lines = map(json.loads, (report.parent / "first" / "ledger.jsonl").read_text().splitlines())
    ratios = [record["ratio"]["python"] for record in lines if record["kind"] == "interval"]
    assert any(f"python {ratio:.5g} at" in shown for ratio in ratios), shown

    button = "#ratio button[data-key='domain:python']"
    click(browser, button)
    pressed = "[...document.querySelectorAll('[data-key=\"domain:python\"]')].map((one) => one.ariaPressed).join()"
    assert set(browser.evaluate(pressed).split(",")) == {"false"}  # in every picture
    left, top, width, height = place_of(browser, "live-ratio-0")
    browser.mouse("mouseMoved", left + width / 2 - 2, top + height / 2)
    browser.wait(f"({TOOLTIPS}).includes('cpp') && !({TOOLTIPS}).includes('python')")
    hidden = "Bokeh.documents[0].roots().flatMap((one) => one.renderers).filter((one) => !one.visible)"
    assert set(browser.evaluate(f"{hidden}.flatMap((one) => one.tags)")) == {"domain:python"}
    assert browser.evaluate(f"{hidden}.length") >= 4  # ratio and mixture of two runs
    click(browser, button)
    assert browser.evaluate(f"{hidden}.length") == 0
    nothing_wrong(browser, report)


def test_zoom_and_the_words_of_a_mark(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri())
    browser.wait(READY)
    ends = "(() => {{ const one = {}; return [one.x_range.start, one.x_range.end]; }})()"
    ranges = [ends.format(FIGURE.format(f"live-{panel}")) for panel in ("mixture-0", "mixture-1", "loss-0")]
    before = browser.evaluate(ranges[0])
    zoom(browser, "live-mixture-0")
    browser.wait(f"{ranges[0]}[0] > {before[0] + 5} && {ranges[0]}[1] < {before[1] - 5}")
    assert browser.evaluate(ranges[1]) == browser.evaluate(ranges[0])  # the panels of a picture zoom together
    assert browser.evaluate(ranges[2])[0] < 2  # and no other picture does
    browser.click(*browser.evaluate(RESET))
    browser.wait(f"{ranges[0]}.join() === '{','.join(map(str, before))}'")

    place_of(browser, "live-mixture-0")
    at = (
        f"(() => {{ const view = Bokeh.index.get_by_id({FIGURE.format('live-mixture-0')}.id);"
        "const box = view.el.getBoundingClientRect();"
        "return [box.left + view.frame.x_scale.compute(30), box.top + box.height / 2]; })()"
    )
    browser.mouse("mouseMoved", *browser.evaluate(at))
    browser.wait(f"({TOOLTIPS}).includes('first: resume at step 30')")
    boxes = "[...document.querySelectorAll('.bk-Tooltip')].map((one) => one.getBoundingClientRect())"
    tops = f"{boxes}.map((one) => [one.top, one.bottom]).sort((a, b) => a[0] - b[0])"
    assert browser.evaluate(f"{boxes}.length") == len(DOMAINS) + 1
    browser.wait(f"{tops}.every((one, place, all) => !place || one[0] >= all[place - 1][1] - 0.5)")  # all can be read
    nothing_wrong(browser, report)


def test_it_fits_a_phone_and_follows_the_dark(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), width=390)
    browser.wait(READY)
    sides = "Bokeh.documents[0].roots().flatMap((one) => one.left).map((one) => one.axis_label_text_color)"
    for dark in (False, True):
        browser.colours(dark)
        browser.wait(f"{sides}.every((one) => one === '{'#a9adb2' if dark else '#555'}')")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        hints = browser.evaluate("[...document.querySelectorAll('.hint')].map((one) => one.checkVisibility()).join()")
        assert hints.startswith("true")  # the table of the result is wider than the window
        back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") is not dark
    nothing_wrong(browser, report)
    browser.resize(1400)
    browser.wait("[...document.querySelectorAll('.hint')].every((one) => !one.checkVisibility())")


STILLS = (
    "(() => { const all = [...document.querySelectorAll('figure img')];"
    "const seen = all.filter((one) => one.checkVisibility() && one.naturalWidth > 0);"
    "const live = [...document.querySelectorAll('.live')].filter((one) => one.checkVisibility());"
    "return [all.length, seen.length, live.length]; })()"
)


def test_on_paper_and_without_scripts_the_pictures_are_still(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri())
    browser.wait(READY)
    number = browser.evaluate(STILLS)[0]
    assert number > 10 and browser.evaluate(STILLS) == [number, 0, number]
    browser.colours(dark=False, media="print")
    assert browser.evaluate(STILLS) == [number, number, 0]
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report.as_uri())
        assert browser.evaluate(STILLS) == [number, number, 0]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_watching_follows_the_run_and_ends_by_ctrl_c(browser: Browser, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=60, finished=False)
    ledger = run_dir / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("")  # the run has begun, and has measured nothing yet
    files = sorted(path.name for path in run_dir.iterdir())
    command = [sys.executable, "tools/report.py", str(run_dir), "--watch", "--port", "0", "--every", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        address = re.match(r"http://127\.0\.0\.1:\d+/", first)
        assert address is not None, first
        browser.open(address[0])
        browser.wait("document.body.innerText.includes('No report yet')")
        if time.time() % 60 > 45:  # the page is loaded again each minute too: not between its loading and the zoom
            time.sleep(61 - time.time() % 60)
        ledger.write_text("".join(lines[:30]))  # 27 steps, and the measurements before the steps 1, 11 and 21
        browser.wait(f"{READY} && document.body.innerText.includes('27 of 60 steps')")
        zoom(browser, "live-loss-0")
        browser.wait("Bokeh.documents[0].roots().some((one) => one.x_range.have_updated_interactively)")
        ledger.write_text("".join(lines))
        kept = "document.body.innerText.includes('27 of 60 steps')"
        time.sleep(2.5)  # two looks: what the user looks at stays
        assert browser.evaluate(kept)
        browser.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
        browser.evaluate("Bokeh.documents[0].roots().forEach((one) => one.reset.emit())")
        time.sleep(2.5)  # so does what the user has selected
        assert browser.evaluate(kept)
        browser.evaluate("getSelection().removeAllRanges()")
        browser.wait(f"{READY} && document.body.innerText.includes('60 of 60 steps')")
        assert browser.complaints == []
        assert all(url.startswith((address[0], "data:")) for url in browser.requests)
        # A page of another name that was pointed to this machine may not read it.
        answer = subprocess.run(["curl", "-s", "-H", "Host: evil.example", address[0]], capture_output=True, timeout=60)
        assert b"403" in answer.stdout
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        browser.wait("document.title.startsWith('(not served any more)')")
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert sorted(path.name for path in run_dir.iterdir()) == files
