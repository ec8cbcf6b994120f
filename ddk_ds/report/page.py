"""The report as one HTML page that needs nothing else: no network, no other file. Its still pictures are files too."""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from ddk_ds.drawing import line_style
from ddk_ds.errors import ConfigError
from ddk_ds.files import write_text
from ddk_ds.redact import redact
from ddk_ds.report.charts import GREY, AnyChart, DotChart
from ddk_ds.report.domains import (
    mean_ratios,
    mixtures,
    perplexities_over_tokens,
    perplexity_dots,
    ratios_by_domain,
    token_dots,
)
from ddk_ds.report.groups import Group, comparable_sets, group_runs
from ddk_ds.report.happenings import checkpoint_seconds, event_rows, progress
from ddk_ds.report.live_charts import SOLID, live
from ddk_ds.report.records import RunRecord, read_runs
from ddk_ds.report.result_tables import cost, headline, reason, result_table, table
from ddk_ds.report.still_charts import still
from ddk_ds.report.training import about_steps, speed_charts, training_charts
from ddk_ds.version import VERSION

_FOLDER = Path(__file__).parent
_EVENTS_SHOWN = 200
_PLAIN = " " + string.punctuation.replace("#", "").replace("%", "")
"""Characters that stay as they are in the address of a picture."""


@dataclass(frozen=True)
class Section:
    """A part of the page: text and tables, then pictures side by side."""

    anchor: str
    title: str
    html: str
    charts: Sequence[AnyChart]


def write_page(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write report.html and its pictures to `out`, and return the page's path.

    Raises CheckpointError where a run cannot be read, ConfigError where `out` cannot be written.
    """
    runs = read_runs(run_dirs)
    parts = sections(runs)
    stills = still_pictures(parts)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, svg in stills.items():
            write_text(out / f"{name}.svg", svg)
        write_text(out / "report.html", page(runs, parts, stills))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name another directory") from error
    return out / "report.html"


def write_still_page(path: Path, option: str, title: str, about: str, parts: Sequence[Section]) -> None:
    """Write a page without scripts to `path`: under its title the HTML `about`, then its parts.

    Raises ConfigError, which names the `option` that gave the path, if it cannot be written.
    """
    stills = still_pictures(parts)
    body = "".join(section_html(part, stills) for part in parts)
    html = (
        head(title, []) + f"<body><header><h1>{escape(title)}</h1>{about}</header>\n<main>{body}</main>"
        f"<footer><p>ddk_ds {VERSION}</p></footer></body></html>\n"
    )
    try:
        write_text(path, html)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}; name another file") from error


def links_to(parts: Sequence[Section]) -> str:
    """Return the list of links to the parts of a page."""
    links = "".join(f'<li><a href="#{escape(part.anchor)}">{escape(part.title)}</a></li>' for part in parts)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def still_pictures(parts: Sequence[Section]) -> dict[str, str]:
    """Return the SVG of every chart, by its name."""
    return {chart.name: still(chart) for part in parts for chart in part.charts}


def sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Make all parts of the page; the first run is compared with the others."""
    groups = group_runs(runs)
    sets = comparable_sets(groups)
    curves = [mean_ratios(sets[0]), ratios_by_domain(groups), perplexities_over_tokens(groups)]
    over_time = progress(groups)
    note = f'<p class="about">{escape(about_steps(groups) or "No step is done yet.")}</p>'
    with_samples = [run for run in runs if run.samples]
    return [
        _result("result", "Result", sets[0], sets[0], [curve for curve in curves if curve is not None]),
        *(
            _result(f"result_{number}", f"Not compared: {_names(others)}", others, sets[0], [])
            for number, others in enumerate(sets[1:], 1)
        ),
        Section("mixture", "Mixture", "", [mixtures(groups), token_dots(groups)]),
        Section("training", "Training", note, training_charts(groups)),
        Section("speed", "Speed and memory", note, speed_charts(groups)),
        *([Section("samples", "Continued prompts", _of_each(with_samples, _samples), [])] if with_samples else []),
        Section("events", "What happened", _of_each(runs, _events), [] if over_time is None else [over_time]),
        Section("configuration", "Configuration", _differences(runs) + _of_each(runs, _configuration), []),
        Section("versions", "Versions", _of_each(runs, _versions), []),
    ]


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(group.label for group in groups)


def _result(
    anchor: str, title: str, groups: Sequence[Group], first: Sequence[Group], curves: Sequence[AnyChart]
) -> Section:
    """Make the section of groups that may be compared with one another, and say why not with the first set."""
    dots = perplexity_dots(groups, f"perplexity{anchor.removeprefix('result')}")
    return Section(anchor, title, reason(groups, first) + result_table(groups), [dots, *curves])


def page(runs: Sequence[RunRecord], parts: Sequence[Section], stills: dict[str, str], script: str = "") -> str:
    """Return the HTML of the page with these parts and the SVG of their charts, if any; `script` is run in it too."""
    groups = group_runs(runs)
    shown = live([chart for part in parts for chart in part.charts])
    scripts = [shown.library, (_FOLDER / "page.js").read_text(encoding="utf-8"), script]
    body = "".join(section_html(part, stills) for part in parts)
    others = f" compared with {_names(groups[1:])}" if len(groups) > 1 else ""
    state = groups[0].first.state
    return (
        head(f"{groups[0].label}: report", scripts)
        + f"<body><header><h1>{escape(groups[0].title)}{escape(others)}</h1>{headline(groups)}"
        f'<p class="state {state.kind.split()[0]}">{escape(state.text)}</p>{cost(groups[0])}'
        f"{links_to(parts)}</header>\n<main>{body}</main>"
        f"<footer><p>ddk_ds {VERSION}. Drag over a picture to zoom, double-click its arrow to go back; a click on a "
        "name in a legend switches it off on the whole page.</p></footer>"
        f'<script id="charts" type="application/json">{_in_json(shown.content)}</script>'
        + "".join(f"<script>{_in_script(text)}</script>\n" for text in scripts if text)
        + "</body></html>\n"
    )


def head(title: str, scripts: Sequence[str]) -> str:
    """Return the beginning of a page that may run these scripts alone, and load nothing from anywhere else."""
    digests = (hashlib.sha256(_in_script(text).encode()).digest() for text in scripts if text)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; script-src {allowed}"
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>\n'
    )


