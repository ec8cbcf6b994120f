"""tools/report.py writes one page for any run, finished or not."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ddk_ds.commands.report_command import main
from ddk_ds.errors import CheckpointError
from ddk_ds.report.charts import running_mean, smoothing_width
from ddk_ds.report.domains import asked_and_realised
from ddk_ds.report.groups import group_runs
from ddk_ds.report.happenings import describe_marks, marks
from ddk_ds.report.live_charts import live
from ddk_ds.report.page import page, sections, write_page
from ddk_ds.report.records import PARTS, read_run, read_runs
from ddk_ds.report.training import seconds_by_part, step_seconds_by_part
from tests.unit.report.made_run import DOMAINS, TOKENS_A_STEP, make_run

ALL = {"perplexity", "ratio", "mixture", "tokens", "loss", "grad_norm", "learning_rate", "speed", "step_parts", "time"}
ALL |= {"memory", "progress", "ce", "kl"}
TEACHERS = {"ratio", "ce", "kl"}


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
    assert not any("src" in item for item in page.all("script"))
    sources = [item[key] or "" for _, item in page.tags for key in ("src", "href") if key in item]
    assert all(source.startswith(("data:", "#")) for source in sources)
    policy = page.all("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe-eval" not in policy
    figures = {item["id"] for item in page.all("figure")}
    assert figures == ALL == {path.stem for path in (run_dir / "report").glob("*.svg")}
    for image in page.all("img"):
        assert len(image["alt"] or "") > 40
    assert "python before" not in text  # the values are named by series: "python: student before 30.5"
    assert "python: student before" in text and "Vertical lines: 1 alarm." in text
    assert "&lt;b&gt;cpp&lt;/b&gt; falls behind" in text and "<b>cpp" not in text
    anchors = {item["href"] for item in page.all("a")}
    assert anchors == {f"#{item['id']}" for item in page.all("section")}
    for path in (run_dir / "report").glob("*.svg"):
        drawn = ElementTree.parse(path).getroot()  # matplotlib names each text in a comment; glyphs are paths
        assert not [node for node in drawn.iter() if (node.get("href") or "").startswith("http")]


@pytest.mark.parametrize(
    ("steps", "finished", "teacher"),
    [(60, False, True), (60, True, False), (1, False, True), (1, False, False), (3, False, False)],
)
def test_any_length_of_run_with_and_without_a_teacher(
    tmp_path: Path, steps: int, finished: bool, teacher: bool
) -> None:
    run_dir = make_run(tmp_path, steps=steps, finished=finished, teacher=teacher)
    path = write_page([run_dir], tmp_path / "out")
    figures = {str(item["id"]) for item in Page(path.read_text()).all("figure")}
    assert figures == (ALL if teacher else ALL - TEACHERS | {"perplexity_over_tokens"})


def test_a_run_that_was_interrupted_and_resumed_twice_has_two_restarts(tmp_path: Path) -> None:
    events = []
    for step in (10, 20):
        events.append({"event": "interrupted", "time_s": 1.79e9 + step, "step": step, "signal": "SIGINT"})
        events.append({"event": "resume", "time_s": 1.79e9 + step + 5, "step": step, "world_size": 2})
    run = read_run(make_run(tmp_path, events=events))
    assert describe_marks(group_runs([run])) == " Vertical lines: 2 restarts."
    assert [(mark.kind, mark.step) for mark in marks(run)] == [("restart", 10.0), ("restart", 20.0)]


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
    assert "line 8: damaged (step.interval: field required)" in capsys.readouterr().err


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
    assert {chart.name for part in sections([run]) for chart in part.charts} == ALL


def test_secrets_do_not_leave_the_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=12)
    with (run_dir / "config.yaml").open("a") as stream:
        stream.write("hub_token: hf_abcdef\nremote: s3://user:pass@host/x\n")
    text = write_page([run_dir], tmp_path / "out").read_text()
    assert "hf_abcdef" not in text and "user:pass" not in text
    assert "hub_token: ***" in text and "chunk_tokens: null" in text and "s3://***@host" in text


def shown(*run_dirs: Path) -> str:
    """The text of a page on these runs, without the scripts and pictures."""
    runs = read_runs(run_dirs)
    text = page(runs, sections(runs), {})  # the still pictures take most of the time
    return re.sub(r"<script.*?</script>|<style.*?</style>|<img[^>]*>", "", text, flags=re.DOTALL)


def test_other_runs_stand_beside_the_first(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", steps=20)
    second = make_run(tmp_path / "b", steps=20)
    third = make_run(tmp_path / "c", name="plain", steps=20, teacher=False, domains=(*DOMAINS[1:], "new"))
    text = shown(first, second, third)
    figures = [str(item["id"]) for item in Page(text).all("figure")]
    assert len(figures) == len(set(figures)) and set(figures) == ALL | {"mean_ratio", "perplexity_over_tokens"}
    for run in (first, second, "plain"):
        assert f"{run} after" in text
    assert "plain has other domains than" in text and "only those of both are compared" in text
    # Every run is in every picture of the training.
    for name in ("loss", "speed", "memory", "time", "progress"):
        figure = text[text.index(f'<figure id="{name}"') :]
        assert f">{first}<" in figure[:4000] and ">plain<" in figure[:4000]


def test_runs_that_were_measured_otherwise_are_not_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path, name="first", steps=20)
    fewer = make_run(tmp_path, name="fewer", steps=20, held_out=20)
    another = {"content.tokenizer": "another", "content.documents": "masked"}
    tokens = make_run(tmp_path, name="tokens", steps=20, identity=another)
    texts = make_run(tmp_path, name="texts", steps=20, identity={"content.domains.cpp": "train/other"})
    unknown = make_run(tmp_path, name="unknown", steps=20)
    (unknown / "run.json").unlink()
    alone = shown(first, make_run(tmp_path, name="same", steps=20, better=0.1))
    assert ("against same" in alone and "10.0%</b> worse" in alone) or "11.1%</b> worse" in alone
    assert "Not compared" not in alone and "Measured on 500 held-out samples of each domain, of 256 tokens." in alone
    text = shown(first, fewer, tokens, texts, unknown)
    assert text.count(">not compared<") == 3  # the headline has three others at most
    assert "20 held-out samples of each domain, 500 for first" in text
    assert "masked documents, joined ones for first (data.documents)" in text
    assert "another tokenizer than first" in text and "other held-out texts than first in cpp" in text
    assert "unknown has no run.json" in text
    assert "in brackets the difference" not in text and text.count("Not compared with first:") == 4
    assert "Measured on 20 held-out samples" in text and "Measured on 500 held-out samples" in text


def test_seeds_are_one_column_with_their_spread(tmp_path: Path) -> None:
    """The made runs of seed s end at (1 + s / 100) times the perplexities of seed 0."""
    ours = [make_run(tmp_path, name=f"ddk-s{seed}", steps=20, seed=seed, better=0.1) for seed in range(3)]
    theirs = [make_run(tmp_path, name=f"kd-s{seed}", steps=20, seed=seed) for seed in range(3)]
    groups = group_runs(read_runs([*ours, *theirs, ours[0]]))
    assert [len(group.runs) for group in groups] == [3, 3, 1]  # a run twice is no further seed
    runs = read_runs([*ours, *theirs])
    scores = group_runs(runs)[1].scores("after", np.array([10.0, 13.0, 16.0, 19.0]), DOMAINS)
    by_hand = [run.by_domain("ratio")[-1].mean() for run in runs[3:]]
    np.testing.assert_allclose(scores, by_hand)
    np.testing.assert_allclose(scores / scores[0], [1.0, 1.01, 1.02])
    text = shown(*ours, *theirs)
    mean, deviation = np.mean(by_hand), np.std(by_hand, ddof=1)
    assert f"{mean:.3f} ± {deviation:.3f} (+" in text
    change = 1 - np.mean([run.by_domain("ratio")[-1].mean() for run in runs[:3]]) / mean
    assert f"{change:.1%}</b> better" in text and "(standard error)" in text
    best = re.findall(r'<td class="best">([^<]*)<', text)
    assert len(best) == len(DOMAINS) + 2 and not any("(" in cell for cell in best)


def test_what_a_legend_switches_is_drawn(tmp_path: Path) -> None:
    """A browser hides the renderers that have the button's key as a tag (test_report_browser.py clicks there)."""
    runs = read_runs([make_run(tmp_path, name=name, steps=20) for name in ("first", "second")])
    charts = [chart for part in sections(runs) for chart in part.charts]
    (document,) = json.loads(live(charts).content)["documents"].values()
    drawn = [each["attributes"] for figure in document["roots"] for each in figure["attributes"]["renderers"]]
    tags = {tag for attributes in drawn for tag in attributes.get("tags", [])}
    keys = {item["data-key"] for item in Page(shown(*(run.run_dir for run in runs))).all("button")}
    assert {f"domain:{name}" for name in DOMAINS} < keys
    assert keys <= tags


