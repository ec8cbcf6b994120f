"""What an evaluation found, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ddk_ds.errors import ConfigError


@dataclass(frozen=True)
class Score:
    """One number of one model: shares lie in 0..1."""

    task: str
    title: str
    metric: str
    shots: int
    value: float
    stderr: float | None
    """Standard error of the mean over documents; None of a single one."""
    documents: int
    more: dict[str, float] = field(default_factory=dict)
    """The benchmark's other metrics."""


@dataclass(frozen=True)
class DomainScore:
    """How well a model predicts the held-out text of one domain."""

    domain: str
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float
    bits_per_byte_stderr: float | None
    samples: int
    tokens: int
    """Predicted ones: of each sample all but the first."""
    text_bytes: int
    """UTF-8 bytes of the predicted tokens' text."""


@dataclass
class ModelResult:
    """All that was measured of one model."""

    model: str
    scores: list[Score] = field(default_factory=list)
    code: list[Score] = field(default_factory=list)
    """CrossCodeEval: exact match and edit similarity of each language."""
    domains: list[DomainScore] = field(default_factory=list)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (n - 1) over the root of n; None with one value. Raises ConfigError without any."""
    number = len(values)
    if not number:
        raise ConfigError("--limit leaves no document to evaluate")
    mean = math.fsum(values) / number
    if number == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (number - 1) / number)


def average(scores: Sequence[Score]) -> tuple[float, float | None]:
    """Unweighted mean over benchmarks, as the paper's last column, and its standard error."""
    errors = [score.stderr for score in scores]
    value = math.fsum(score.value for score in scores) / len(scores)
    if any(error is None for error in errors):
        return value, None
    return value, math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(scores)


def as_json(result: ModelResult) -> dict[str, Any]:
    """Plain values; averages beside what they are of."""
    content: dict[str, Any] = {"model": result.model}
    if result.scores:
        content["benchmarks"] = [vars(score) for score in result.scores]
        content["average"] = _averaged(result.scores)
    if result.code:
        content["cross_code_eval"] = [vars(score) for score in result.code]
        for metric in dict.fromkeys(score.metric for score in result.code):
            of_metric = [score for score in result.code if score.metric == metric]
            content[f"cross_code_eval_{metric}"] = _averaged(of_metric)
    if result.domains:
        content["domains"] = [vars(domain) for domain in result.domains]
    return content


def _averaged(scores: Sequence[Score]) -> dict[str, Any]:
    value, stderr = average(scores)
    return {"value": value, "stderr": stderr, "of": len(scores)}
