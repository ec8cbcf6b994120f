"""A run, finished or not, as its directory records it: columns of numbers, measurements, events."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddk_ds.config import Config, load_run_config
from ddk_ds.drawing import Array
from ddk_ds.errors import CheckpointError, UserError
from ddk_ds.files import read_object
from ddk_ds.redact import names_a_secret, redact
from ddk_ds.report.run_progress import State, expected_steps, run_state
from ddk_ds.run_files import check_end, complete_files, is_finished, read_events, read_ledger, read_summary

PARTS = {
    "data_s": "waiting for data",
    "sync_s": "waiting for ranks",
    "teacher_s": "teacher",
    "teacher_gather_s": "teacher's gathers",
    "forward_s": "student forward",
    "head_s": "heads and loss",
    "backward_s": "backward",
    "gather_s": "student's gathers",
    "reduce_s": "reduction",
    "optimizer_s": "optimizer",
}
"""Names of a step's parts, by the keys of the ledger's clock, in their order; the rest of step_s is "other"."""
_NUMBERS = ("loss", "ce", "kl", "grad_norm", "learning_rate")
_NUMBER_OR_CONSTANT = re.compile(r"null|true|false|[-+.\de]+")
_CLOCK = ("step_s", *PARTS, "monitor_s", "tokens_per_s", "mfu", "peak_memory_gb")


@dataclass(frozen=True)
class Steps:
    """The ledger's lines of S steps; a number that a line lacks is NaN."""

    step: Array
    """(S,) optimizer step, from 1."""
    interval: Array
    """(S,) its interval, from 0."""
    tokens: Array
    """(S, N) targets of the loss in this step, by domain."""
    columns: dict[str, Array]
    """(S,) each: loss, ce, kl, grad_norm, learning_rate and those of the clock."""
    peaks_gb: dict[str, float]
    """Most memory held in each part of a step, 10^9 bytes; empty where the ledger does not have it."""


@dataclass(frozen=True)
class DomainResult:
    """Perplexities and tokens of a domain; teacher and ratios are None in a run without a teacher."""

    name: str
    teacher_ppl: float | None
    before: float
    after: float
    ratio_before: float | None
    ratio_after: float | None
    tokens: int
    share: float
    """Share of all tokens."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run's directory holds, ready for pictures and tables."""

    run_dir: Path
    name: str
    domains: tuple[str, ...]
    steps: Steps
    measurements: list[dict[str, Any]]
    """The ledger's lines of intervals and of the end; at least one."""
    samples: list[dict[str, Any]]
    """The ledger's lines of continued prompts (monitor.samples_every)."""
    events: list[dict[str, Any]]
    config: Config | None
    """None if this version cannot read it."""
    config_text: str
    """YAML text without secrets; empty if the directory has no config.yaml."""
    config_fault: str
    """Why `config` is None, or ""."""
    summary: dict[str, Any] | None
    """Content of summary.json; None if the run is not finished."""
    identity: dict[str, Any] | None
    """Content of run.json: all that the run's numbers depend on; None if the directory has none."""
    state: State
    expected_steps: int | None

    @property
    def has_teacher(self) -> bool:
        """Return True if perplexities are compared with a teacher's."""
        return self.measurements[0]["ratio"] is not None

    @property
    def last_step(self) -> int:
        """Return the number of optimizer steps done."""
        return int(max([self.measurements[-1]["step"], *self.steps.step[-1:]]))

    def by_domain(self, key: str, records: Sequence[dict[str, Any]] | None = None) -> Array:
        """Return the values (M, N) of the M measurements that have `key`, by domain."""
        chosen = self.measurements if records is None else records
        rows = [[record[key][name] for name in self.domains] for record in chosen if record[key] is not None]
        return np.array(rows, np.float64).reshape(-1, len(self.domains))

    @property
    def intervals(self) -> list[dict[str, Any]]:
        """Return the measurements after which an interval began."""
        return [record for record in self.measurements if record["kind"] == "interval"]

    @property
    def domain_tokens(self) -> Array:
        """Return the tokens (N,) of each domain that the run has trained on so far."""
        last = self.measurements[-1]
        since = self.steps.tokens[self.steps.step > last["step"]].sum(0)
        return self.by_domain("domain_tokens", [last])[0] + since

    @property
    def results(self) -> list[DomainResult]:
        """Return each domain's result: at the run's beginning, and at the last measurement."""
        first, last, tokens = self.measurements[0], self.measurements[-1], self.domain_tokens
        before = dict(first["student_ppl"])
        if self.summary is not None:  # the ledger of a forked run does not start at the beginning
            before |= {domain["name"]: domain["student_ppl_before"] for domain in self.summary["domains"]}
        results = []
        for place, name in enumerate(self.domains):
            teacher = None if last["teacher_ppl"] is None else last["teacher_ppl"][name]
            after = last["student_ppl"][name]
            result = DomainResult(
                name=name,
                teacher_ppl=teacher,
                before=before[name],
                after=after,
                ratio_before=None if teacher is None else before[name] / teacher,
                ratio_after=None if teacher is None else after / teacher,
                tokens=int(tokens[place]),
                share=float(tokens[place] / max(1.0, tokens.sum())),
            )
            results.append(result)
        return results