def _in_script(text: str) -> str:
    return text.replace("</", "<\\/")


def _in_json(text: str) -> str:
    return text.replace("<", "\\u003c")  # so that no text of a run can end the script


def section_html(part: Section, stills: dict[str, str]) -> str:
    """Return the HTML of a part, with the SVG of its charts by their names."""
    figures = "".join(_figure(chart, stills.get(chart.name)) for chart in part.charts)
    css = "parts even" if len(part.charts) == 4 else "parts"  # else three in a row leave the fourth alone
    inside = f'<h2>{escape(part.title)}</h2><div class="{css}">{part.html}{figures}</div>'
    return f'\n<section id="{part.anchor}">{inside}</section>'


def _figure(chart: AnyChart, svg: str | None) -> str:
    panels = 1 if isinstance(chart, DotChart) else len(chart.panels)
    places = "".join(f'<div id="live-{escape(chart.name)}-{number}"></div>' for number in range(panels))
    alt, still_picture = escape(chart.alt), ""
    if svg is not None:  # as an image, not inline: names inside two pictures must not clash
        still_picture = f"<img src='{_address(svg)}' alt=\"{alt}\">"
    return (
        f'<figure id="{escape(chart.name)}"{" class=panels" if panels > 1 else ""}><h3>{escape(chart.title)}</h3>'
        f'{_legend(chart)}<div class="live" role="img" aria-label="{alt}">{places}</div>'
        f"{still_picture}<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _address(svg: str) -> str:
    """Return the picture as an address for an attribute in single quotes, a quarter smaller than in base64."""
    return "data:image/svg+xml," + quote(" ".join(svg.split()), safe=_PLAIN).replace("&", "&amp;").replace("'", "&#39;")


def _legend(chart: AnyChart) -> str:
    """Return buttons that switch what the picture shows, one for each key; empty where there is only one."""
    items: list[tuple[str, str, int | None, str]]
    if isinstance(chart, DotChart):
        items = [(dots.key, dots.label, dots.number, dots.shape) for dots in chart.series]
    else:
        items = [(curve.key, curve.legend, curve.number, "line") for curve in chart.curves]
    by_key = {key: (label, number, shape) for key, label, number, shape in reversed(items)}
    if len(by_key) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-key="{escape(key)}" aria-pressed="true">'
        f'<i class="{shape}" style="{_swatch(number, shape)}"></i>{escape(label)}</button>'
        for key, (label, number, shape) in reversed(by_key.items())
    )
    return f'<div class="legend" role="group" aria-label="Shown in {escape(chart.title)}">{buttons}</div>'


