"""What a look at prepared or adopted data finds: lengths, duplicates, frequent tokens, text. A sample of huge data.

Everything is a pure function of the data, the seed and the limits. Only shards that are read are hashed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_ds.data.adopt import sample_hashes
from ddk_ds.data.manifest import Manifest
from ddk_ds.data.mds import Packed, Split, open_split
from ddk_ds.data.store import Store
from ddk_ds.data.tokenizer import TokenizerInfo

MOST_TOKENS = 1 << 21
"""Tokens of a domain that are looked at, by default."""
_MOST_SHARDS = 8
_TOP = 20
_REPLACEMENT = "�"


@dataclass(frozen=True)
class DomainFacts:
    """The findings in one split of a domain.

    `numbers` (n,) are the samples that were looked at, of `samples` in `shards` shards. `lengths` (d,) are the tokens
    that each document has in a sample, without the `padding` of samples; None without borders. `duplicates` are those
    of the n samples that equal an earlier one. `top` are pairs (id, number of it). `text_bytes` and `characters` are
    those of the ordinary tokens' text, `replaced` of the characters stand for bytes that are no text. `targets` of the
    tokens are to be predicted.
    """

    name: str
    samples: int
    shards: int
    shards_read: int
    numbers: npt.NDArray[np.int64]
    tokens: int
    targets: int
    lengths: npt.NDArray[np.int64] | None
    padding: int
    duplicates: int
    top: list[tuple[int, int]]
    control: int
    text_bytes: int
    characters: int
    replaced: int
    examples: list[tuple[int, Packed]]

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of text (UTF-8) of an ordinary token."""
        return self.text_bytes / max(1, self.tokens - self.control - self.padding)

    @property
    def quantiles(self) -> list[float]:
        """Return the 5 %, 50 % and 95 % quantiles of `lengths`; [] if they are not known."""
        if self.lengths is None or not len(self.lengths):
            return []
        found: list[float] = np.quantile(self.lengths, [0.05, 0.5, 0.95], method="nearest").tolist()
        return found


class Piece(NamedTuple):
    """Tokens in a row that are shown alike: a text, or the name of one control token.

    `document` is the number of their document in the sample, 0 without borders; `target` is False where a model is not
    to predict them.
    """

    text: str
    document: int
    control: bool
    target: bool


def look(
    store: Store,
    manifest: Manifest,
    name: str,
    split: str,
    info: TokenizerInfo,
    *,
    examples: int,
    seed: int = 0,
    most_tokens: int = MOST_TOKENS,
) -> DomainFacts:
    """Look at about `most_tokens` tokens of a domain's split, in a few shards by chance; `examples` samples are kept.

    Raises DataError if a shard that is read is damaged.
    """
    opened = open_split(store, f"{name}/{split}", manifest.vocab_size)
    source = np.random.default_rng([seed, sum(name.encode()), len(opened)])
    numbers, shards_read = _chosen(opened, max(1, most_tokens // manifest.sequence_length), source)
    packed = [opened.packed(number) for number in numbers.tolist()]
    ids = np.stack([one.tokens for one in packed])
    counts = np.bincount(ids.ravel(), minlength=manifest.vocab_size)
    lengths, padding = _lengths(packed, padded=manifest.packing_of(name) == "best_fit")
    control = int(counts[sorted(number for number in info.text.controls if number < len(counts))].sum())
    shown = sorted(source.choice(len(numbers), min(examples, len(numbers)), replace=False).tolist())
    text_bytes = characters = replaced = 0
    for row in ids.tolist():
        text = info.tokenizer.decode(row, skip_special_tokens=True)
        text_bytes += len(text.encode())
        characters += len(text)
        replaced += text.strip(_REPLACEMENT).count(_REPLACEMENT)  # a sample's ends can cut a character
    order = np.argsort(-counts, kind="stable")[:_TOP]
    return DomainFacts(
        name=name,
        samples=len(opened),
        shards=len(opened.shards),
        shards_read=shards_read,
        numbers=numbers,
        tokens=ids.size,
        targets=sum(len(one.tokens) if one.targets is None else int(one.targets.sum()) for one in packed),
        lengths=lengths,
        padding=padding,
        duplicates=len(ids) - len(np.unique(sample_hashes(ids))),
        top=[(number, int(counts[number])) for number in order.tolist() if counts[number]],
        control=control - padding,
        text_bytes=text_bytes,
        characters=characters,
        replaced=replaced,
        examples=[(int(numbers[place]), packed[place]) for place in shown],
    )


def _chosen(opened: Split, most: int, source: np.random.Generator) -> tuple[npt.NDArray[np.int64], int]:
    """Return the numbers of at most `most` samples, sorted, and of how many shards they are."""
    first = np.cumsum(opened.shard_sizes) - opened.shard_sizes
    shards = np.arange(len(opened.shards))
    if len(opened) > most and len(shards) > _MOST_SHARDS:
        shards = np.sort(source.choice(shards, _MOST_SHARDS, replace=False))
    numbers = np.concatenate([first[shard] + np.arange(opened.shard_sizes[shard]) for shard in shards])
    if len(numbers) > most:
        numbers = np.sort(source.choice(numbers, most, replace=False))
    return numbers, len(shards)


def _lengths(packed: list[Packed], *, padded: bool) -> tuple[npt.NDArray[np.int64] | None, int]:
    """Return the lengths of documents in samples, and the number of tokens of padding."""
    found = [one.lengths for one in packed if one.lengths is not None]
    if not found:
        return None, 0
    lengths = np.concatenate(found).astype(np.int64)
    padding = (lengths == 1) if padded else np.zeros(len(lengths), bool)
    return lengths[~padding], int(padding.sum())


def pieces(packed: Packed, info: TokenizerInfo) -> Iterator[Piece]:
    """Yield a sample in pieces that are shown alike, in order; the text of a piece is that of its tokens together."""
    ids = packed.tokens.tolist()
    lengths = [len(ids)] if packed.lengths is None else packed.lengths.tolist()
    documents = np.repeat(np.arange(len(lengths)), lengths).tolist()
    targets = [True] * len(ids) if packed.targets is None else packed.targets.tolist()
    controls = info.text.controls

    def kind(place: int) -> tuple[int, int | None, bool]:
        return documents[place], place if ids[place] in controls else None, targets[place]

    for (document, control, target), places in groupby(range(len(ids)), kind):
        found = [ids[place] for place in places]
        text = info.tokenizer.decode(found, skip_special_tokens=False) if control is None else token_text(info, *found)
        yield Piece(text, document, control is not None, target)


def token_text(info: TokenizerInfo, number: int) -> str:
    """Return a token as text, by its name where it is a control token."""
    if number in info.text.controls:
        return str(info.tokenizer.id_to_token(number))
    return info.tokenizer.decode([number], skip_special_tokens=False)
