"""Long documents are encoded in parts, so that memory does not grow with a document: an encoding takes some 150 times
the bytes of its text.

Parts give the ids of the complete document if no token, and nothing that the tokenizer does before it looks for tokens,
reaches over the cut. Most pre-tokenizers split a text into words there, and each word is encoded on its own. Without
one (Llama 2), no token of the vocabulary may have the two letters at the cut next to each other inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Tokenizer

from ddk_ds.data.documents import Dropped

PART_CHARS = 1 << 18
_WINDOW = 1 << 10
_TRIES = 64
_WORD_END = re.compile(r"(?<=\w)(?=\W)")


class Part(NamedTuple):
    """A document's text or part of it; `opens` and `closes` are True for a document's first and last part."""

    text: str
    opens: bool = True
    closes: bool = True


class DocumentCutter:
    """Cuts documents of more than PART_CHARS characters into parts that give the same ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def parts(self, text: str, dropped: Dropped) -> Iterator[Part]:
        """Yield the parts of a document; `dropped` counts the cuts that may change a token."""
        begin = 0
        while len(text) - begin > PART_CHARS:
            end, following = self._cut(text, begin, dropped)
            yield Part(text[begin:end], opens=begin == 0, closes=False)
            begin = following
        yield Part(text[begin:], opens=begin == 0)

    def _cut(self, text: str, begin: int, dropped: Dropped) -> tuple[int, int]:
        """Return the end of the part that starts at `begin`, and the start of the next."""
        limit = begin + PART_CHARS
        ends = _word_ends(text, limit)
        for end in reversed(ends):
            # Some tokenizers put a space before each text that they are given: that of the next part is left to them.
            for following in (end, end + 1) if text[end] == " " else (end,):
                left, right = text[max(begin, end - _WINDOW) : end], text[following : following + _WINDOW]
                if self._agrees(left, text[end:following], right):
                    return end, following
        dropped.unproven_cuts += 1
        end = ends[-1] if ends else limit
        return end, end

    def _agrees(self, left: str, between: str, right: str) -> bool:
        """Return True if `left` and `right` apart give the ids of the text, by construction and here."""
        whole = left + between + right
        words, before, after = self._words(whole), self._words(left), self._words(right)
        if words != before + after and not self._joined(words, before, after):
            return False
        return self._ids(whole) == self._ids(left) + self._ids(right)

    def _joined(self, words: list[str], before: list[str], after: list[str]) -> bool:
        """Return True if the cut lies inside a word, at two letters that no token has next to each other."""
        if not before or not after or words != [*before[:-1], before[-1] + after[0], *after[1:]]:
            return False
        return (before[-1][-1], after[0][0]) not in self._pairs

    @cached_property
    def _pairs(self) -> set[tuple[str, str]]:
        return {pair for token in self._tokenizer.get_vocab() for pair in pairwise(token)}

    def _words(self, text: str) -> list[str]:
        """Return the pieces of a text that the model encodes each on its own."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _word_ends(text: str, limit: int) -> list[int]:
    """Return the last _TRIES ends of words, or all there are, in the half of a part before `limit`."""
    ends: list[int] = []
    # Most texts need no look at the whole half, which takes as long as its encoding.
    for chars in (PART_CHARS >> 7, PART_CHARS >> 4, PART_CHARS >> 1):
        ends = [match.start() for match in _WORD_END.finditer(text, limit - chars, limit)][-_TRIES:]
        if len(ends) == _TRIES:
            break
    return ends
