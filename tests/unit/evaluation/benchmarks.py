"""Invented documents in each benchmark's columns, and models that know their answers."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ddk_ds.evaluation.harness import subjects_of
from ddk_ds.evaluation.suites import BENCHMARKS, SUBJECT

Row = dict[str, Any]
DOCUMENTS = 4
"""Number of documents of each benchmark; a benchmark with subjects has two in each."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def _letters(number: int) -> Row:
    options = {letter: f"the colour {number + place}" for place, letter in enumerate("ABCD")}
    return {"question": f"Which colour has the number {number}?", **options, "answer": "ABCD"[number % 4]}


def _mmlu(number: int) -> Row:
    choices = [f"{number + place} stones" for place in range(4)]
    return {"question": f"How heavy is box {number}?", "choices": choices, "answer": number % 4}


def _race(number: int) -> Row:
    options = [f"It is {word}." for word in _NUMBERS[:4]]
    first = {"question": "What is the first thing?", "answer": "A", "options": options}
    last = {"question": f"What is thing {number}?", "answer": "ABCD"[number % 4], "options": options}
    return {"article": f"A tale of {_NUMBERS[number]} things.", "problems": str([first, last])}


def _c3(number: int) -> Row:
    choice = [f"第{word}个杯子" for word in "一二三"[: 2 + number % 2]]
    return {
        **{"id": number, "context": [f"桌上有{number}个杯子。", "他拿走了一个。"]},
        **{"question": "拿走的是", "choice": choice, "answer": choice[number % 2]},
    }


def _winogrande(number: int) -> Row:
    sentence = f"Box {number} did not fit on the shelf since the _ was too wide."
    return {"sentence": sentence, "option1": "box", "option2": "shelf", "answer": str(1 + number % 2)}


def _gsm8k(number: int) -> Row:
    question = f"Ana has {number} pears and gets 10 more. How many has she?"
    return {"question": question, "answer": f"She has {number} + 10 = {number + 10}.\n#### {number + 10}"}


def _lettered(labels: str) -> Callable[[int], Row]:
    def row(number: int) -> Row:
        choices = {"text": [f"a lamp of {place + number} watts" for place in range(len(labels))], "label": list(labels)}
        return {
            "question": f"Which lamp is lamp {number}?",
            "choices": choices,
            "answerKey": labels[number % len(labels)],
        }

    return row


def _humaneval(number: int) -> Row:
    return {
        "task_id": f"Made/{number}",
        "prompt": f'def add_{number}(value):\n    """Add {number}."""\n',
        "canonical_solution": f"    return value + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
        "entry_point": f"add_{number}",
    }


def _mbpp(number: int) -> Row:
    calls = [f"assert times_{number}({value}) == {value * number}" for value in (1, 2, 5)]
    return {
        **{"task_id": number, "text": f"Write a function that multiplies by {number}."},
        **{"code": f"def times_{number}(value):\r\n    return value * {number}", "test_list": calls},
        "test_setup_code": "import math",
    }


ROWS: dict[str, Callable[[int], Row]] = {
    **{"ceval": _letters, "mmlu": _mmlu, "race": _race, "c3": _c3, "winogrande": _winogrande, "gsm8k": _gsm8k},
    **{"commonsense_qa": _lettered("ABCDE"), "arc_easy": _lettered("ABC"), "arc_challenge": _lettered("1234")},
    **{"humaneval": _humaneval, "mbpp": _mbpp},
}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_benchmarks(root: Path) -> None:
    """Write every benchmark's evaluated split and examples below `root`."""
    for name, make in ROWS.items():
        benchmark = BENCHMARKS[name]
        has_subjects = SUBJECT in benchmark.data.config
        for subject in subjects_of(benchmark):
            place = root / name / subject
            evaluated = 2 if has_subjects else DOCUMENTS
            for split, count in ((benchmark.data.split, evaluated), (benchmark.data.examples, 7)):
                if split:
                    rows = [{**make(number), "number": number} for number in range(count)]
                    write_rows(place / f"{split}.jsonl", rows)


class Knower(LM):
    """A model that answers correctly the documents whose number it `knows`, and wrongly all others."""

    def __init__(self, knows: Callable[[int], bool]) -> None:
        super().__init__()
        self.knows = knows
        self.prompts: list[str] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(-1.0 if self._chooses(request.doc) == request.idx else -900.0, False) for request in requests]

    def _chooses(self, document: Row) -> int:
        return right_choice(document) if self.knows(document["number"]) else 1 - min(1, right_choice(document))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [right_answer(request.doc) if self.knows(request.doc["number"]) else WRONG for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no benchmark here asks for it")


WRONG = "    return None\n\nThat makes 999."


def right_choice(document: Row) -> int:
    """Return the index of the right choice of a document."""
    if "problems" in document:
        return "ABCD".index(ast.literal_eval(document["problems"])[-1]["answer"])
    if "choice" in document:
        return int(document["choice"].index(document["answer"]))
    if "sentence" in document:
        return int(document["answer"]) - 1
    if "answerKey" in document:
        return int(document["choices"]["label"].index(document["answerKey"]))
    answer = document["answer"]
    return answer if isinstance(answer, int) else "ABCD".index(answer)


def right_answer(document: Row) -> str:
    """Return the right answer of a document that asks for text."""
    return str(document.get("canonical_solution") or document.get("code") or document["answer"])