def _swatch(number: int | None, shape: str) -> str:
    colour = GREY if number is None else line_style(number)["color"]
    if shape == "line" and number is not None and number >= SOLID:
        return f"background:repeating-linear-gradient(90deg,{colour} 0 5px,transparent 5px 7px)"
    return f"border-color:{colour}" if shape == "ring" else f"background:{colour}"


def _of_each(runs: Sequence[RunRecord], write: Callable[[RunRecord], str]) -> str:
    """Return what `write` says about each run; of several runs each in a part that opens by a click."""
    if len(runs) == 1:
        return write(runs[0])
    return "".join(f"<details><summary>{escape(run.name)}</summary>{write(run)}</details>" for run in runs)


def _samples(run: RunRecord) -> str:
    """Return for each prompt of the run what the student wrote at each step, and the teacher beside it."""
    html = ""
    for number, last in enumerate(run.samples[-1]["samples"]):
        texts = [(f"{record['step']:,}", record["samples"][number]["student"]) for record in run.samples]
        rows = "".join(_text_row(f"student, step {step}", text) for step, text in texts[-1:])
        if last["teacher"] is not None:
            rows += _text_row("teacher", last["teacher"])
        before = "".join(_text_row(f"step {step}", text) for step, text in reversed(texts[:-1]))
        more = f"<details><summary>{len(texts) - 1} earlier</summary><dl>{before}</dl></details>" if before else ""
        prompt = _text_row(f"prompt {last['name']}", last["prompt"])
        html += f'<div class="sample"><dl>{prompt}{rows}</dl>{more}</div>'
    return f'<div class="samples">{html}</div>'


def _text_row(name: str, text: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"


def _events(run: RunRecord) -> str:
    rows = event_rows(run.events, _EVENTS_SHOWN)
    saved = checkpoint_seconds(run)[0]
    note = f"events.jsonl without its {saved:,} checkpoints"
    if len(run.events) - saved > len(rows):
        note += f", the last {len(rows):,}"
    return table(["time, UTC", "event", "step", "details"], rows, note, "events")


def _differences(runs: Sequence[RunRecord]) -> str:
    """Return the table of what the runs' identities differ in; empty for one run, or where they are not recorded."""
    known = [run.identity for run in runs]
    if len(runs) == 1 or any(identity is None for identity in known):
        return ""
    identities = [identity for identity in known if identity is not None]
    keys = list(dict.fromkeys(key for identity in identities for key in identity))
    rows = [[key, *(redact(str(identity.get(key, "-"))) for identity in identities)] for key in keys]
    rows = [[key, *(value[:40] for value in values)] for key, *values in rows if len(set(values)) > 1]
    return table(["key", *(run.name for run in runs)], rows, "Options and contents that differ") if rows else ""


def _configuration(run: RunRecord) -> str:
    fault = f"<p>{escape(run.config_fault)}</p>" if run.config_fault else ""
    if not run.config_text:
        return fault
    return f"{fault}<details><summary>config.yaml, as resolved</summary><pre>{escape(run.config_text)}</pre></details>"


def _versions(run: RunRecord) -> str:
    rows = list(_version_rows(run))
    return table(["package", "version"], rows, "Versions at the run's starts") if rows else "<p>Not recorded.</p>"


def _version_rows(run: RunRecord) -> Iterator[list[str]]:
    for event in run.events:
        yield from ([name, str(version)] for name, version in event.get("versions", {}).items())
        for name, change in event.get("changed_versions", {}).items():
            yield [name, f"{change}, at the restart from step {event.get('step', '?')}"]
