"""What is kept of a sample: it comes back as it was, in the bytes that the planner counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from ddk_ds.data.packed_ids import id_bits
from ddk_ds.data.teacher_samples import (
    Counted,
    Drawn,
    DrawnTokens,
    Likeliest,
    LikeliestTokens,
    bytes_a_token,
    coding_of,
)
from tests.kept import said_of

VOCAB, LENGTH = 151_646, 8
RNG = np.random.default_rng(3)
HEAD = 16 + 2 * 4 * LENGTH


def floats(*shape: int) -> Any:
    return -RNG.random(shape).astype(np.float32)


def drawn(draws: int, among: int, vocab: int = VOCAB) -> Drawn:
    """Return draws from the last `among` tokens."""
    ids = np.sort(RNG.integers(vocab - among, vocab, (LENGTH, draws)), 1)
    return Drawn(ids, floats(LENGTH), floats(LENGTH))


def likeliest(k: int) -> Likeliest:
    ids = np.stack([RNG.permutation(VOCAB)[:k] for _ in range(LENGTH)])
    log_probs = torch.from_numpy(10 * floats(LENGTH, k)).bfloat16().float().numpy()
    return Likeliest(ids, log_probs, floats(LENGTH), floats(LENGTH))


def frames(record: bytes) -> list[bytes]:
    """Return the two compressed parts, by the lengths in the head, as zstandard's own command reads them."""
    first, second = np.frombuffer(record[8:16], "<u4").tolist()
    assert len(record) == HEAD + first + second
    return [zstandard.decompress(part) for part in (record[HEAD : HEAD + first], record[HEAD + first :])]


@pytest.mark.parametrize("draws", [1, 3, 64, 250])
@pytest.mark.parametrize("among", [1, 5, VOCAB])
def test_draws_come_back(draws: int, among: int) -> None:
    said, coding = drawn(draws, among), DrawnTokens(draws, VOCAB)
    back = said_of(coding, coding.encoded(said), LENGTH)
    assert back.ids.dtype == np.int64 and all(map(np.array_equal, back, said))


@pytest.mark.parametrize("draws", [5, 40])
def test_samples_are_unpacked_together(draws: int) -> None:
    """By Python's own counting; samples of other widths fill up with none."""
    coding = DrawnTokens(draws, VOCAB)
    samples = [drawn(draws, among) for among in (VOCAB, 3, 1)]
    records = [coding.encoded(said) for said in samples]
    rows = [dict(zip(*np.unique(row, return_counts=True), strict=True)) for said in samples for row in said.ids]
    moved: list[torch.dtype] = []

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.dtype)
        return tensor

    whole = coding.unpacked(records, LENGTH, to_device)
    assert isinstance(whole, Counted) and set(moved) == {torch.uint8, torch.float32, torch.int64}
    assert whole.ids.shape == whole.counts.shape == (3 * LENGTH, max(map(len, rows)))
    for ids, counts, row in zip(whole.ids.tolist(), whole.counts.tolist(), rows, strict=True):
        rest = len(ids) - len(row)
        assert ids == [*row, *[-1] * rest] and counts == [*row.values(), *[0] * rest]
    assert np.array_equal(whole.entropy.numpy(), np.concatenate([said.entropy for said in samples]))


def test_65_535_draws_come_back() -> None:
    said, coding = drawn(65_535, 700, 701), DrawnTokens(65_535, 701)
    assert all(map(np.array_equal, said_of(coding, coding.encoded(said), LENGTH), said))


@pytest.mark.parametrize("k", [1, 7, 64])
def test_the_likeliest_come_back(k: int) -> None:
    said, coding = likeliest(k), LikeliestTokens(k, VOCAB)
    record = coding.encoded(said)
    back = said_of(coding, record, LENGTH)
    assert back.ids.dtype == np.int64 and all(map(np.array_equal, back, said))
    halves = torch.from_numpy(said.log_probs).bfloat16().view(torch.int16).numpy()
    assert frames(record)[1] == halves.tobytes(), "bfloat16 as torch has it"
    two = coding.unpacked([record, coding.encoded(likeliest(k))], LENGTH, lambda tensor: tensor)
    assert np.array_equal(two.ids[:LENGTH].numpy(), said.ids) and two.log_tail.shape == (2 * LENGTH,)


def test_bytes_of_a_token_of_qwen() -> None:
    """64 x (18 + 1) bits of draws, or 64 x (18 + 16) of a top k, and two numbers in float32."""

    def stored(record: bytes) -> float:
        return (HEAD - 16 + sum(map(len, frames(record)))) / LENGTH

    distinct = Drawn(np.arange(LENGTH * 64).reshape(LENGTH, 64), floats(LENGTH), floats(LENGTH))
    assert stored(DrawnTokens(64, VOCAB).encoded(distinct)) == 160 == bytes_a_token("sampled", 64, VOCAB)
    assert stored(LikeliestTokens(64, VOCAB).encoded(likeliest(64))) == 280 == bytes_a_token("topk", 64, VOCAB)
    # Of 64 draws that are 20 tokens: 64 bits, 20 ids, and the two numbers.
    few = np.sort(np.concatenate([np.arange(20), RNG.integers(0, 20, 44)]))
    twenty = Drawn(np.tile(few, (LENGTH, 1)), floats(LENGTH), floats(LENGTH))
    assert stored(DrawnTokens(64, VOCAB).encoded(twenty)) == 8 + 20 * 18 / 8 + 8
    assert bytes_a_token("sampled", 65_535, 512) == 512 * 9 / 8 + 65_535 / 8 + 8, "no more ids than there are tokens"


@pytest.mark.parametrize("draws", [True, False])
def test_a_record_that_cannot_be_is_refused(draws: bool) -> None:
    coding = coding_of({"keep": "sampled", "draws": 5} if draws else {"keep": "topk", "top_k": 5}, VOCAB)
    record = coding.encoded(drawn(5, 9) if draws else likeliest(5))
    other = coding_of({"keep": "sampled", "draws": 50} if draws else {"keep": "topk", "top_k": 50}, VOCAB)
    for wrong, reader, length, message in (
        (record[:-1], coding, LENGTH, "bytes, not"),
        (record[:9], coding, LENGTH, "9 bytes"),
        (record, coding, LENGTH + 1, "bytes, not"),
        (record, other, LENGTH, "bytes of"),
        (record[:HEAD] + b"no zstd" + record[HEAD + 7 :], coding, LENGTH, "frame header"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.unpacked([wrong], length, lambda tensor: tensor)


def test_ids_have_the_bits_that_the_vocabulary_needs() -> None:
    assert [id_bits(size) for size in (1, 2, 3, 65_536, 65_537, VOCAB)] == [1, 1, 2, 16, 17, 18]


def test_the_first_id_outside_of_the_vocabulary_is_named() -> None:
    coding, said = DrawnTokens(3, VOCAB), Drawn(np.zeros((1, 3), np.int64), floats(1), floats(1))
    for ids, message in (
        ([0, VOCAB, -1], "the id 151646 is outside of the vocabulary of 151,646 tokens"),
        ([0, -1, VOCAB], "the id -1 is"),
    ):
        with pytest.raises(ValueError, match=message):
            coding.encoded(said._replace(ids=np.array([ids])))
