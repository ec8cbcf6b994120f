"""What a frozen teacher says of one sample, and its columns in a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt


class Said(NamedTuple):
    """A teacher's distributions at the L positions of one sample."""

    ids: npt.NDArray[np.int64]
    """(L, draws), ascending in each row."""
    entropy: npt.NDArray[np.float32]
    """(L,), of the softmax that the ids were drawn from."""


class DrawnTokens:
    """Stores tokens that were drawn from a softmax, with as many bits an id as the vocabulary needs."""

    columns: ClassVar = {"ids": "bytes", "entropy": "ndarray:float32"}
    """MDS columns of a sample."""

    def __init__(self, draws: int, vocab_size: int) -> None:
        self._draws, self._vocab_size, self._bits = draws, vocab_size, id_bits(vocab_size)

    def encoded(self, said: Said) -> dict[str, Any]:
        """Return the values of `columns`."""
        return {"ids": pack(said.ids, self._bits).tobytes(), "entropy": said.entropy}

    def decoded(self, record: Mapping[str, Any]) -> Said:
        """Return what a record says. Raises ValueError if it cannot be."""
        entropy = record["entropy"]
        count = len(entropy) * self._draws
        if len(record["ids"]) != -(-count * self._bits // 8):
            raise ValueError(f"{len(record['ids'])} bytes of ids for {len(entropy)} entropies")
        ids = unpack(record["ids"], self._bits)[:count].reshape(-1, self._draws)
        if int(ids.max(initial=0)) >= self._vocab_size:
            raise ValueError(f"the id {int(ids.max())} is outside of the vocabulary")
        return Said(ids, entropy)


def bytes_a_token(draws: int, vocab_size: int) -> float:
    """Return the bytes that a cache takes for a token of text."""
    return draws * id_bits(vocab_size) / 8 + np.float32().nbytes


def id_bits(vocab_size: int) -> int:
    """Return the number of bits of a token's id."""
    return max(1, (vocab_size - 1).bit_length())


def pack(ids: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    """Return the numbers with `bits` bits each, one behind the other, the lowest bit first."""
    groups = -(-ids.size // 8)  # eight numbers fill whole bytes
    columns = np.zeros((groups, 8), np.uint64)
    columns.ravel()[: ids.size] = ids.ravel()
    packed = np.zeros(groups * bits + 8, np.uint8)
    for column, first_bit in enumerate(range(0, 8 * bits, bits)):
        byte, shift = divmod(first_bit, 8)
        shifted = columns[:, column] << np.uint64(shift)
        for place in range(-(-(shift + bits) // 8)):
            first = byte + place
            packed[first : first + groups * bits : bits] |= (shifted >> np.uint64(8 * place)).astype(np.uint8)
    return packed[: -(-ids.size * bits // 8)]


def unpack(packed: bytes, bits: int) -> npt.NDArray[np.int64]:
    """Return the numbers (n,) that `pack` has packed, and up to 7 zeros behind them."""
    count = len(packed) * 8 // bits
    groups = -(-count // 8)
    padded = np.zeros(groups * bits + 8, np.uint8)
    padded[: len(packed)] = np.frombuffer(packed, np.uint8)
    ids = np.empty((groups, 8), np.int64)
    for column, first_bit in enumerate(range(0, 8 * bits, bits)):
        byte, shift = divmod(first_bit, 8)
        words: npt.NDArray[np.uint64] = np.ndarray(
            groups, "<u8", padded, byte, bits
        )  # eight bytes from every group's same place
        ids[:, column] = words >> np.uint64(shift) & np.uint64((1 << bits) - 1)
    return ids.ravel()[:count]
