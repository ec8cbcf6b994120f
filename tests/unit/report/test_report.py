"""tools/report.py writes one page for any run, finished or not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ddk_ds.commands.report_command import main
from ddk_ds.errors import CheckpointError
from ddk_ds.report.domains import asked_and_realised
from ddk_ds.report.happenings import describe_marks, marked_events
from ddk_ds.report.page import sections, write_page
from ddk_ds.report.records import PARTS, read_run
from ddk_ds.report.training import seconds_by_part, step_seconds_by_part
from tests.unit.report.made_run import DOMAINS, TOKENS_A_STEP, make_run

ALL = {"perplexity", "ratio", "mixture", "tokens", "loss", "grad_norm", "learning_rate", "speed", "step_parts", "time"}
ALL |= {"memory", "progress"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The tags of a page, all of them closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_needs_nothing_else_and_says_what_each_picture_shows(tmp_path: Path) -> None:
    events = [{"event": "alarm", "time_s": 1.79e9 + 60, "step": 30, "text": "<b>cpp</b> falls behind"}]
    run_dir = make_run(tmp_path, events=events)
    assert main([str(run_dir)]) == 0
    text = (run_dir / "report" / "report.html").read_text()
    page = Page(text)
    assert not page.all("script")
    sources = [item[key] or "" for _, item in page.tags for key in ("src", "href") if key in item]
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import|http-equiv", text)
    figures = {item["id"] for item in page.all("figure")}
    assert figures == ALL == {path.stem for path in (run_dir / "report").glob("*.svg")}
    for image in page.all("img"):
        assert len(image["alt"] or "") > 40
    assert "python before" not in text  # the values are named by series: "python: student before 30.5"
    assert "python: student before" in text and "1 alarm" in text
    assert "&lt;b&gt;cpp&lt;/b&gt; falls behind" in text and "<b>cpp" not in text
    anchors = {item["href"] for item in page.all("a")}
    assert anchors == {f"#{item['id']}" for item in page.all("section")}
    for path in (run_dir / "report").glob("*.svg"):
        drawn = ElementTree.parse(path).getroot()  # matplotlib names each text in a comment; glyphs are paths
        assert not [node for node in drawn.iter() if (node.get("href") or "").startswith("http")]


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("steps", "finished"), [(60, True), (60, False), (1, False), (3, False)])
def test_any_length_of_run_with_and_without_a_teacher(
    tmp_path: Path, teacher: bool, steps: int, finished: bool
) -> None:
    run_dir = make_run(tmp_path, steps=steps, finished=finished, teacher=teacher)
    path = write_page([run_dir], tmp_path / "out")
    figures = {str(item["id"]) for item in Page(path.read_text()).all("figure")}
    assert figures == (ALL if teacher else ALL - {"ratio"} | {"perplexity_over_tokens"})


def test_a_run_that_was_interrupted_and_resumed_twice_has_two_restarts(tmp_path: Path) -> None:
    events = []
    for step in (10, 20):
        events.append({"event": "interrupted", "time_s": 1.79e9 + step, "step": step, "signal": "SIGINT"})
        events.append({"event": "resume", "time_s": 1.79e9 + step + 5, "step": step, "world_size": 2})
    run = read_run(make_run(tmp_path, events=events))
    assert describe_marks(run) == " Vertical lines: 2 restarts."
    assert [(kind.label, steps) for kind, steps in marked_events(run)] == [("restart", [10.0, 20.0])]


def test_before_the_first_step_there_is_a_page_too(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, finished=False)
    lines = (run_dir / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "ledger.jsonl").write_text(lines[0])
    text = write_page([run_dir], tmp_path / "out").read_text()
    assert "No step is done yet" in text and 'id="perplexity"' in text and 'id="mixture"' in text


def test_a_cut_line_is_left_out_and_a_damaged_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path, finished=False)
    ledger = run_dir / "ledger.jsonl"
    whole = ledger.read_text()
    ledger.write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    assert read_run(run_dir).last_step == 59
    lines = whole.splitlines()
    lines[7] = lines[7][:30]
    ledger.write_text("\n".join(lines) + "\n")
    assert main([str(run_dir)]) == 2
    assert "ledger.jsonl, line 8: damaged" in capsys.readouterr().err
    lines[7] = json.dumps({"kind": "step", "step": 7})
    ledger.write_text("\n".join(lines) + "\n")
    assert main([str(run_dir)]) == 2
    assert "lacks what a run writes there" in capsys.readouterr().err


def test_no_run_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "ledger.jsonl: there is no such file" in error and error.count("\n") == 1


def test_the_numbers_are_those_of_the_ledger(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, steps=55, finished=False))
    assert (run.last_step == 55 and run.state.kind == "silent") or run.state.kind == "running"
    assert run.expected_steps == 55
    assert run.domain_tokens.sum() == 55 * TOKENS_A_STEP
    asked, drawn = asked_and_realised(run)
    np.testing.assert_allclose([asked.sum(), drawn.sum()], 1)
    np.testing.assert_allclose(asked, drawn, atol=2e-3)  # the made run rounds to whole tokens
    last = run.results[-1]
    assert last.ratio_after == pytest.approx(last.after / 19.0) and last.teacher_ppl == 19.0
    parts = step_seconds_by_part(run)
    assert list(parts) == [*PARTS.values(), "other"]
    np.testing.assert_allclose(sum(parts.values()), run.steps.columns["step_s"], rtol=1e-6)
    found = seconds_by_part(run)
    assert found["measurement"] == 4.0 * 6 and found["controller"] == pytest.approx(0.002 * 6)


def test_a_ledger_without_the_parts_of_steps_has_the_rest_as_other(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=20)
    text = re.sub(
        r'"(?!step|data)[a-z_]+_s": [\d.]+, |, "peak_gb": {[^}]*}', "", (run_dir / "ledger.jsonl").read_text()
    )
    (run_dir / "ledger.jsonl").write_text(text)
    run = read_run(run_dir)
    assert list(step_seconds_by_part(run)) == ["waiting for data", "other"]
    assert {picture.name for part in sections([run]) for picture in part.pictures} == ALL


def test_secrets_do_not_leave_the_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=12)
    with (run_dir / "config.yaml").open("a") as stream:
        stream.write("hub_token: hf_abcdef\nremote: s3://user:pass@host/x\n")
    text = write_page([run_dir], tmp_path / "out").read_text()
    assert "hf_abcdef" not in text and "user:pass" not in text
    assert "hub_token: ***" in text and "chunk_tokens: null" in text and "s3://***@host" in text


def test_other_runs_stand_beside_the_first(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", steps=20)
    second = make_run(tmp_path / "b", steps=20)
    third = make_run(tmp_path / "c", name="plain", steps=20, teacher=False, domains=(*DOMAINS[1:], "new"))
    text = write_page([first, second, third], tmp_path / "out").read_text()
    figures = [str(item["id"]) for item in Page(text).all("figure")]
    assert len(figures) == len(set(figures))
    assert sum(name.startswith("ratio") for name in figures) == 2 and "perplexity_over_tokens_plain" in figures
    assert f"{first} after" in text and f"{second} after" in text and "plain after" in text


def test_a_ledger_of_100_000_steps(tmp_path: Path) -> None:
    domains = [f"domain-{number}" for number in range(10)]
    run_dir = make_run(tmp_path, steps=100_000, interval_steps=500, domains=domains)
    spike = '"grad_norm": 987.5'
    text = (run_dir / "ledger.jsonl").read_text()
    at = text.index('"grad_norm"', len(text) // 3)
    (run_dir / "ledger.jsonl").write_text(text[:at] + spike + text[text.index(", ", at) :])
    started = time.perf_counter()
    path = write_page([run_dir], tmp_path / "out")
    assert time.perf_counter() - started < 60  # 20 s on an idle machine; others may be at work on this one
    assert path.stat().st_size < 5e6
    assert "and 987.5" in path.read_text() and "A bin has 334 steps" in path.read_text()


def test_a_run_that_no_measurement_has_begun(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "ledger.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="not begun"):
        read_run(run_dir)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, width: int) -> None:
    """No console error, no broken picture, and nothing wider than the window."""
    path = write_page([make_run(tmp_path)], tmp_path / "out")
    # The page itself has no script; this one only looks.
    probe = (
        "<script>addEventListener('load', () => { console.log('FOUND ' + JSON.stringify({"
        "wide: document.documentElement.scrollWidth, window: innerWidth,"
        "broken: [...document.images].filter(one => !one.complete || !one.naturalWidth).length,"
        "pictures: document.images.length, columns: getComputedStyle(document.querySelector('.pictures')).columnCount"
        "})); });</script></body>"
    )
    looked_at = tmp_path / "probe.html"
    looked_at.write_text(path.read_text().replace("</body>", probe))
    framed = tmp_path / "framed.html"  # a window of its own is never narrower than 500
    frame = f'<iframe src="probe.html" width="{width}" height="800" style="border: 0"></iframe>'
    framed.write_text(f'<!DOCTYPE html><link rel="icon" href="data:,"><body style="margin: 0">{frame}</body>')
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=1400,900", f"--screenshot={tmp_path / 'shot.png'}"]
    done = subprocess.run([*command, framed.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1, said
    found = json.JSONDecoder().raw_decode(said[0][said[0].index("FOUND ") + 6 :])[0]
    assert found["pictures"] == len(ALL) and found["broken"] == 0
    assert found["window"] == width and found["wide"] <= width
    assert found["columns"] == ("2" if width > 1000 else "auto")
