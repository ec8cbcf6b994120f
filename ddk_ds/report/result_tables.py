"""The page's result in numbers: the headline, the table by domain, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ddk_ds.drawing import Array
from ddk_ds.report.domains import held_out
from ddk_ds.report.groups import Group, objections, remarks
from ddk_ds.report.records import RunRecord
from ddk_ds.report.run_progress import duration
from ddk_ds.report.training import seconds_by_part

_BASELINES = 3
"""Groups that the headline compares with; the table has all."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", css: str = "") -> str:
    """Return an HTML table whose first column names the row, and which scrolls by itself if it is too wide.

    Cells that begin with `*` are marked as the best of their row.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows)
    caption_html = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or "table")
    return (
        '<div class="set"><p class="hint">Wider than the window: it scrolls sideways.</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{css}">{caption_html}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _cell(text: str) -> str:
    return f'<td class="best">{escape(text[1:])}</td>' if text.startswith("*") else f"<td>{escape(text)}</td>"


def headline(groups: Sequence[Group]) -> str:
    """Return the page's first numbers as HTML: the score before and after, the worst domain, against the baselines."""
    group = groups[0]
    domains = group.first.domains
    teacher = _teacher(group, domains)
    before, after = (group.scores(key, teacher, domains) for key in ("before", "after"))
    many = f"mean of {len(domains)} domains" if len(domains) > 1 else domains[0]
    if teacher is None:
        title, note = f"perplexity, geometric {many}", "no teacher: a perplexity per token"
        worst_title, by_domain = (
            "highest perplexity",
            {key: group.values(key, domains).mean(0) for key in ("before", "after")},
        )
    else:
        title, note = f"perplexity, student / teacher, {many}", "1 is as good as the teacher"
        worst_title = "worst domain"
        by_domain = {key: (group.values(key, domains) / teacher).mean(0) for key in ("before", "after")}
    worst = int(np.nanargmax(by_domain["after"]))
    cells = [
        (
            "main",
            title,
            f"{before.mean():.3f} → {_large(after)}",
            f"{note}; before and {group.when}",
        ),
        (
            "",
            f"{worst_title}: {escape(domains[worst])}",
            f"<b>{by_domain['after'][worst]:.3f}</b>",
            f"was {by_domain['before'][worst]:.3f}",
        ),
        *(_against(other, group) for other in groups[1 : 1 + _BASELINES]),
    ]
    html = "".join(
        f'<div class="{css}"><dt>{title}</dt><dd>{value}</dd><dd class="note">{note}</dd></div>'
        for css, title, value, note in cells
    )
    return f'<dl class="headline">{html}</dl>'


def _large(values: Array) -> str:
    number, _, spread = _spread(values, 3).partition(" ± ")
    return f"<b>{number}</b>" + (f" <small>± {spread}</small>" if spread else "")


def _teacher(group: Group, domains: Sequence[str]) -> Array | None:
    return np.asarray(group.values("teacher_ppl", domains)[0]) if group.first.has_teacher else None


def _against(other: Group, group: Group) -> tuple[str, str, str, str]:
    title = f"against {escape(other.label)}"
    why = objections(other, group)
    if why:
        return "", title, "not compared", escape(why[0])
    if set(other.first.domains) != set(group.first.domains):
        return "", title, "not compared", "it has other domains"
    domains = group.first.domains
    teacher = _teacher(group, domains)
    ours, theirs = (each.scores("after", teacher, domains) for each in (group, other))
    change = ours.mean() / theirs.mean() - 1
    word = "better" if change < 0 else "worse"
    seeds = min(len(ours), len(theirs))
    note = f"{_number(ours.mean(), 3)}, not {_number(theirs.mean(), 3)}; "
    if seeds == 1:
        note += "one seed: it may be chance"
    else:
        error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
        note += f"difference {theirs.mean() - ours.mean():.3f} ± {error:.3f} (standard error)"
    return "", title, f"<b>{abs(change):.1%}</b> {word}", note


