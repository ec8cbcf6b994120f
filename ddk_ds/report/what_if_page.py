"""The page of what other controllers would have decided from a run's measurements: text, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ddk_ds.report.charts import Chart, Curve, Panel
from ddk_ds.report.page import Section, write_still_page
from ddk_ds.report.replayed_decisions import RecordedRun
from ddk_ds.report.result_tables import table
from ddk_ds.report.what_if import CAVEAT, SUMMARY_HEADINGS, WouldBe, sample_cell, summary_cells


def write_what_if_page(
    path: Path, title: str, run: RecordedRun, found: Sequence[WouldBe], notes: Sequence[str]
) -> None:
    """Write the page to `path`; `title` is the run's name, and `notes` are sentences above the tables.

    Raises ConfigError if it cannot be written.
    """
    parts = [
        Section("decisions", "What each would have decided", _controllers(found, run), []),
        Section("samples", "What each would have drawn", _samples(found, run), []),
        Section("intervals", "Interval by interval", "", _proportions(found, run)),
    ]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    about = f'<p class="warning">{escape(CAVEAT)}</p><ul class="remarks">{items}</ul>'
    write_still_page(path, "--page", f"{title}: what other controllers would have decided", about, parts)


def _controllers(found: Sequence[WouldBe], run: RecordedRun) -> str:
    rows = [[would_be.title, *summary_cells(would_be, run)] for would_be in found]
    return table(
        ["controller", *SUMMARY_HEADINGS],
        rows,
        "Elsewhere: the share of an interval's samples that would have gone to another domain than in the run, in the "
        "mean of the intervals, and in the interval where it is largest",
    )


def _samples(found: Sequence[WouldBe], run: RecordedRun) -> str:
    headings = ["domain", *(would_be.title for would_be in found)]
    rows = [[domain, *(sample_cell(would_be, place) for would_be in found)] for place, domain in enumerate(run.domains)]
    caption = "Samples of each domain over all intervals, and the share of them, each once, that the cache holds"
    return table(headings, rows, caption)


def _proportions(found: Sequence[WouldBe], run: RecordedRun) -> list[Chart]:
    """Return the proportions over the steps: a picture for each domain, a line for each controller."""
    steps = np.array([entry.step for entry in run.decisions], np.float64)
    length = float(steps[-1] - steps[-2]) if len(steps) > 1 else 1.0
    borders = np.repeat(np.append(steps, steps[-1] + length), 2)[1:-1]
    charts = []
    for place, domain in enumerate(run.domains):
        curves = []
        for number, would_be in enumerate(found):
            shares = np.repeat([decision.proportions[place] for decision in would_be.decisions], 2)
            curves.append(Curve(would_be.title, f"controller:{would_be.title}", number, borders, shares))
        chart = Chart(
            name=f"what_if_{place}",
            title=domain,
            panels=[Panel("", curves)],
            x_label="optimizer step",
            y_label="share of the samples",
            caption="All controllers decide from the run's measurements; each continues its own decisions.",
            y_format="share",
            from_zero=True,
        )
        charts.append(chart)
    return charts
