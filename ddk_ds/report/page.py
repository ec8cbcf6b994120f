"""The report as one HTML page that needs nothing else: no network, no script, no font.

Its pictures are written as files too.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from ddk_ds.drawing import Array, Picture
from ddk_ds.errors import ConfigError
from ddk_ds.files import write_text
from ddk_ds.report.domains import domain_token_bars, mixture, over_tokens, perplexity_bars
from ddk_ds.report.happenings import checkpoint_seconds, event_rows, progress_picture
from ddk_ds.report.records import DomainResult, RunRecord, read_runs
from ddk_ds.report.run_progress import duration
from ddk_ds.report.training import seconds_by_part, speed_pictures, training_pictures
from ddk_ds.version import VERSION

STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --soft: #555; --line: #d5d5d5; --back: #fff; --link: #00568a; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; padding: 0 1rem 2rem; max-width: 84rem; background: var(--back); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-top: .5rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.state { margin: .2rem 0 .8rem; padding-left: .6rem; border-left: .35rem solid #999; }
.state.running, .state.finished { border-color: #009E73; }
.state.silent, .state.interrupted { border-color: #E69F00; }
.state.stopped, .state.timed { border-color: #D55E00; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem; margin: 0; }
.numbers div { border: 1px solid var(--line); border-radius: .3rem; padding: .35rem .6rem; }
.numbers dt { color: var(--soft); font-size: .8rem; }
.numbers dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: 1rem 0 0; list-style: none; }
nav a { display: inline-block; padding: .35rem 0; }
.tables { display: flex; flex-wrap: wrap; gap: 0 4rem; }
.pictures { column-gap: 2rem; margin-top: 1.2rem; }
figure { margin: 0 0 1.4rem; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .2rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; }
.events th, .events td { text-align: left; }
.events th { white-space: nowrap; }
.events td:last-child { min-width: 16rem; overflow-wrap: anywhere; }
.domains thead th { vertical-align: bottom; }
summary { cursor: pointer; padding: .3rem 0; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; margin: .3rem 0; font-size: .82rem; line-height: 1.35; }
footer { margin-top: 2rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem; }
@media (min-width: 62rem) { .pictures { columns: 2; } }
@media (max-width: 40rem) { table { font-size: .82rem; } th, td { padding-right: .45rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .pictures { columns: 2; column-gap: 1rem; }
  h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; background: none; border: 1px solid var(--line); }
  .scroll { overflow: visible; }
}
"""


