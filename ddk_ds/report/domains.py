"""Pictures by domain: perplexities (the paper's Figure 1), ratios over tokens (Figure 3), mixture, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ddk_ds.drawing import Array, count_unit
from ddk_ds.report.charts import Chart, Curve, DotChart, Dots, Panel
from ddk_ds.report.groups import Group
from ddk_ds.report.happenings import describe_marks, marks
from ddk_ds.report.records import RunRecord


def perplexity_dots(groups: Sequence[Group], name: str = "perplexity") -> DotChart:
    """Return Figure 1 for groups that may be compared: each student before and after training, and the teacher."""
    first = groups[0].first
    domains = first.domains
    befores = [_mean(group.values("before", domains)) for group in groups]
    one_start = all(np.allclose(before, befores[0], rtol=1e-3, equal_nan=True) for before in befores)
    series = []
    for group, before in zip(groups, befores, strict=True):
        if group is groups[0] or not one_start:
            whose = "student" if one_start else group.title
            number = None if one_start else group.number
            series.append(
                Dots(f"{whose} before", "point:before" if one_start else group.key, number, before, None, "ring")
            )
    for group in groups:
        values = group.values("after", domains)
        spread = values.std(0, ddof=1) if len(values) > 1 else None
        label = f"{'student' if len(groups) == 1 else group.title} {group.when}"
        series.append(Dots(label, group.key, group.number, _mean(values), spread))
    if first.has_teacher:
        series.append(Dots("teacher", "point:teacher", None, groups[0].values("teacher_ppl", domains)[0], None, "tick"))
    caption = "Lower is better. As Figure 1 of arXiv 2407.16154." + held_out(groups[0])
    if any(len(group.runs) > 1 for group in groups):
        caption += " Lines through dots: standard deviation over seeds."
    return DotChart(name, "Perplexity by domain", domains, series, "perplexity on held-out text (per token)", caption)


def held_out(group: Group) -> str:
    """Return the sentence of a caption that says what a group was measured on; empty if that is not recorded."""
    identity = group.first.identity
    if identity is None or "data.validation_samples" not in identity:
        return ""
    samples, length = identity["data.validation_samples"], identity.get("data.sequence_length")
    return f" Measured on {samples:,} held-out samples of each domain, of {length:,} tokens."


def _mean(values: Array) -> Array:
    return np.asarray(values.mean(0), np.float64)


def mean_ratios(groups: Sequence[Group]) -> Chart | None:
    """Return the mean ratio to the teacher over tokens, a line for each run; None unless several runs have one."""
    curves = []
    for group in groups:
        for run in group.runs if group.first.has_teacher else ():
            label = group.label if len(group.runs) == 1 else run.name
            tokens, ratios = run.by_domain("domain_tokens").sum(1), run.by_domain("ratio").mean(1)
            curves.append(Curve(label, group.key, group.number, tokens, ratios))
    if len(curves) < 2:
        return None
    return _over_tokens("mean_ratio", "Mean ratio to the teacher, by run", [Panel("", curves)], ratio=True)


def ratios_by_domain(groups: Sequence[Group]) -> Chart | None:
    """Return Figure 3: each domain's ratio to the teacher over tokens; None if no run has a teacher."""
    with_teacher = [group for group in groups if group.first.has_teacher]
    if not with_teacher:
        return None
    panels = [Panel(_whose(group, groups), _lines(group, "ratio")) for group in with_teacher]
    return _over_tokens("ratio", "Ratio of perplexities by domain over tokens", panels, ratio=True)


def perplexities_over_tokens(groups: Sequence[Group]) -> Chart | None:
    """Return each domain's perplexity over tokens for the runs without a teacher; None if all have one."""
    without = [group for group in groups if not group.first.has_teacher]
    if not without:
        return None
    panels = [Panel(_whose(group, groups), _lines(group, "student_ppl")) for group in without]
    return _over_tokens("perplexity_over_tokens", "Perplexity by domain over tokens", panels, ratio=False)


