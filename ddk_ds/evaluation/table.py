"""The results as tables: a row for each model, a column for each benchmark, as in the paper."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ddk_ds.evaluation.results import ModelResult, Score, average
from ddk_ds.evaluation.suites import PASS_AT_1, Chosen


def benchmark_table(
    results: Sequence[ModelResult], ran: Sequence[Chosen], left_out: Sequence[Chosen], limit: int | None
) -> Table:
    """Per cent, with the standard error; `left_out` were wanted too, `limit` is the most documents of a task."""
    lines = ["per cent ± standard error; " + _shots(ran)]
    if limit is not None:
        lines.append(f"the first {limit:,} documents of each task alone")
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
    """CrossCodeEval: exact match and edit similarity of each language, in per cent."""
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


def domain_table(results: Sequence[ModelResult]) -> Table:
    """Perplexity and bits per byte of each domain."""
    caption = "perplexity and bits per byte, ± standard error"
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
    """One result as it comes in."""
    return f"{score.title}: {_percent(score.value, score.stderr)} ({score.metric}, {score.documents:,} documents)"


def _percent(value: float, stderr: float | None) -> str:
    return f"{100 * value:.2f}{_error(None if stderr is None else 100 * stderr, 2)}"


def _error(stderr: float | None, digits: int) -> str:
    return "" if stderr is None else f" ± {stderr:.{digits}f}"
