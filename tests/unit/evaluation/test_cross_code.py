"""CrossCodeEval: its metrics agree with known values; files, prompts and scores are as documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_ds.errors import DataError
from ddk_ds.evaluation.cross_code import (
    ANSWER_TOKENS,
    CONTEXT_TOKENS,
    FILES,
    LANGUAGES,
    PROMPT_TOKENS,
    Completion,
    build_prompt,
    edit_similarity,
    read_languages,
    score_answer,
    score_languages,
)
from ddk_ds.evaluation.results import ModelResult, as_json


class Letters:
    """A model whose tokenizer has one token per character."""

    def __init__(self, window: int = 100_000) -> None:
        self.max_length = window

    def tok_encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def tok_decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("first", "second", "known"),
    [
        ("", "", 1.0),
        ("abc", "", 0.0),
        ("abc", "abc", 1.0),
        ("abc", "xyz", 0.0),
        ("abcd", "abed", 6 / 8),  # one letter replaced: one deleted, one inserted
        ("kitten", "sitting", 8 / 13),  # subsequence i t t n
        ("self.add(x)", "self.add(x, y)", 22 / 25),
        ("größe", "grosse", 6 / 11),
    ],
)
def test_edit_similarity_of_known_pairs(first: str, second: str, known: float) -> None:
    assert edit_similarity(first, second) == pytest.approx(known)


def longest_common_subsequence(first: str, second: str) -> int:
    """Compute the length of the longest common subsequence by the textbook's table."""
    row = [0] * (len(second) + 1)
    for a in first:
        last = row
        row = [0]
        for place, b in enumerate(second):
            row.append(last[place] + 1 if a == b else max(last[place + 1], row[place]))
    return row[-1]


@given(st.text("abc(.", max_size=70), st.text("abc(.", max_size=70))
def test_edit_similarity_is_that_of_the_textbooks_table(first: str, second: str) -> None:
    total = len(first) + len(second)
    known = 2 * longest_common_subsequence(first, second) / total if total else 1.0
    assert edit_similarity(first, second) == pytest.approx(known)
    assert edit_similarity(second, first) == pytest.approx(known)


@pytest.mark.parametrize(
    ("answer", "groundtruth", "known"),
    [
        ("  store.add(item)  \nmore = 1\n", "store.add(item)", (1.0, 1.0)),
        ("\n\nstore.add(item)", "store.add(item)", (1.0, 1.0)),
        ("store.add(it)", "store.add(item)", (0.0, 26 / 28)),
        ("", "store.add(item)", (0.0, 0.0)),
        ("first(\n    second)\nthird", "first(\nsecond)", (1.0, 1.0)),
        ("first(", "first(\nsecond)", (0.0, 12 / 20)),
    ],
)
def test_an_answer_is_scored_over_as_many_lines_as_are_asked_for(
    answer: str, groundtruth: str, known: tuple[float, float]
) -> None:
    assert score_answer(answer, groundtruth) == pytest.approx(known)


def write_language(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(language: str) -> list[dict[str, Any]]:
    context = {"text": f"# other.{language}\ndef made_up(): ...", "list": []}
    asked = [f"call_{number}(value)" for number in range(4)]
    return [
        {"prompt": f"x = {number}\n", "groundtruth": wanted, "right_context": "", "crossfile_context": context}
        for number, wanted in enumerate(asked)
    ]


def test_scores_of_models_that_are_known(tmp_path: Path) -> None:
    for language in LANGUAGES:
        write_language(tmp_path / language / FILES[0], rows_of(language))
    languages = read_languages(tmp_path)
    assert [document.context[:9] for document in languages["csharp"]] == ["# other.c"] * 4

    def half(_lm: Any, prompts: list[str], most_tokens: int) -> list[str]:
        assert most_tokens == ANSWER_TOKENS
        numbers = [int(prompt.split("x = ")[1]) for prompt in prompts]
        assert all(prompt.startswith("# other.") for prompt in prompts)
        return [f"call_{number}(value)\nrest" if number % 2 else "nothing" for number in numbers]

    scores = score_languages(Letters(), languages, half, limit=None)
    assert [(score.task, score.metric) for score in scores[:2]] == [
        ("python", "exact_match"),
        ("python", "edit_similarity"),
    ]
    matches = [score for score in scores if score.metric == "exact_match"]
    assert [score.value for score in matches] == [0.5] * 4
    assert matches[0].stderr == pytest.approx((1 / 3) ** 0.5 / 2)  # variance 1/3 with n - 1, over the root of 4
    likeness = edit_similarity("nothing", "call_0(value)")
    assert scores[1].value == pytest.approx((1 + likeness) / 2)
    content = as_json(ModelResult("model", code=scores))
    assert content["cross_code_eval_exact_match"]["value"] == 0.5
    assert content["cross_code_eval_edit_similarity"]["of"] == 4


def test_the_prompts_end_and_the_contexts_beginning_are_kept() -> None:
    document = Completion("p" * 5000 + "end", "wanted", "start" + "c" * 5000)
    text = build_prompt(document, Letters())
    assert text.startswith("startccc") and text.endswith("pppend")
    assert text.count("c") == CONTEXT_TOKENS - len("start")
    assert len(text) == PROMPT_TOKENS - ANSWER_TOKENS
    assert build_prompt(Completion("x = 1\n", "wanted", "other"), Letters()) == "other\nx = 1\n"
    assert build_prompt(Completion("x = 1\n", "wanted", ""), Letters()) == "x = 1\n"
    assert len(build_prompt(document, Letters(window=900))) == 900 - ANSWER_TOKENS


def test_missing_files_and_fields_are_named(tmp_path: Path) -> None:
    write_language(tmp_path / "java.jsonl", rows_of("java"))
    with pytest.raises(DataError) as raised:
        read_languages(tmp_path)
    assert all(str(tmp_path / language / FILES[0]) in str(raised.value) for language in LANGUAGES if language != "java")
    assert "groundtruth" in str(raised.value) and "java" not in str(raised.value)
    for language in LANGUAGES:
        write_language(tmp_path / f"{language}.jsonl", rows_of(language))
    write_language(tmp_path / "csharp" / FILES[1], [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"csharp/line_completion.jsonl, line 1.*groundtruth"):
        read_languages(tmp_path)
