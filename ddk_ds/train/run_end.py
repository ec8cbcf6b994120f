"""The results of a run for people to read: summary.json, the table on the terminal, and the student's model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.table import Table

from ddk_ds.config import Config
from ddk_ds.config.paths import is_hub_name
from ddk_ds.engine.export import Companions
from ddk_ds.engine.model_files import ModelFiles, read_licence
from ddk_ds.files import write_text, written
from ddk_ds.redact import redact
from ddk_ds.run_files import read_ledger
from ddk_ds.train.interval import Array, ratio_to_teacher
from ddk_ds.train.state import RunState

PAPER = "https://arxiv.org/abs/2407.16154"
_MAX_MIXTURE_ROWS = 12
_SECTIONS = {"method", "seed", "mixture", "loss", "optimizer", "train", "stop"}


def make_summary(
    config: Config, state: RunState, names: Sequence[str], student_ppl: Array, teacher_ppl: Array | None, reason: str
) -> dict[str, Any]:
    """Return the content of summary.json: perplexities, ratios and tokens by domain, and why the run ended.

    Ratios to the teacher are null in a run without one.

    Args:
        student_ppl, teacher_ppl: (N,) perplexities at the end.
    """
    before = np.array(state.student_before)
    tokens = np.array(state.domain_tokens)
    ratio_before, ratio_after = (ratio_to_teacher(ppl, teacher_ppl) for ppl in (before, student_ppl))
    domains = [
        {
            "name": name,
            "teacher_ppl": None if teacher_ppl is None else float(teacher_ppl[i]),
            "student_ppl_before": float(before[i]),
            "student_ppl_after": float(student_ppl[i]),
            "ratio_before": None if ratio_before is None else float(ratio_before[i]),
            "ratio_after": None if ratio_after is None else float(ratio_after[i]),
            "tokens": int(tokens[i]),
            "token_share": float(tokens[i] / max(1, tokens.sum())),
        }
        for i, name in enumerate(names)
    ]
    return {
        "run": config.name,
        "controller": config.mixture.controller,
        "domains": domains,
        "mean_ratio_before": None if ratio_before is None else float(ratio_before.mean()),
        "mean_ratio_after": None if ratio_after is None else float(ratio_after.mean()),
        "steps": state.step,
        "tokens": int(tokens.sum()),
        "wall_s": round(state.train_s, 1),
        "reason": reason,
    }


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write <run>/summary.json, whose presence marks the run as finished. Raises CheckpointError if it cannot."""
    with written(run_dir / "summary.json"):
        write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the table by domain: perplexity and ratio to the teacher before and after the run, share of tokens.

    A run without a teacher has neither the teacher's column nor ratios.
    """
    work = f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['wall_s']:.0f} s"
    table = Table(
        title=f"{summary['run']}: {summary['controller']}, {work}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("domain", no_wrap=True)
    with_teacher = summary["mean_ratio_after"] is not None
    columns = {"student\nbefore": ("student_ppl_before", 2), "student\nafter": ("student_ppl_after", 2)}
    if with_teacher:
        ratios = {"ratio\nbefore": ("ratio_before", 3), "ratio\nafter": ("ratio_after", 3)}
        columns = {"teacher\nppl": ("teacher_ppl", 2), **columns, **ratios}
    for heading in (*columns, "token\nshare"):
        table.add_column(heading, justify="right", no_wrap=True)
    for domain in summary["domains"]:
        numbers = [_number(domain[key], digits) for key, digits in columns.values()]
        table.add_row(domain["name"], *numbers, f"{domain['token_share']:.1%}")
    if with_teacher:
        table.add_section()
        before, after = summary["mean_ratio_before"], summary["mean_ratio_after"]
        table.add_row("mean", "", "", "", _number(before, 3), _number(after, 3), "")
    return table


def companions(
    run_dir: Path, config: Config, files: ModelFiles, state: RunState, versions: dict[str, str]
) -> Companions:
    """Return the files that go next to the exported weights of the student at `state`."""
    card = model_card(config, files, state, run_dir, versions)
    return Companions(files, card, {"run": config.name, "step": state.step})


def model_card(config: Config, files: ModelFiles, state: RunState, run_dir: Path, versions: dict[str, str]) -> str:
    """Return README.md of the student at `state`, in the form of the Hugging Face hub.

    It has method, results by domain, mixture over time, settings, versions and licence, and no path of a machine.
    """
    student = _model_name(config.student.path, files)
    teacher = None if config.teacher is None else _model_name(config.teacher.path)
    licence = read_licence(files)
    front = {
        "base_model": student,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ddk", "distillation"],
        **(licence or {"license": "unknown"}),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {config.name}, step {state.step:,}",
        _introduction(config, student, teacher, sum(state.domain_tokens)),
        *_measured_parts(run_dir, state, teacher is not None),
        "## Settings",
        f"```yaml\n{_settings(config)}```",
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "## Licence",
        _licence_text(student, teacher, licence),
    ]
    return redact("\n\n".join(parts) + "\n")


def _measured_parts(run_dir: Path, state: RunState, has_teacher: bool) -> list[str]:
    """Return the parts from the run's ledger up to the step of `state`; a damaged ledger keeps no student back."""
    try:
        records = read_ledger(run_dir)
        measured = [line for line in records if line["kind"] in ("interval", "end") and line["step"] <= state.step]
        if not measured:
            raise ValueError("emptied: every run begins with a measurement")
        return ["## Domains", _domains(state, measured, has_teacher), "## Mixture", _mixture(measured)]
    except (KeyError, TypeError, AttributeError, ValueError):  # which a UserError is
        return ["## Domains", "Not known: the run's ledger.jsonl could not be read when the student was exported."]