def cost(group: Group) -> str:
    """Return what the group's first run took, as one line of HTML."""
    run = group.first
    total, columns = run.expected_steps, run.steps.columns
    done = f"{run.last_step:,}" + (f" of {total:,}" if total is not None and run.summary is None else "")
    speed, mfu, memory = (_finite(columns[key]) for key in ("tokens_per_s", "mfu", "peak_memory_gb"))
    parts = [f"{done} steps", f"{_count(run.domain_tokens.sum())} tokens", duration(sum(seconds_by_part(run).values()))]
    ranks = next((event["world_size"] for event in reversed(run.events) if "world_size" in event), None)
    if ranks is not None:
        parts[-1] += f" on {ranks:,} rank{'s' if ranks > 1 else ''}"
    if len(speed):
        parts.append(f"{np.median(speed):,.0f} tokens/s" + (f" (MFU {np.median(mfu):.1%})" if len(mfu) else ""))
    if len(memory):
        parts.append(f"peak memory {memory.max():.2f} GB")
    if run.config is not None:
        parts.append(f"method {run.config.method}, controller {run.config.mixture.controller}")
    return f'<p class="cost">{escape(" · ".join(parts))}</p>'


def _count(number: float) -> str:
    by, word = next(((by, word) for by, word in ((1e9, " billion"), (1e6, " million")) if number >= by), (1.0, ""))
    return f"{number / by:,.2f}{word}" if word else f"{number:,.0f}"


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def reason(groups: Sequence[Group], first: Sequence[Group]) -> str:
    """Return why these groups are not compared with those of the first set, as HTML; empty for the first set itself."""
    if groups is first:
        return ""
    why = "; ".join(objections(groups[0], first[0]))
    return f'<p class="warning">Not compared with {escape(first[0].label)}: {escape(why)}.</p>'


def result_table(groups: Sequence[Group]) -> str:
    """Return the table of groups that may be compared: one group by domain, several side by side."""
    return _by_domain(groups[0]) if len(groups) == 1 else _side_by_side(groups)


def _by_domain(group: Group) -> str:
    domains, run = group.first.domains, group.first
    before, after = (group.values(key, domains) for key in ("before", "after"))
    columns = {"before": _spreads(before), group.when: _spreads(after)}
    means = ["mean", "", ""]
    if run.has_teacher:
        teacher = group.values("teacher_ppl", domains)
        columns = {"teacher": _spreads(teacher[:1]), **columns}
        columns["ratio before"] = _spreads(before / teacher, 3)
        columns[f"ratio {group.when}"] = _spreads(after / teacher, 3)
        means += ["", *(_spread((values / teacher).mean(1), 3) for values in (before, after))]
    columns["tokens"] = [f"{tokens:,.0f}" for tokens in group.values("tokens", domains).mean(0)]
    columns["share"] = [f"{share:.1%}" for share in group.values("share", domains).mean(0)]
    rows = [[name, *(cells[place] for cells in columns.values())] for place, name in enumerate(domains)]
    if run.has_teacher:
        rows.append([*means, "", ""])
    caption = f"{group.title}: perplexity on held-out text by domain.{held_out(group)}"
    return table(["domain", *columns], rows, caption, "domains")


def _side_by_side(groups: Sequence[Group]) -> str:
    """Return the table of the groups' last perplexities with the differences to the first group, best values marked."""
    first = groups[0]
    domains = first.first.domains
    rows = [_compared(name, [group.values("after", [name])[:, 0] for group in groups], 2) for name in domains]
    teacher = _teacher(first, domains)
    headings = ["domain"]
    if teacher is not None:
        headings.append("teacher")
        rows = [[row[0], _number(value), *row[1:]] for row, value in zip(rows, teacher, strict=True)]
    before = first.values("before", domains).mean(0)
    headings.append("before")
    rows = [
        [*row[: len(headings) - 1], _number(value), *row[len(headings) - 1 :]]
        for row, value in zip(rows, before, strict=True)
    ]
    rows += _score_rows(groups, teacher, len(headings))
    empty = [""] * (len(headings) - 1)
    for label, cells in _cost_rows(groups):
        rows.append([label, *empty, *cells])
    caption = (
        f"Perplexity on held-out text, last measurement; in brackets the difference to {first.label}. Marked: the "
        f"lowest of the row.{held_out(first)}"
    )
    if any(len(group.runs) > 1 for group in groups):
        caption += " ± is the sample standard deviation over seeds."
    if any(len(group.runs) == 1 for group in groups):
        caption += " What one seed shows may be chance."
    notes = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(groups))
    listed = f'<ul class="remarks">{notes}</ul>' if notes else ""
    return table([*headings, *(group.title for group in groups)], rows, caption, "domains") + listed


