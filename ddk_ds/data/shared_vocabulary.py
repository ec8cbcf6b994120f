"""The tokens that student and teacher share, over which all probabilities of a run are.

Tokenizers of one family often differ in added tokens at the end of the vocabulary, such as Qwen3's `<think>`. A
teacher's, which the data do not hold, are left out: its logits end where the student's vocabulary ends. A token that
only the student has is refused: no probability would be learnt for it, while those of the others change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ddk_ds.data.manifest import SPLITS, Manifest
from ddk_ds.data.tokenizer import TokenizerInfo, fingerprint
from ddk_ds.errors import ConfigError, DataError

_SHOWN = 4


class SharedVocabulary(NamedTuple):
    """The ids below `size`, which are in the loss, and the ids of the added tokens that are not."""

    size: int
    left_out: dict[str, int]

    @property
    def note(self) -> str:
        """Return a sentence that names the tokens left out, or ""."""
        if not self.left_out:
            return ""
        shown = ", ".join(f"{token} ({number})" for token, number in list(self.left_out.items())[:_SHOWN])
        more = f" and {len(self.left_out) - _SHOWN} more" if len(self.left_out) > _SHOWN else ""
        return (
            f"added tokens left out: {len(self.left_out)} that not both models have, {shown}{more}; the data do not "
            f"hold them, and all probabilities are over the {self.size:,} tokens before them"
        )


def base_fingerprint(info: TokenizerInfo, size: int) -> str:
    """Return the fingerprint of a tokenizer without its added tokens from the id `size` on."""
    return fingerprint(_base(info, size))


def _base(info: TokenizerInfo, size: int) -> dict[str, int]:
    return {token: number for token, number in info.vocab.items() if number < size or token not in info.added}


def shared_vocabulary(
    ours: TokenizerInfo, student_rows: int | None, theirs: TokenizerInfo | None, pair: str
) -> SharedVocabulary:
    """Return the vocabulary that a run's models share.

    Args:
        ours: the student's tokenizer.
        student_rows: rows of the student's head; a tokenizer can have added tokens beyond them, as Gemma 3's does.
        theirs: the teacher's tokenizer, None without a teacher.
        pair: names the models in messages.

    Raises:
        ConfigError: the vocabularies differ in anything but added tokens at the teacher's end.
    """
    size = min(ours.vocab_size, student_rows or ours.vocab_size)
    mine = _base(ours, size)
    others = mine if theirs is None else _base(theirs, size)
    differing = sorted(
        (mine.get(token, others.get(token, 0)), token)
        for token in mine.keys() | others.keys()
        if mine.get(token) != others.get(token)
    )
    if differing:
        token = differing[0][1]
        raise ConfigError(
            f"{pair}: their vocabularies differ in {len(differing)} tokens, the first is {token!r} with id "
            f"{mine.get(token)} in the student and {others.get(token)} in the teacher; distillation compares logits by "
            "id, and only added tokens of the teacher after the student's last one can be left out, so choose a pair "
            "that shares one tokenizer"
        )
    if max(mine.values()) >= size:
        raise ConfigError(f"{pair}: the student's head has {size:,} rows, its tokenizer {ours.vocab_size:,} tokens")
    beyond = {**({} if theirs is None else theirs.vocab), **ours.vocab}
    left_out = sorted((number, token) for token, number in beyond.items() if number >= size)
    return SharedVocabulary(size, {token: number for number, token in left_out})


def check_use(shared: SharedVocabulary, manifest: Manifest, names: Sequence[str]) -> None:
    """Raise DataError if a domain of `names` holds a token that is left out.

    Data of earlier versions do not say their largest id; there a sample with such a token ends the run when it is read.
    """
    tokens = {number: token for token, number in shared.left_out.items()}
    for name in names:
        for split in SPLITS:
            largest = getattr(manifest.domains[name], split).largest_id
            if largest >= shared.size:
                raise DataError(
                    f"domain {name!r} of {manifest.root} holds the token {tokens.get(largest)!r} (id {largest}), which "
                    f"not both models have: prepare the data with the student's tokenizer, or take texts with the "
                    "token out of them"
                )