def _over_tokens(name: str, title: str, panels: Sequence[Panel], *, ratio: bool) -> Chart:
    largest = max(float(curve.x[-1]) for panel in panels for curve in panel.curves)
    by, word = count_unit(largest)
    scaled = [Panel(panel.title, [replace(curve, x=curve.x / by) for curve in panel.curves]) for panel in panels]
    caption = "Measured between intervals on held-out samples."
    if ratio:
        caption = f"At 1 the student is as good as the teacher. As Figure 3 of arXiv 2407.16154. {caption}"
    if any(curve.low is not None for panel in panels for curve in panel.curves):
        caption += " Lines: means over seeds; bands: from the least to the greatest seed."
    return Chart(
        name=name,
        title=title,
        panels=scaled,
        x_label=f"{word}tokens trained on",
        y_label="perplexity, student / teacher" if ratio else "perplexity (per token)",
        caption=caption,
        steps=False,
        level=(1.0, "teacher") if ratio else None,
        logarithmic=True,
    )


def _whose(group: Group, groups: Sequence[Group]) -> str:
    return group.title if len(groups) > 1 else ""


def _lines(group: Group, key: str) -> list[Curve]:
    """Return a curve for each domain: a run's own, or the mean over seeds with a band, as far as all seeds are."""
    return _over_seeds(
        group,
        lambda run: run.by_domain("domain_tokens", [each for each in run.measurements if each[key]]).sum(1),
        lambda run: run.by_domain(key),
    )


def _over_seeds(
    group: Group, places: Callable[[RunRecord], Array], values: Callable[[RunRecord], Array]
) -> list[Curve]:
    by_run = [values(run) for run in group.runs]
    common = min(map(len, by_run))
    stacked = np.stack([rows[:common] for rows in by_run])  # (K, M, N): seeds, measurements, domains
    x = np.mean([places(run)[:common] for run in group.runs], 0)
    curves = []
    for number, domain in enumerate(group.first.domains):
        of_domain = stacked[:, :, number]
        band = (of_domain.min(0), of_domain.max(0)) if len(by_run) > 1 else (None, None)
        curves.append(Curve(domain, f"domain:{domain}", number, x, of_domain.mean(0), *band))
    return curves


def mixtures(groups: Sequence[Group]) -> Chart:
    """Return the proportions of the domains over the steps, a panel for each group."""
    panels = []
    for group in groups:
        curves = [replace(curve, low=None, high=None) for curve in _over_seeds(group, _boundaries, _shares)]
        panels.append(Panel(_whose(group, groups), curves, [mark for run in group.runs for mark in marks(run)]))
    caption = "Proportions that the controller decided for each interval."
    if any(len(group.runs) > 1 for group in groups):
        caption += " Of several seeds the mean."
    return Chart(
        name="mixture",
        title="Mixture over time",
        panels=panels,
        x_label="optimizer step",
        y_label="share of the samples",
        caption=caption + describe_marks(groups),
        y_format="share",
        from_zero=True,
    )


def _boundaries(run: RunRecord) -> Array:
    """Return both ends of each interval (2 M,), so that a line through them has steps."""
    starts = np.array([record["step"] for record in run.intervals], np.float64)
    return np.repeat(np.append(starts, max(run.last_step, starts[-1] + 1)), 2)[1:-1]


def _shares(run: RunRecord) -> Array:
    return np.repeat(run.by_domain("proportions", run.intervals), 2, axis=0)


def asked_and_realised(run: RunRecord) -> tuple[Array, Array]:
    """Return two shares (N,) of all tokens so far: asked for by the intervals' proportions, and drawn."""
    intervals = run.intervals
    totals = run.by_domain("domain_tokens").sum(1)
    totals = np.append(totals[: len(intervals)], run.domain_tokens.sum())
    drawn = run.domain_tokens - run.by_domain("domain_tokens")[0]
    weights = np.diff(totals)
    tokens = max(1.0, weights.sum())
    return weights @ run.by_domain("proportions", intervals) / tokens, drawn / tokens


def token_dots(groups: Sequence[Group]) -> DotChart:
    """Return the share of tokens drawn from each domain, and for one run the share that the proportions asked for."""
    domains = groups[0].first.domains
    series = []
    if len(groups) == 1:
        asked = np.mean([asked_and_realised(run)[0] for run in groups[0].runs], 0)
        series.append(Dots("asked for by the proportions", "point:asked", None, asked, None, "ring"))
    for group in groups:
        drawn = group.values("share", domains)
        label = "tokens drawn" if len(groups) == 1 else group.title
        series.append(Dots(label, group.key, group.number, _mean(drawn)))
    caption = (
        "Proportions are weighted by their intervals' tokens. Drawn tokens differ from them by rounding to whole "
        "samples, by padding, and where a domain is at its cap."
    )
    return DotChart("tokens", "Tokens by domain", domains, series, "share of the run's tokens", caption, "share", True)
