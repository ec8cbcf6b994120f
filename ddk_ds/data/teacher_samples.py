"""What a frozen teacher says of one sample, and the bytes that are kept of it.

Bytes are made from numpy arrays. A micro-batch's are unpacked together, by torch on the device that needs the numbers:
a process that reads ahead only moves bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from ddk_ds.data.packed_ids import id_bits, pack, unpack

Floats = npt.NDArray[np.float32]
ToDevice = Callable[[torch.Tensor], torch.Tensor]


NO_LABEL = 1.0
"""What stands for a log-probability at a position without a label, and is none."""


class Drawn(NamedTuple):
    """Tokens drawn from a teacher's softmax at the L positions of one sample."""

    ids: npt.NDArray[np.int64]
    """(L, draws), ascending in each row, a token as often as it was drawn."""
    entropy: Floats
    """(L,), of the softmax that the ids were drawn from."""
    label_log_probs: Floats
    """(L,) log-probability of the sample's next token at temperature 1; 0 at the last position, which has none, and
    NO_LABEL at the last one of each other document if documents are kept apart."""


class Likeliest(NamedTuple):
    """The k likeliest tokens of a teacher at the L positions of one sample."""

    ids: npt.NDArray[np.int64]
    """(L, k)."""
    log_probs: Floats
    """(L, k), at the loss's temperature, with no more digits than bfloat16 has."""
    log_tail: Floats
    """(L,) log of the probability of all other tokens together."""
    label_log_probs: Floats
    """(L,), as in `Drawn`."""


Said = Drawn | Likeliest
Record = bytes | memoryview
"""Bytes that are kept of a sample."""


class Counted(NamedTuple):
    """Distinct tokens among the draws at n positions."""

    ids: torch.Tensor
    """(n, w) int64, ascending, each token of a row once; -1 after a row's last one."""
    counts: torch.Tensor
    """(n, w) int64, how often each was drawn; 0 after a row's last one."""
    entropy: torch.Tensor
    """(n,) float32."""


class Top(NamedTuple):
    """A top k of n positions; `Likeliest` says more."""

    ids: torch.Tensor
    """(n, k) int64."""
    log_probs: torch.Tensor
    """(n, k) float32."""
    log_tail: torch.Tensor
    """(n,) float32."""


class _Parts(NamedTuple):
    """The parts of a sample's bytes: two numbers, two parts that are compressed, and two floats for each position."""

    numbers: tuple[int, int]
    small: tuple[bytes, bytes]
    floats: npt.NDArray[np.float32]


def _joined(parts: _Parts) -> bytes:
    # A higher level saves 1 to 3 % more and takes 3 to 10 times as long.
    small = [zstandard.ZstdCompressor(level=3).compress(part) for part in parts.small]
    head = np.array([*parts.numbers, *map(len, small)], "<u4").tobytes()
    return b"".join([head, parts.floats.astype("<f4").tobytes(), *small])


def _split(record: Record, length: int) -> _Parts:
    """Return the parts of a sample of so many positions. Raises ValueError if they are not there."""
    view = memoryview(record)
    if len(view) < 16:
        raise ValueError(f"{len(view)} bytes")
    first, second, *lengths = np.frombuffer(view[:16], "<u4").tolist()
    floats = view[16 : 16 + 8 * length]
    ends = 16 + 8 * length + np.cumsum(lengths)
    if len(view) != ends[1]:
        raise ValueError(f"{len(view)} bytes, not {ends[1]} for {length} positions")
    try:
        small = [zstandard.decompress(part) for part in (view[16 + 8 * length : ends[0]], view[ends[0] :])]
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return _Parts((first, second), (small[0], small[1]), np.frombuffer(floats, "<f4").reshape(2, length))


def _checked(name: str, part: bytes, wanted: int) -> bytes:
    if len(part) != wanted:
        raise ValueError(f"{len(part)} bytes of {name}, not {wanted}")
    return part


