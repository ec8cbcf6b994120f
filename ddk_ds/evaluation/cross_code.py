"""CrossCodeEval (Ding et al., 2023, arXiv 2310.11248): the next statement of a file that uses others of its repository.

Exact match and edit similarity over four languages, from the data set's own files; greedy generation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_ds.errors import DataError
from ddk_ds.evaluation.results import Score, mean_and_stderr

LANGUAGES = {"python": "Python", "java": "Java", "typescript": "TypeScript", "csharp": "C#"}
FILES = ("line_completion_rg1_bm25.jsonl", "line_completion.jsonl")
"""Names of a language's file, with the context that BM25 retrieved and without; the first that exists is read."""
CONTEXT_TOKENS = 512
"""Maximal number of tokens from other files."""
PROMPT_TOKENS = 2048
"""Maximal number of tokens of context, prompt and answer together; less if the model's window is shorter."""
ANSWER_TOKENS = 50
Generate = Callable[[Any, list[str], int], list[str]]
"""A function of model, prompts and maximal number of tokens of an answer, which returns greedy answers."""


@dataclass(frozen=True)
class Completion:
    """One document: a file's text before the statement, the statement, and text of other files."""

    prompt: str
    groundtruth: str
    context: str


def edit_similarity(first: str, second: str) -> float:
    """Return 1 - (insertions + deletions) / (sum of both lengths), a value from 0 to 1; 1 for two empty texts.

    This equals 2 * longest common subsequence / (sum of both lengths). The subsequence's length takes one addition of
    long integers for each character (Hyyrö, 2004).
    """
    total = len(first) + len(second)
    if not total:
        return 1.0
    positions: dict[str, int] = {}
    for position, character in enumerate(first):
        positions[character] = positions.get(character, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for character in second:
        matches = row & positions.get(character, 0)
        row = ((row + matches) | (row - matches)) & full
    return 2 * (len(first) - row.bit_count()) / total


def cut_answer(answer: str, groundtruth: str) -> list[str]:
    """Strip the lines of both texts, drop blank ones, and return as many of the answer's as the groundtruth has."""
    return _lines(answer)[: len(_lines(groundtruth))]


def score_answer(answer: str, groundtruth: str) -> tuple[float, float]:
    """Return exact match (0 or 1) and edit similarity (0 to 1) of an answer.

    Both compare stripped lines that are not blank, and the answer is first cut to as many lines as the groundtruth has.
    """
    given, wanted = cut_answer(answer, groundtruth), _lines(groundtruth)
    return float(given == wanted), edit_similarity("\n".join(given), "\n".join(wanted))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_languages(root: Path) -> dict[str, list[Completion]]:
    """Read the documents of all four languages.

    Raises DataError that lists every missing file, or names the line that lacks a field.
    """
    files = {language: _language_file(root, language) for language in LANGUAGES}
    missing = [f"  {root / name / FILES[0]} or {root / name}.jsonl" for name, path in files.items() if path is None]
    if missing:
        wanted = "fields prompt, groundtruth and, with context, crossfile_context.text"
        raise DataError("\n".join((f"--cross-code-eval {root} lacks, with {wanted}:", *missing)))
    return {language: _read(path) for language, path in files.items() if path}


def _language_file(root: Path, language: str) -> Path | None:
    candidates = [*(root / language / name for name in FILES), root / f"{language}.jsonl"]
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path) -> list[Completion]:
    documents = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                context = (row.get("crossfile_context") or {}).get("text", "")
                documents.append(Completion(row["prompt"], row["groundtruth"], context))
            except (ValueError, KeyError, AttributeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error!r}; see docs/evaluation.md for the fields") from error
    if not documents:
        raise DataError(f"{path} is empty")
    return documents


def build_prompt(document: Completion, lm: Any) -> str:
    """Join the first CONTEXT_TOKENS of the other files' context and the end of the document's prompt.

    The prompt loses its beginning until everything fits into PROMPT_TOKENS, or into the model's window if that is
    smaller, together with ANSWER_TOKENS for the answer. `lm` is a model with tok_encode, tok_decode and max_length.
    """
    room = min(PROMPT_TOKENS, lm.max_length) - ANSWER_TOKENS
    before = f"{_cut(lm, document.context, slice(CONTEXT_TOKENS))}\n" if document.context else ""
    taken = len(lm.tok_encode(before, add_special_tokens=False))
    return before + _cut(lm, document.prompt, slice(-max(1, room - taken), None))


def _cut(lm: Any, text: str, part: slice) -> str:
    tokens = lm.tok_encode(text, add_special_tokens=False)
    return text if len(tokens[part]) == len(tokens) else str(lm.tok_decode(tokens[part]))


def score_languages(
    lm: Any, languages: Mapping[str, Sequence[Completion]], generate: Generate, *, limit: int | None
) -> list[Score]:
    """Let a model answer the documents of each language, and return its `exact_match` and `edit_similarity` for each.

    `lm` is a model as `build_prompt` takes it, `generate` returns its answers to a list of prompts, and `limit` is the
    number of documents of each language, or None for all.
    """
    scores = []
    for language, title in LANGUAGES.items():
        documents = languages[language][:limit]
        answers = generate(lm, [build_prompt(document, lm) for document in documents], ANSWER_TOKENS)
        pairs = [
            score_answer(answer, document.groundtruth) for answer, document in zip(answers, documents, strict=True)
        ]
        for metric, values in zip(("exact_match", "edit_similarity"), zip(*pairs, strict=True), strict=True):
            value, stderr = mean_and_stderr(values)
            scores.append(Score(language, title, metric, 0, value, stderr, len(documents)))
    return scores
