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
"""In a language's directory: with the context that BM25 retrieved, or without; the first that is there is taken."""
CONTEXT_TOKENS = 512
"""Of other files, at most."""
PROMPT_TOKENS = 2048
"""Context, prompt and answer together, at most; less where the model's window is shorter."""
ANSWER_TOKENS = 50
Generate = Callable[[Any, list[str], int], list[str]]
"""(model, prompts, most tokens of an answer) -> greedy answers."""


@dataclass(frozen=True)
class Completion:
    """One document: what goes before, what is asked for, and what other files say."""

    prompt: str
    groundtruth: str
    context: str


def edit_similarity(first: str, second: str) -> float:
    """2 * longest common subsequence / both lengths, 0..1: 1 - insertions and deletions / both lengths; 1 of two empty.

    The subsequence's length by one addition of long integers a character (Hyyrö, 2004).
    """
    total = len(first) + len(second)
    if not total:
        return 1.0
    places: dict[str, int] = {}
    for place, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for character in second:
        matches = row & places.get(character, 0)
        row = ((row + matches) | (row - matches)) & full
    return 2 * (len(first) - row.bit_count()) / total


def cut_answer(answer: str, groundtruth: str) -> list[str]:
    """The answer's first lines that hold anything, as many as the groundtruth has, stripped."""
    return _lines(answer)[: len(_lines(groundtruth))]


def score_answer(answer: str, groundtruth: str) -> tuple[float, float]:
    """Exact match (0 or 1) and edit similarity (0..1) of an answer, both over stripped lines."""
    given, wanted = cut_answer(answer, groundtruth), _lines(groundtruth)
    return float(given == wanted), edit_similarity("\n".join(given), "\n".join(wanted))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_languages(root: Path) -> dict[str, list[Completion]]:
    """The documents of all four languages.

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
            except (ValueError, KeyError, AttributeError) as error:
                raise DataError(f"{path}, line {number}: {error!r}; see docs/evaluation.md for the fields") from error
    if not documents:
        raise DataError(f"{path} is empty")
    return documents


def build_prompt(document: Completion, lm: Any) -> str:
    """Context of other files (its beginning) before the prompt (its end), as much as fits with the answer.

    `lm`: a model with tok_encode, tok_decode and max_length.
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
    """Two scores a language: `exact_match` and `edit_similarity`. `lm` as for `build_prompt`."""
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
