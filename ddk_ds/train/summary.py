"""What a finished run leaves to read: summary.json and the table of domains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ddk_ds.files import write_text
from ddk_ds.train.interval import Measurement
from ddk_ds.train.state import RunState


def make_summary(
    names: Sequence[str], state: RunState, final: Measurement, *, run: str, controller: str, reason: str
) -> dict[str, Any]:
    """The run's result by domain: perplexities, ratios to the teacher (null without one), tokens trained on."""
    before = np.array(state.student_before)
    tokens = np.array(state.domain_tokens)
    teacher = final.teacher
    ratios = None if teacher is None else (before / teacher, final.student / teacher)
    domains = [
        {
            "name": name,
            "teacher_ppl": None if teacher is None else float(teacher[i]),
            "student_ppl_before": float(before[i]),
            "student_ppl_after": float(final.student[i]),
            "ratio_before": None if ratios is None else float(ratios[0][i]),
            "ratio_after": None if ratios is None else float(ratios[1][i]),
            "tokens": int(tokens[i]),
            "token_share": float(tokens[i] / max(1, tokens.sum())),
        }
        for i, name in enumerate(names)
    ]
    return {
        "run": run,
        "controller": controller,
        "domains": domains,
        "mean_ratio_before": None if ratios is None else float(ratios[0].mean()),
        "mean_ratio_after": None if ratios is None else float(ratios[1].mean()),
        "steps": state.step,
        "tokens": int(tokens.sum()),
        "wall_s": round(state.train_s, 1),
        "reason": reason,
    }


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write <run>/summary.json; its presence says that the run is finished."""
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def summary_table(summary: dict[str, Any]) -> Table:
    """Perplexity of teacher and of student before and after, ratio before and after, share of tokens, by domain."""
    work = f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['wall_s']:.0f} s"
    table = Table(
        title=f"{summary['run']}: {summary['controller']}, {work}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("domain", no_wrap=True)
    headings = ("teacher\nppl", "student\nbefore", "student\nafter", "ratio\nbefore", "ratio\nafter", "token\nshare")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for domain in summary["domains"]:
        table.add_row(
            domain["name"],
            _number(domain["teacher_ppl"]),
            _number(domain["student_ppl_before"]),
            _number(domain["student_ppl_after"]),
            _number(domain["ratio_before"], 3),
            _number(domain["ratio_after"], 3),
            f"{domain['token_share']:.1%}",
        )
    if summary["mean_ratio_after"] is not None:
        table.add_section()
        before, after = summary["mean_ratio_before"], summary["mean_ratio_after"]
        table.add_row("mean", "", "", "", _number(before, 3), _number(after, 3), "")
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
