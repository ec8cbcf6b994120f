"""Comparison of how two tokenizers of one vocabulary cut text.

Equal ids of all tokens do not show that two tokenizers are one: with other merges, or another pre-tokenizer, the same
text has other tokens. A teacher then sees text that it was not trained on, and shards are not the student's text. Both
cut a probe text: prose, code, formulas and numbers in the scripts of a dozen languages.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import groupby

from ddk_ds.data.manifest import Manifest
from ddk_ds.data.shared_vocabulary import base_fingerprint
from ddk_ds.data.tokenizer import TokenizerInfo, encode

LARGEST_SHARE = 0.01
"""Share of tokens cut differently from which on two tokenizers are refused as a pair."""


def probe_hash(info: TokenizerInfo) -> str:
    """Return a hash of the probe text's ids, 16 hexadecimal digits: equal if two tokenizers cut it the same way."""
    ids = [encode(info.tokenizer, line).ids for line in probe_lines()]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def prepared_with(manifest: Manifest, info: TokenizerInfo) -> bool:
    """Return True if data were prepared with this tokenizer, or with one that cuts text in the same way.

    The tokenizer may have added tokens after the last one of the data's.
    """
    same = base_fingerprint(info, manifest.vocab_size) == manifest.tokenizer_fingerprint
    return same and manifest.probe_hash in ("", probe_hash(info))


def cut_differently(ours: TokenizerInfo, theirs: TokenizerInfo) -> float:
    """Return the share of the probe text's tokens by `ours` that `theirs` has not, at the same place."""
    if ours.path.read_bytes() == theirs.path.read_bytes():
        return 0.0
    tokens = different = 0
    for line in probe_lines():
        mine, others = (_tokens(info, line) for info in (ours, theirs))
        tokens += mine.total()
        different += (mine - others).total()
    return different / max(tokens, 1)


def _tokens(info: TokenizerInfo, line: str) -> Counter[tuple[int, tuple[int, int]]]:
    """Return the tokens of a line with their places; the bytes of a letter are several tokens at one place."""
    encoding = encode(info.tokenizer, line)
    return Counter(zip(encoding.ids, encoding.offsets, strict=True))


def probe_lines() -> list[str]:
    """Return the lines of the probe text."""
    return files("ddk_ds.data").joinpath("probe.txt").read_text(encoding="utf-8").splitlines()


def found_again(info: TokenizerInfo, ids: Sequence[int]) -> float:
    """Return the share of a sample's tokens that its text has when it is encoded again, wherever they stand.

    With the tokenizer that made the ids nearly all are; the text of another one's ids is cut in other places.
    """
    control = info.text.controls
    ordinary = Counter(number for number in ids if number not in control)
    again = Counter(number for text in _between(info, ids, control) for number in encode(info.tokenizer, text).ids)
    return (ordinary & again).total() / max(ordinary.total(), 1)


def _between(info: TokenizerInfo, ids: Sequence[int], control: frozenset[int]) -> Iterator[str]:
    """Yield the texts between control tokens."""
    for is_control, part in groupby(ids, control.__contains__):
        if not is_control:
            yield info.tokenizer.decode(list(part), skip_special_tokens=False)
