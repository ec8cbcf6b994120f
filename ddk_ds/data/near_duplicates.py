"""Near duplicates by MinHash and locality-sensitive hashing, with datatrove's signatures.

A text is the set of its n-grams of words, without case, punctuation and diacritics. A signature has `buckets` times
`hashes` numbers, each the least value of one hash function over the set, which two texts share with the probability of
their Jaccard similarity s (Broder, 1997). Each bucket of `hashes` numbers gives one key. Two texts with a key in common
are near: they are with probability 1 - (1 - s^hashes)^buckets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ddk_ds.data.recipe import MinHashOptions
from ddk_ds.errors import ConfigError

if TYPE_CHECKING:
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.text import TextNormConfig

# datatrove makes a matrix of these and of all hash functions: 3.7 MB of the defaults.
_SHINGLES = 1 << 12
_PIECE_CHARS = 1 << 18
# Scripts that put no blanks between words: Thai to Burmese and Khmer, kana, Chinese characters. Each letter is a word.
_NO_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_NO_BLANKS}]|[^\\s{_NO_BLANKS}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case, punctuation and diacritics."""
    from datatrove.utils.text import simplify_text

    return _WORD.findall(simplify_text(text, _as_written()))


@cache
def _as_written() -> TextNormConfig:
    """Return datatrove's simplification without its one word for all numbers: tasks differ in their numbers alone."""
    from datatrove.utils.text import TextNormConfig

    return TextNormConfig(norm_numbers=False)


def require_datatrove(option: str) -> None:
    """Raise ConfigError, which names the option, if datatrove is not installed."""
    try:
        import datatrove.pipeline.dedup.minhash  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{option} needs datatrove ({error}): pip install 'ddk_ds[data]'") from error


class NearKeys:
    """A function from texts to the keys of each, which depend on text and options alone."""

    def __init__(self, options: MinHashOptions) -> None:
        """Store the options. Raises ConfigError if datatrove is not installed."""
        require_datatrove("dedup: minhash")
        self.options = options

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the keys of each text, signed numbers of 64 bits; none of a text with fewer words than an n-gram."""
        return [self._keys(text) for text in texts]

    @cached_property
    def _signature(self) -> MinhashDedupSignature:
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
        from datatrove.utils.word_tokenizers import WordTokenizer

        class Words(WordTokenizer):
            """Words by blanks: datatrove's own cutters need spaCy, jieba or others for each language."""

            def word_tokenize(self, text: str) -> list[str]:
                return _WORD.findall(text)

            sent_tokenize = span_tokenize = word_tokenize

        config = MinhashConfig(
            n_grams=self.options.ngram_words,
            num_buckets=self.options.buckets,
            hashes_per_bucket=self.options.hashes,
            norm_config=_as_written(),
        )
        return MinhashDedupSignature(".", config, language=Words())

    def _keys(self, text: str) -> list[int]:
        # The least values of the parts' least values are those of the whole, but for the n-grams over a piece's end.
        least: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] | None = None
        for begin in range(0, len(text), _PIECE_CHARS):
            shingles = self._signature.get_shingles(text[begin : begin + _PIECE_CHARS])
            for first in range(0, len(shingles), _SHINGLES):
                part = np.array(self._signature.get_signature(shingles[first : first + _SHINGLES]), np.uint64)
                least = part if least is None else np.minimum(least, part)
        if least is None:
            return []
        digests = (xxhash.xxh3_64_digest(bucket.tobytes(), seed=number) for number, bucket in enumerate(least))
        return [int.from_bytes(digest, "little", signed=True) for digest in digests]