def read_run(run_dir: Path) -> RunRecord:
    """Read a run's directory. Raises CheckpointError if it holds no run, or if nothing is measured yet."""
    with complete_files(run_dir):
        return _run_record(run_dir, read_ledger(run_dir), read_events(run_dir))


def read_runs(run_dirs: Sequence[Path]) -> list[RunRecord]:
    """Read several runs and give them different names: directories of the same name are named by their full paths."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.run_dir)) if names.count(run.name) > 1 else run for run in runs]


def _run_record(run_dir: Path, records: list[dict[str, Any]], events: list[dict[str, Any]]) -> RunRecord:
    measurements = [record for record in records if record["kind"] in ("interval", "end")]
    if not measurements:
        raise CheckpointError(f"{run_dir}: not begun: ledger.jsonl has no measurement yet")
    domains, identity = tuple(measurements[0]["student_ppl"]), run_dir / "run.json"
    config, text, fault = _read_config(run_dir)
    summary = read_summary(run_dir) if is_finished(run_dir) else None
    if summary is not None:
        check_end(run_dir, records, summary["steps"])
    return RunRecord(
        run_dir=run_dir,
        name=run_dir.resolve().name,
        domains=domains,
        steps=_steps([record for record in records if record["kind"] == "step"], len(domains)),
        measurements=measurements,
        samples=[record for record in records if record["kind"] == "samples"],
        events=events,
        config=config,
        config_text=text,
        config_fault=fault,
        summary=summary,
        identity=read_object(identity, "put it back from a copy") if identity.is_file() else None,
        state=run_state(run_dir, events, records, time.time()),
        expected_steps=expected_steps(config, events),
    )


def _steps(records: list[dict[str, Any]], num_domains: int) -> Steps:
    def column(rows: list[dict[str, Any]], key: str) -> Array:
        return np.array([row.get(key) for row in rows], np.float64)  # None is NaN

    clocks = [record["clock"] for record in records]
    columns = {key: column(records, key) for key in _NUMBERS} | {key: column(clocks, key) for key in _CLOCK}
    tokens = np.array([record["domain_tokens"] for record in records], np.float64).reshape(len(records), num_domains)
    peaks: dict[str, float] = {}
    for clock in clocks:
        for name, size in clock.get("peak_gb", {}).items():
            peaks[name] = max(peaks.get(name, 0.0), size)
    return Steps(column(records, "step"), column(records, "interval"), tokens, columns, peaks)


def _read_config(run_dir: Path) -> tuple[Config | None, str, str]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None, "", "The directory has no config.yaml."
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    text = "\n".join(_without_secret(line) for line in lines)
    try:
        return load_run_config(run_dir), text, ""
    except UserError as error:  # from another version: the text is shown anyway
        return None, text, redact(str(error))


def _without_secret(line: str) -> str:
    key, _, value = line.partition(": ")
    secret = names_a_secret(key.strip(" -")) and not _NUMBER_OR_CONSTANT.fullmatch(value.strip())
    return f"{key}: ***" if value and secret else redact(line)