@pytest.mark.long("ten seconds; the page of 100,000 steps is weighed each time")
def test_seven_runs_weigh_less_than_3_mb(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=f"run{number}", steps=2000, interval_steps=50) for number in range(7)]
    assert write_page(runs, tmp_path / "out").stat().st_size < 3e6


def test_continued_prompts_are_shown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=20)
    assert "Continued prompts" not in shown(run_dir)
    with (run_dir / "ledger.jsonl").open("a") as stream:
        for step in (10, 20):
            sample = {"name": "cpp", "prompt": "int <main>", "student": f" text of {step}", "teacher": " taught"}
            stream.write(json.dumps({"kind": "samples", "step": step, "samples": [sample], "clock": {}}) + "\n")
    text = shown(run_dir)
    assert "int &lt;main&gt;" in text and " text of 10<" in text and " text of 20<" in text and " taught<" in text


def test_smoothing_is_a_running_mean() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 10.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 1.5, 3.0, 7.0, 7.0])
    assert [smoothing_width(points) for points in (0, 39, 40, 20_000)] == [1, 1, 3, 1001]


@pytest.mark.long("ten seconds; the bins of a mean are tested above")
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
    assert path.stat().st_size < 3e6
    assert "and 987.5" in path.read_text() and "A bin has 334 steps" in path.read_text()


def test_a_run_that_no_measurement_has_begun(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "ledger.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="not begun"):
        read_run(run_dir)