def _score_rows(groups: Sequence[Group], teacher: Array | None, before: int) -> list[list[str]]:
    first = groups[0]
    domains = first.first.domains
    same = [set(group.first.domains) == set(domains) for group in groups]
    missing = np.array([np.nan])
    start = first.scores("before", teacher, domains).mean()
    scores = [g.scores("after", teacher, domains) if fits else missing for g, fits in zip(groups, same, strict=True)]
    label = "geometric mean" if teacher is None else "mean ratio to the teacher"
    row = _compared(label, scores, 3)
    pad = [""] * (before - 2)
    rows = [[row[0], *pad, _number(float(start), 3), *row[1:]]]
    if teacher is not None:
        worst = [
            (g.values("after", domains) / teacher).max(1) if fits else missing
            for g, fits in zip(groups, same, strict=True)
        ]
        row = _compared("worst ratio to the teacher", worst, 3)
        start = (first.values("before", domains) / teacher).max(1).mean()
        rows.append([row[0], *pad, _number(float(start), 3), *row[1:]])
    return rows


def _compared(label: str, values: Sequence[Array], digits: int) -> list[str]:
    """Return a row of the table: each group's mean over seeds, its difference to the first group, the lowest marked."""
    means = [float(each.mean()) for each in values]
    lowest = np.nanmin(means)
    cells = []
    for number, (each, mean) in enumerate(zip(values, means, strict=True)):
        change = f" ({mean / means[0] - 1:+.1%})" if number and np.isfinite(mean) else ""
        cells.append(f"{'*' if mean == lowest else ''}{_spread(each, digits)}{change}")
    return [label, *cells]


def _cost_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    def mean_of(group: Group, column: str) -> float:
        values = [_finite(run.steps.columns[column]) for run in group.runs]
        return float(np.mean([float(np.median(each)) for each in values if len(each)] or [np.nan]))

    def tokens(group: Group) -> str:
        return f"{np.mean([run.domain_tokens.sum() for run in group.runs]):,.0f}"

    def time_s(group: Group) -> str:
        return duration(float(np.mean([sum(seconds_by_part(run).values()) for run in group.runs])))

    def states(group: Group) -> str:
        return ", ".join(dict.fromkeys(run.state.kind for run in group.runs))

    return [
        ("tokens", [tokens(group) for group in groups]),
        ("time", [time_s(group) for group in groups]),
        ("tokens/s, median", [_number(mean_of(group, "tokens_per_s"), 0) for group in groups]),
        ("peak memory, GB", [_number(_peak(group.runs)) for group in groups]),
        ("state", [states(group) for group in groups]),
    ]


def _peak(runs: Sequence[RunRecord]) -> float:
    return max(
        (float(values.max()) for run in runs if len(values := _finite(run.steps.columns["peak_memory_gb"]))),
        default=np.nan,
    )


def _number(value: float, digits: int = 2) -> str:
    return "-" if not np.isfinite(value) else f"{value:,.{digits}f}"


def _spread(values: Array, digits: int) -> str:
    spread = "" if len(values) < 2 else f" ± {_number(float(values.std(ddof=1)), digits)}"
    return _number(float(values.mean()), digits) + spread


def _spreads(values: Array, digits: int = 2) -> list[str]:
    return [_spread(column, digits) for column in values.T]
