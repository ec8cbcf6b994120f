"""The programs of HumanEval and MBPP: what is run to see whether an answer is right, and pass@1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddk_ds.evaluation.results import Score, mean_and_stderr
from ddk_ds.evaluation.sandbox import run_programs
from ddk_ds.evaluation.suites import Benchmark

Document = Mapping[str, Any]


def humaneval_program(document: Document, answer: str) -> str:
    """The prompt's function completed by the answer, and the call of its test."""
    return f"{document['prompt']}{answer}\n\n{document['test']}\n\ncheck({document['entry_point']})\n"


def mbpp_program(document: Document, answer: str) -> str:
    """The answer, and the assertions on it."""
    return "\n".join((answer, document["test_setup_code"], *document["test_list"], ""))


_PROGRAMS: Mapping[str, Callable[[Document, str], str]] = {"humaneval": humaneval_program, "mbpp": mbpp_program}


def score_programs(benchmark: Benchmark, shots: int, answers: Sequence[tuple[Document, str]]) -> Score:
    """pass@1 with one answer to each document: the share of programs that come to their end in the sandbox."""
    make = _PROGRAMS[benchmark.name]
    outcomes = run_programs([make(document, answer) for document, answer in answers])
    value, stderr = mean_and_stderr([float(outcome.passed) for outcome in outcomes])
    timed_out = sum(outcome.reason == "timed out" for outcome in outcomes) / len(outcomes)
    return Score(
        benchmark.name, benchmark.title, benchmark.metric, shots, value, stderr, len(outcomes), {"timed_out": timed_out}
    )