class DrawnTokens:
    """Stores tokens that were drawn from a softmax: each distinct one once, and a bit a draw that says if it is new."""

    def __init__(self, draws: int, vocab_size: int) -> None:
        self._draws, self._vocab_size, self._bits = draws, vocab_size, id_bits(vocab_size)

    def encoded(self, said: Said) -> bytes:
        """Return what is kept of a sample. Raises ValueError if the teacher has said what can't be."""
        assert isinstance(said, Drawn)
        _check(said, self._vocab_size, said.entropy)
        new = np.ones(said.ids.shape, bool)
        new[:, 1:] = said.ids[:, 1:] != said.ids[:, :-1]
        ids = pack(said.ids[new], self._bits)
        numbers = (int(new.sum()), int(new.sum(1).max(initial=0)))
        return _joined(_Parts(numbers, (np.packbits(new).tobytes(), ids), np.stack([said.entropy, said[-1]])))

    def unpacked(self, records: Sequence[Record], length: int, to_device: ToDevice) -> Counted:
        """Return what is kept of samples of `length` positions each, n of them together.

        `to_device` moves bytes to where the result is wanted. Raises ValueError if a record is none of this coding.
        """
        parts, draws = [_split(record, length) for record in records], self._draws
        of_ids = [_checked("ids", part.small[1], -(-part.numbers[0] // 8) * self._bits) for part in parts]
        unpacked = unpack(to_device(_tensor(of_ids)), self._bits).split([8 * len(one) // self._bits for one in of_ids])
        ids = torch.cat([one[: part.numbers[0]] for one, part in zip(unpacked, parts, strict=True)])
        # Found here: a device would have to tell how many there are.
        new = [_ones(_checked("draws", part.small[0], -(-length * draws // 8)), length * draws) for part in parts]
        begins = np.concatenate([places + number * length * draws for number, places in enumerate(new)])
        if len(begins) != len(ids):
            raise ValueError(f"{len(begins)} tokens are new, and {len(ids)} ids are there")
        starts = to_device(torch.from_numpy(begins))
        end = len(records) * length * draws
        counts = torch.diff(starts, append=starts.new_full((1,), end))
        # The place in `ids` of the first one of each position, and of the one after the last.
        firsts = torch.searchsorted(starts, torch.arange(0, end + 1, draws, device=ids.device))
        width = max(part.numbers[1] for part in parts)
        moves = torch.arange(0, (len(firsts) - 1) * width, width, device=ids.device) - firsts[:-1]
        at = torch.arange(len(ids), device=ids.device)
        at += moves.repeat_interleave(firsts.diff(), output_size=len(ids))
        wide_ids, wide_counts = (ids.new_full(((len(firsts) - 1) * width,), value) for value in (-1, 0))
        entropy = to_device(torch.from_numpy(np.concatenate([part.floats[0] for part in parts])))
        return Counted(
            wide_ids.scatter_(0, at, ids).view(-1, width), wide_counts.scatter_(0, at, counts).view(-1, width), entropy
        )


def _ones(packed: bytes, count: int) -> npt.NDArray[np.int64]:
    """Return the places of the ones among so many bits."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8), count=count).view(bool))


class LikeliestTokens:
    """Stores the k likeliest tokens, their log-probabilities in bfloat16."""

    def __init__(self, k: int, vocab_size: int) -> None:
        self._k, self._vocab_size, self._bits = k, vocab_size, id_bits(vocab_size)

    def encoded(self, said: Said) -> bytes:
        """Return what is kept of a sample. Raises ValueError if the teacher has said what can't be."""
        assert isinstance(said, Likeliest)
        _check(said, self._vocab_size, said.log_probs, np.exp(said.log_tail))
        halves = (said.log_probs.ravel().view(np.uint32) >> 16).astype("<u2")  # the others are 0
        floats = np.stack([said.log_tail, said.label_log_probs])
        return _joined(_Parts((said.ids.size, self._k), (pack(said.ids, self._bits), halves.tobytes()), floats))

    def unpacked(self, records: Sequence[Record], length: int, to_device: ToDevice) -> Top:
        """Return what is kept of samples; as `DrawnTokens.unpacked`."""
        parts, count = [_split(record, length) for record in records], length * self._k
        of_ids = [_checked("ids", part.small[0], -(-count // 8) * self._bits) for part in parts]
        halves = [_checked("log-probabilities", part.small[1], 2 * count) for part in parts]
        ids = unpack(to_device(_tensor(of_ids)), self._bits).view(len(parts), -1)[:, :count]
        log_probs = to_device(_tensor(halves)).view(torch.bfloat16).float()
        log_tail = to_device(torch.from_numpy(np.concatenate([part.floats[0] for part in parts])))
        return Top(ids.reshape(-1, self._k), log_probs.view(-1, self._k), log_tail)


def _tensor(parts: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)


def coding_of(conditions: Mapping[str, Any], vocab_size: int) -> DrawnTokens | LikeliestTokens:
    """Return the coding of a cache with these conditions."""
    if conditions["keep"] == "topk":
        return LikeliestTokens(int(conditions["top_k"]), vocab_size)
    return DrawnTokens(int(conditions["draws"]), vocab_size)


def bytes_a_token(keep: str, number: int, vocab_size: int) -> float:
    """Return the most bytes that a cache takes for a token of text, with `number` draws or likeliest tokens of it.

    It is the size before compression.
    """
    beside = 16 if keep == "topk" else 1  # a log-probability, or the bit of a draw
    distinct = min(number, vocab_size)
    return (distinct * id_bits(vocab_size) + number * beside) / 8 + 2 * np.float32().nbytes


def _check(said: Said, vocab_size: int, *values: Floats) -> None:
    """Raise ValueError if an id is outside of the vocabulary, or one of the numbers is not finite."""
    if not all(np.isfinite(part).all() for part in (*values, said.label_log_probs)):
        raise ValueError("what the teacher says of it is not finite")
    ids = said.ids
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(f"the id {wrong} is outside of the vocabulary of {vocab_size:,} tokens")
