"""What a frozen teacher says of one sample, and its columns in a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

_AS_THEY_ARE = ("ndarray:float32",)
Floats = npt.NDArray[np.float32]


class Drawn(NamedTuple):
    """Tokens drawn from a teacher's softmax at the L positions of one sample."""

    ids: npt.NDArray[np.int64]
    """(L, draws), ascending in each row, a token as often as it was drawn."""
    entropy: Floats
    """(L,), of the softmax that the ids were drawn from."""
    label_log_probs: Floats
    """(L,) log-probability of the sample's next token at temperature 1; 0 at the last position, which has none."""


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


class DrawnTokens:
    """Stores tokens that were drawn from a softmax: each distinct one once, and a bit a draw that says if it is new."""

    columns: ClassVar = {
        "new": "bytes",
        "ids": "bytes",
        "entropy": "ndarray:float32",
        "label_log_probs": "ndarray:float32",
    }
    """MDS columns of a sample."""

    def __init__(self, draws: int, vocab_size: int) -> None:
        self._draws, self._ids = draws, PackedIds(vocab_size)

    def encoded(self, said: Said) -> dict[str, Any]:
        """Return the values of `columns`. Raises ValueError if the teacher has said what is no number."""
        assert isinstance(said, Drawn)
        _check_finite(said.entropy, said.label_log_probs)
        new = np.ones(said.ids.shape, bool)
        new[:, 1:] = said.ids[:, 1:] != said.ids[:, :-1]
        ids = self._ids.packed(said.ids[new])
        packed = np.packbits(new).tobytes()
        return {"new": packed, "ids": ids, "entropy": said.entropy, "label_log_probs": said.label_log_probs}

    def decoded(self, record: Mapping[str, Any]) -> Drawn:
        """Return what a record says. Raises ValueError if it cannot be."""
        entropy = record["entropy"]
        count = len(entropy) * self._draws
        if len(record["new"]) != -(-count // 8):
            raise ValueError(f"{8 * len(record['new'])} draws at {len(entropy)} positions, not {self._draws} at each")
        new = np.unpackbits(np.frombuffer(record["new"], np.uint8), count=count)
        if not new[:: self._draws].all():
            raise ValueError("a position's first token is none of its own")
        places = np.cumsum(new, dtype=np.int64) - 1
        ids = self._ids.unpacked(record["ids"], int(new.sum()))
        return Drawn(ids[places].reshape(-1, self._draws), entropy, record["label_log_probs"])


class LikeliestTokens:
    """Stores the k likeliest tokens, their log-probabilities in bfloat16."""

    columns: ClassVar = {
        "ids": "bytes",
        "log_probs": "ndarray:uint16",
        "log_tail": "ndarray:float32",
        "label_log_probs": "ndarray:float32",
    }
    """MDS columns of a sample."""

    def __init__(self, k: int, vocab_size: int) -> None:
        self._k, self._ids = k, PackedIds(vocab_size)

    def encoded(self, said: Said) -> dict[str, Any]:
        """Return the values of `columns`. Raises ValueError if the teacher has said what is no number."""
        assert isinstance(said, Likeliest)
        _check_finite(said.log_probs, np.exp(said.log_tail), said.label_log_probs)
        halves = (said.log_probs.ravel().view(np.uint32) >> 16).astype(np.uint16)  # the others are 0
        ids = self._ids.packed(said.ids)
        return {"ids": ids, "log_probs": halves, "log_tail": said.log_tail, "label_log_probs": said.label_log_probs}

    def decoded(self, record: Mapping[str, Any]) -> Likeliest:
        """Return what a record says. Raises ValueError if it cannot be."""
        halves, log_tail = record["log_probs"], record["log_tail"]
        if halves.size != len(log_tail) * self._k:
            raise ValueError(f"{halves.size} log-probabilities at {len(log_tail)} positions, not {self._k} at each")
        ids = self._ids.unpacked(record["ids"], halves.size).reshape(-1, self._k)
        log_probs = (halves.astype(np.uint32) << 16).view(np.float32).reshape(-1, self._k)
        return Likeliest(ids, log_probs, log_tail, record["label_log_probs"])


def coding_of(conditions: Mapping[str, Any], vocab_size: int) -> DrawnTokens | LikeliestTokens:
    """Return the coding of a cache with these conditions."""
    if conditions["keep"] == "topk":
        return LikeliestTokens(int(conditions["top_k"]), vocab_size)
    return DrawnTokens(int(conditions["draws"]), vocab_size)


class Squeezed:
    """Compresses the columns of a record in a shard: ids and bits shrink, float32 numbers would not."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        """Make it for MDS columns; it serves one thread."""
        self.columns = {name: kind if kind in _AS_THEY_ARE else "bytes" for name, kind in columns.items()}
        """MDS columns of a compressed record."""
        self._kinds = {name: kind for name, kind in columns.items() if kind not in _AS_THEY_ARE}
        # A higher level saves 1 to 3 % more and takes 3 to 10 times as long.
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._decompressor = zstandard.ZstdDecompressor()

    def squeezed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of `columns` for a record."""
        return {**record, **{name: self._compressor.compress(_content(record[name])) for name in self._kinds}}

    def restored(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record that was squeezed. Raises ValueError if none was."""
        try:
            content = {name: self._decompressor.decompress(record[name]) for name in self._kinds}
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        numbers = {name: kind.partition(":")[2] for name, kind in self._kinds.items()}
        return {
            **record,
            **{name: np.frombuffer(content[name], kind) if kind else content[name] for name, kind in numbers.items()},
        }


def _content(value: Any) -> bytes:
    return value if isinstance(value, bytes) else value.tobytes()


def bytes_a_token(keep: str, number: int, vocab_size: int) -> float:
    """Return the most bytes that a cache takes for a token of text, with `number` draws or likeliest tokens of it.

    It is the size before compression.
    """
    beside = 16 if keep == "topk" else 1  # a log-probability, or the bit of a draw
    return number * (id_bits(vocab_size) + beside) / 8 + 2 * np.float32().nbytes


def _check_finite(*values: Floats) -> None:
    if not all(np.isfinite(part).all() for part in values):
        raise ValueError("what the teacher says of it is not finite")


def id_bits(vocab_size: int) -> int:
    """Return the number of bits of a token's id."""
    return max(1, (vocab_size - 1).bit_length())


class PackedIds:
    """Token ids with as many bits as the vocabulary needs, one behind the other, the lowest bit first."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._bits = vocab_size, id_bits(vocab_size)

    def packed(self, ids: npt.NDArray[np.int64]) -> bytes:
        """Return the bytes of ids of any shape. Raises ValueError if one is outside of the vocabulary."""
        self._check(ids)
        return pack(ids, self._bits).tobytes()

    def unpacked(self, packed: bytes, count: int) -> npt.NDArray[np.int64]:
        """Return the ids (count,). Raises ValueError if that is not what was packed."""
        if len(packed) != -(-count * self._bits // 8):
            raise ValueError(f"{len(packed)} bytes for {count} ids")
        ids = unpack(packed, self._bits)[:count]
        self._check(ids)
        return ids

    def _check(self, ids: npt.NDArray[np.int64]) -> None:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            wrong = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise ValueError(f"the id {wrong} is outside of the vocabulary of {self._vocab_size:,} tokens")


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