def _introduction(config: Config, student: str, teacher: str | None, tokens: int) -> str:
    source = "" if teacher is None else f", teacher {teacher}"
    return (
        f"{student} after {tokens:,} tokens{source}. Method `{config.method}`: {config.preset.description} "
        f"(the settings and baselines of [DDK]({PAPER}))."
    )


def _domains(state: RunState, measured: Sequence[dict[str, Any]], has_teacher: bool) -> str:
    """Return the table by domain: perplexities before the run, at the last measurement and of the teacher; tokens."""
    names = [domain["name"] for domain in state.data.domains]
    last = measured[-1] if measured else {"step": 0, "student_ppl": {}, "teacher_ppl": None}
    total = max(1, sum(state.domain_tokens))
    before = dict(zip(names, state.student_before, strict=False))
    rows = []
    for name, tokens in zip(names, state.domain_tokens, strict=True):
        now = last["student_ppl"].get(name)
        row = [name, _number(before.get(name)), _number(now)]
        if has_teacher:
            teacher = (last["teacher_ppl"] or {}).get(name)
            row += [_number(teacher), _number(None if not teacher or now is None else now / teacher, 3)]
        rows.append([*row, f"{tokens:,}", f"{tokens / total:.1%}"])
    headings = [
        "domain",
        "before",
        "after",
        *(["teacher", "after / teacher"] if has_teacher else []),
        "tokens",
        "share",
    ]
    measure = f"Perplexity of held-out text: before the run, after step {last['step']:,}, the last that was measured."
    return f"{measure}\n\n{_table(headings, rows)}"


def _mixture(measured: Sequence[dict[str, Any]]) -> str:
    """Return the table of proportions by the first step of an interval, for _MAX_MIXTURE_ROWS intervals at most."""
    intervals = [line for line in measured if line["kind"] == "interval"]
    if not intervals:
        return "No interval was begun."
    count = min(len(intervals), _MAX_MIXTURE_ROWS)
    places = sorted({round(i * (len(intervals) - 1) / max(1, count - 1)) for i in range(count)})
    names = list(intervals[0]["proportions"])
    rows = [
        [f"{intervals[i]['step']:,}", *(f"{intervals[i]['proportions'][name]:.3f}" for name in names)] for i in places
    ]
    which = "all" if len(places) == len(intervals) else f"{len(places)} of the {len(intervals)}"
    return f"Proportions of the domains from a step on ({which} intervals).\n\n{_table(['step', *names], rows)}"


def _settings(config: Config) -> str:
    """Return the sections that the numbers depend on as YAML; files appear by their names alone."""
    values = config.model_dump(mode="json", include=_SECTIONS, exclude={"train": {"nvme_path"}})
    values["data"] = config.data.model_dump(mode="json", include={"sequence_length", "validation_samples"})
    if config.mixture.schedule_file is not None:
        values["mixture"]["schedule_file"] = Path(config.mixture.schedule_file).name
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def _model_name(path: str, files: ModelFiles | None = None) -> str:
    """Return the hub's name of a model, as its path or its config.json gives it; else the name of its directory."""
    remembered = "" if files is None else str(files.config.get("_name_or_path") or "")
    # A name without an owner can be that of a directory in which the model once lay.
    if Path(path).is_dir() and "/" in remembered and is_hub_name(remembered):
        return remembered
    return path if is_hub_name(path) and not Path(path).is_dir() else Path(path).name


def _licence_text(student: str, teacher: str | None, licence: dict[str, str]) -> str:
    if licence:
        text = f"{licence.get('license_name', licence['license'])}, as {student} names it."
    else:
        text = (
            f"**Unknown: see the starting model**, {student}, which names none. Write its licence as `license` at the "
            "head of this file (with `license_name` and `license_link` where it is none that the hub knows)."
        )
    if teacher is None:
        return text
    return f"{text} {teacher}'s licence may have terms for models that are trained on its outputs: read it."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(headings), ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
