"""The results of an evaluation: numbers, their JSON form, and tables with a row for each model, as in the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.suites import PASS_AT_1, Chosen


@dataclass(frozen=True)
class Score:
    """One result of one model on one benchmark."""

    task: str
    title: str
    metric: str
    shots: int
    value: float
    """Share of right answers, or mean similarity; 0 to 1."""
    stderr: float | None
    """Standard error of the mean over documents; None with a single document."""
    documents: int
    more: dict[str, float] = field(default_factory=dict)
    """The benchmark's other metrics by name."""


@dataclass(frozen=True)
class DomainScore:
    """The quality of a model's predictions of one domain's held-out text."""

    domain: str
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float
    bits_per_byte_stderr: float | None
    samples: int
    tokens: int
    """Number of predicted tokens: all but the first of a sample, or of each of its documents if they are kept apart."""
    text_bytes: int
    """Length of the predicted tokens' text in UTF-8."""


@dataclass
class ModelResult:
    """All results of one model."""

    model: str
    scores: list[Score] = field(default_factory=list)
    code: list[Score] = field(default_factory=list)
    """CrossCodeEval's exact match and edit similarity of each language."""
    domains: list[DomainScore] = field(default_factory=list)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error (from the sample variance, n - 1), which is None for a single value.

    Raises ConfigError if there is no value.
    """
    number = len(values)
    if not number:
        raise ConfigError("--limit leaves no document to evaluate")
    mean = math.fsum(values) / number
    if number == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (number - 1) / number)


def average(scores: Sequence[Score]) -> tuple[float, float | None]:
    """Return the unweighted mean over benchmarks, as in the paper's last column, and its standard error."""
    errors = [score.stderr for score in scores]
    value = math.fsum(score.value for score in scores) / len(scores)
    if any(error is None for error in errors):
        return value, None
    return value, math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(scores)


def as_json(result: ModelResult) -> dict[str, Any]:
    """Return a model's results and their averages as plain values for JSON."""
    content: dict[str, Any] = {"model": result.model}
    if result.scores:
        content["benchmarks"] = [vars(score) for score in result.scores]
        content["average"] = _averaged(result.scores)
    if result.code:
        content["cross_code_eval"] = [vars(score) for score in result.code]
        for metric in dict.fromkeys(score.metric for score in result.code):
            content[f"cross_code_eval_{metric}"] = _averaged([score for score in result.code if score.metric == metric])
    if result.domains:
        content["domains"] = [vars(domain) for domain in result.domains]
    return content


def _averaged(scores: Sequence[Score]) -> dict[str, Any]:
    value, stderr = average(scores)
    return {"value": value, "stderr": stderr, "of": len(scores)}


def benchmark_table(
    results: Sequence[ModelResult], ran: Sequence[Chosen], left_out: Sequence[Chosen], limit: int | None
) -> Table:
    """Return the table of benchmarks in per cent, with standard errors.

    Its caption names the benchmarks `left_out` and the `limit` of documents per task, if there is one.
    """
    lines = ["per cent ± standard error; " + _shots(ran)]
    if limit is not None:
        lines.append(f"the first {limit:,} documents of each task only")
    if left_out:
        titles = ", ".join(chosen.benchmark.title for chosen in left_out)
        lines.append(f"{titles} left out: they run generated code, which --allow-code-execution allows")
    table = Table(box=box.SIMPLE, caption="\n".join(lines), caption_justify="left")
    table.add_column("model", overflow="fold")
    for chosen in ran:
        table.add_column(f"{chosen.benchmark.title}\n{_metric(chosen)}", justify="right")
    table.add_column(f"average\nof {len(ran)}", justify="right")
    for result in results:
        cells = [_percent(score.value, score.stderr) for score in result.scores]
        table.add_row(result.model, *cells, _percent(*average(result.scores)))
    return table


def _shots(ran: Sequence[Chosen]) -> str:
    numbers = sorted({chosen.shots for chosen in ran})
    if len(numbers) == 1:
        return f"{numbers[0]}-shot"
    titles = {n: ", ".join(chosen.benchmark.title for chosen in ran if chosen.shots == n) for n in numbers}
    return "; ".join(f"{number}-shot: {titles[number]}" for number in numbers)


def _metric(chosen: Chosen) -> str:
    metric = chosen.benchmark.metric
    return PASS_AT_1 if chosen.benchmark.runs_code else metric.partition(",")[0]


def code_table(results: Sequence[ModelResult]) -> Table:
    """Return CrossCodeEval's table with a row for each model, in per cent with standard errors.

    Its columns are exact match and edit similarity of each language, then their averages.
    """
    table = Table(
        box=box.SIMPLE, title="CrossCodeEval", caption="per cent ± standard error: exact match, edit similarity"
    )
    table.add_column("model", overflow="fold")
    titles = dict.fromkeys(score.title for score in results[0].code)
    for title in (*titles, "average"):
        table.add_column(f"{title}\nEM", justify="right")
        table.add_column(f"{title}\nES", justify="right")
    for result in results:
        matches, similarities = ([s for s in result.code if s.metric == m] for m in ("exact_match", "edit_similarity"))
        pairs = [(score.value, score.stderr) for pair in zip(matches, similarities, strict=True) for score in pair]
        table.add_row(result.model, *(_percent(*pair) for pair in [*pairs, average(matches), average(similarities)]))
    return table


def domain_table(results: Sequence[ModelResult], *, masked: bool) -> Table:
    """Return the table of perplexity and bits per byte of each domain; its caption says if documents are kept apart."""
    seen = "documents of a sample do not see each other" if masked else "documents of a sample are joined"
    caption = f"perplexity and bits per byte, ± standard error; the {seen} (--documents)"
    table = Table(box=box.SIMPLE, title="held-out text", caption=caption, caption_justify="left")
    table.add_column("domain")
    for result in results:
        table.add_column(f"{result.model}\nperplexity", justify="right", overflow="fold")
        table.add_column("\nbits per byte", justify="right")
    for row in zip(*(result.domains for result in results), strict=True):
        cells = [row[0].domain]
        for score in row:
            cells.append(f"{score.perplexity:.2f}{_error(score.perplexity_stderr, 2)}")
            cells.append(f"{score.bits_per_byte:.4f}{_error(score.bits_per_byte_stderr, 4)}")
        table.add_row(*cells)
    return table


def score_line(score: Score) -> str:
    """Return one line with the title, value, standard error, metric and number of documents of a score."""
    return f"{score.title}: {_percent(score.value, score.stderr)} ({score.metric}, {score.documents:,} documents)"


def _percent(value: float, stderr: float | None) -> str:
    return f"{100 * value:.2f}{_error(None if stderr is None else 100 * stderr, 2)}"


def _error(stderr: float | None, digits: int) -> str:
    return "" if stderr is None else f" ± {stderr:.{digits}f}"