_EVENTS_SHOWN = 200
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page: text and tables, then pictures side by side."""

    anchor: str
    title: str
    html: str
    pictures: Sequence[Picture]


def write_page(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write report.html and its pictures to `out`, and return the page's path.

    Raises CheckpointError where a run cannot be read, ConfigError where `out` cannot be written.
    """
    runs = read_runs(run_dirs)
    parts = sections(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in parts:
            for picture in part.pictures:
                write_text(out / f"{picture.name}.svg", picture.svg)
        write_text(out / "report.html", page(runs, parts))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name another directory") from error
    return out / "report.html"


def sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Make all parts of the page about the first run; the others are compared with it."""
    run = runs[0]
    several = len(runs) > 1
    titles = [each.name if several else "" for each in runs]
    ratios = [each.by_domain("ratio") for each in runs if each.has_teacher]
    top = max(float(np.nanmax(values)) for values in ratios) if several and ratios else None
    results = f'<div class="tables">{_results(run)}{_side_by_side(runs) if several else ""}</div>'
    curves = [
        over_tokens(each, top if each.has_teacher else None, title) for each, title in zip(runs, titles, strict=True)
    ]
    mixtures = [mixture(each, title) for each, title in zip(runs, titles, strict=True)]
    over_time = progress_picture(run)
    return [
        Section("result", "Result", results, [perplexity_bars(runs), *curves]),
        Section("mixture", "Mixture", "", [*mixtures, domain_token_bars(run)]),
        Section("training", "Training", _nothing_yet(run), training_pictures(run)),
        Section("speed", "Speed and memory", _nothing_yet(run), speed_pictures(run)),
        Section("events", "What happened", _events(run), [] if over_time is None else [over_time]),
        Section("configuration", "Configuration", _configuration(run), []),
        Section("versions", "Versions", _versions(run), []),
    ]


def page(runs: Sequence[RunRecord], parts: Sequence[Section]) -> str:
    """Return the HTML of the page with these parts."""
    run = runs[0]
    links = "".join(f'<li><a href="#{part.anchor}">{part.title}</a></li>' for part in parts)
    body = "".join(_section(part) for part in parts)
    others = f" compared with {', '.join(other.name for other in runs[1:])}" if len(runs) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(run.name)}: report</title><style>{STYLE}</style></head>\n<body>'
        f"<header><h1>{escape(run.name)}{escape(others)}</h1>"
        f'<p class="state {run.state.kind.split()[0]}">{escape(run.state.text)}</p>{_numbers(run)}'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main>{body}</main>'
        f"<footer><p>ddk_ds {VERSION}. Each picture is also an .svg file in the directory of this page.</p></footer>"
        "</body></html>\n"
    )


def _section(part: Section) -> str:
    pictures = "".join(_figure(picture) for picture in part.pictures)
    grid = f'<div class="pictures">{pictures}</div>' if pictures else ""
    return f'\n<section id="{part.anchor}"><h2>{part.title}</h2>{part.html}{grid}</section>'


def _figure(picture: Picture) -> str:
    # As an image, not inline: names inside two pictures must not clash.
    data = base64.b64encode(picture.svg.encode()).decode()
    return (
        f'<figure id="{escape(picture.name)}"><h3>{escape(picture.title)}</h3>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _numbers(run: RunRecord) -> str:
    """Return the run's most important numbers as HTML."""
    total = run.expected_steps
    done = f"{run.last_step:,}" + (f" of {total:,}" if total is not None and run.summary is None else "")
    columns = run.steps.columns
    speed, mfu, memory = (_finite(columns[key]) for key in ("tokens_per_s", "mfu", "peak_memory_gb"))
    numbers = {
        "steps": done,
        "tokens": f"{int(run.domain_tokens.sum()):,}",
        "time": duration(sum(seconds_by_part(run).values())),
        "tokens/s, median": f"{np.median(speed):,.0f}" if len(speed) else "-",
        **({"MFU, median": f"{np.median(mfu):.1%}"} if len(mfu) else {}),
        "peak memory": f"{memory.max():.2f} GB" if len(memory) else "-",
        "ranks": str(next((e["world_size"] for e in reversed(run.events) if "world_size" in e), "-")),
        "checkpoints": str(checkpoint_seconds(run)[0]),
    }
    if run.has_teacher:
        ratios = run.by_domain("ratio").mean(1)
        numbers["mean ratio to teacher"] = f"{ratios[0]:.3f} → {ratios[-1]:.3f}"
    if run.config is not None:
        numbers = {"method": run.config.method, "controller": run.config.mixture.controller, **numbers}
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in numbers.items())
    return f'<dl class="numbers">{cells}</dl>'


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def table(headings: Sequence[str], rows: Rows, caption: str = "", css: str = "") -> str:
    """Return an HTML table whose first column names the row, and which scrolls by itself if it is too wide."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    caption_html = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or "table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{css}">{caption_html}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _results(run: RunRecord) -> str:
    after = "after" if run.summary is not None else f"at step {run.measurements[-1]['step']:,}"
    columns: dict[str, Callable[[DomainResult], str]] = {"before": lambda result: _number(result.before)}
    columns[after] = lambda result: _number(result.after)
    means = []
    if run.has_teacher:
        columns = {"teacher": lambda result: _number(result.teacher_ppl), **columns}
        columns["ratio before"] = lambda result: _number(result.ratio_before, 3)
        columns[f"ratio {after}"] = lambda result: _number(result.ratio_after, 3)
        ratios = [np.mean([getattr(result, key) for result in run.results]) for key in ("ratio_before", "ratio_after")]
        means = [["mean", "", "", "", *(_number(float(ratio), 3) for ratio in ratios), "", ""]]
    columns |= {"tokens": lambda result: f"{result.tokens:,}", "share": lambda result: f"{result.share:.1%}"}
    headings = ["domain", *columns]
    rows = [[result.name, *(cell(result) for cell in columns.values())] for result in run.results] + means
    return table(headings, rows, f"{run.name}: perplexity on held-out text by domain", "domains")


def _side_by_side(runs: Sequence[RunRecord]) -> str:
    rows = []
    for name in runs[0].domains:
        results = [{result.name: result for result in run.results}.get(name) for run in runs]
        cells = ("-" if result is None else f"{result.after:,.2f} ({result.share:.1%})" for result in results)
        rows.append([name, *cells])
    ratios = [run.by_domain("ratio")[-1].mean() if run.has_teacher else None for run in runs]
    rows.append(["mean ratio to the teacher", *(_number(ratio, 3) for ratio in ratios)])
    rows.append(["tokens", *(f"{int(run.domain_tokens.sum()):,}" for run in runs)])
    rows.append(["state", *(run.state.kind for run in runs)])
    headings = ["domain", *(run.name for run in runs)]
    return table(headings, rows, "Runs side by side: student's last perplexity (share of tokens)", "domains")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _nothing_yet(run: RunRecord) -> str:
    return "" if len(run.steps.step) else "<p>No step is done yet.</p>"


def _events(run: RunRecord) -> str:
    rows = event_rows(run.events, _EVENTS_SHOWN)
    saved = checkpoint_seconds(run)[0]
    note = f"events.jsonl without its {saved:,} checkpoints"
    if len(run.events) - saved > len(rows):
        note += f", the last {len(rows):,}"
    return table(["time, UTC", "event", "step", "details"], rows, note, "events")


def _configuration(run: RunRecord) -> str:
    if not run.config_text:
        return "<p>The directory has no config.yaml.</p>"
    return f"<details open><summary>config.yaml, as resolved</summary><pre>{escape(run.config_text)}</pre></details>"


def _versions(run: RunRecord) -> str:
    rows = list(_version_rows(run))
    return table(["package", "version"], rows, "Versions at the run's starts") if rows else "<p>Not recorded.</p>"


def _version_rows(run: RunRecord) -> Iterator[list[str]]:
    for event in run.events:
        yield from ([name, str(version)] for name, version in event.get("versions", {}).items())
        for name, change in event.get("changed_versions", {}).items():
            yield [name, f"{change}, at the restart from step {event.get('step', '?')}"]
