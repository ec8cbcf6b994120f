"""What is stored of a sample: it comes back as it was, in the bytes that the planner counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from ddk_ds.data.teacher_samples import (
    Drawn,
    DrawnTokens,
    Likeliest,
    LikeliestTokens,
    PackedIds,
    Squeezed,
    bytes_a_token,
    coding_of,
    id_bits,
    pack,
    unpack,
)

VOCAB, LENGTH = 151_646, 8
RNG = np.random.default_rng(3)


def floats(*shape: int) -> Any:
    return -RNG.random(shape).astype(np.float32)


def drawn(draws: int, among: int) -> Drawn:
    """Return draws from the last `among` tokens."""
    ids = np.sort(RNG.integers(VOCAB - among, VOCAB, (LENGTH, draws)), 1)
    return Drawn(ids, floats(LENGTH), floats(LENGTH))


def likeliest(k: int) -> Likeliest:
    ids = np.stack([RNG.permutation(VOCAB)[:k] for _ in range(LENGTH)])
    log_probs = torch.from_numpy(10 * floats(LENGTH, k)).bfloat16().float().numpy()
    return Likeliest(ids, log_probs, floats(LENGTH), floats(LENGTH))


def stored_bytes(record: dict[str, Any]) -> int:
    return sum(memoryview(value).nbytes for value in record.values())


@pytest.mark.parametrize("draws", [1, 3, 64, 250])
@pytest.mark.parametrize("among", [1, 5, VOCAB])
def test_draws_come_back(draws: int, among: int) -> None:
    said, coding = drawn(draws, among), DrawnTokens(draws, VOCAB)
    back = coding.decoded(coding.encoded(said))
    assert back.ids.dtype == np.int64 and all(map(np.array_equal, back, said))


@pytest.mark.parametrize("k", [1, 7, 64])
def test_the_likeliest_come_back(k: int) -> None:
    said, coding = likeliest(k), LikeliestTokens(k, VOCAB)
    record = coding.encoded(said)
    back = coding.decoded(record)
    assert back.ids.dtype == np.int64 and all(map(np.array_equal, back, said))
    halves = torch.from_numpy(said.log_probs).bfloat16().view(torch.int16).numpy().ravel()
    assert np.array_equal(record["log_probs"].view(np.int16), halves), "bfloat16 as torch has it"


def test_bytes_of_a_token_of_qwen() -> None:
    """64 x (18 + 1) bits of draws, or 64 x (18 + 16) of a top k, and two numbers in float32."""
    distinct = Drawn(np.arange(LENGTH * 64).reshape(LENGTH, 64), floats(LENGTH), floats(LENGTH))
    assert stored_bytes(DrawnTokens(64, VOCAB).encoded(distinct)) / LENGTH == 160 == bytes_a_token("sampled", 64, VOCAB)
    found = stored_bytes(LikeliestTokens(64, VOCAB).encoded(likeliest(64))) / LENGTH
    assert found == 280 == bytes_a_token("topk", 64, VOCAB)
    # Of 64 draws that are 20 tokens: 64 bits, 20 ids, and the two numbers.
    few = np.sort(np.concatenate([np.arange(20), RNG.integers(0, 20, 44)]))
    twenty = Drawn(np.tile(few, (LENGTH, 1)), floats(LENGTH), floats(LENGTH))
    assert stored_bytes(DrawnTokens(64, VOCAB).encoded(twenty)) / LENGTH == 8 + 20 * 18 / 8 + 8


@pytest.mark.parametrize("said", [drawn(64, 20), likeliest(64)], ids=["draws", "likeliest"])
def test_a_record_is_squeezed_and_comes_back(said: Drawn | Likeliest) -> None:
    """As zstandard's own command reads it; what it is not made of is refused."""
    coding: Any = DrawnTokens(64, VOCAB) if isinstance(said, Drawn) else LikeliestTokens(64, VOCAB)
    squeezed = Squeezed(coding.columns)
    record = coding.encoded(said)
    small = squeezed.squeezed({"domain": "web", **record})
    assert zstandard.decompress(small["ids"]) == record["ids"] and small["label_log_probs"] is record["label_log_probs"]
    assert small.keys() == {"domain", *squeezed.columns}
    assert all(map(np.array_equal, coding.decoded(squeezed.restored(small)), said))
    with pytest.raises(ValueError, match="frame header"):
        squeezed.restored({**small, "ids": record["ids"]})


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("ids", lambda ids: ids[:-1]),
        ("ids", lambda ids: b"\xff" * len(ids)),
        ("new", lambda new: new[:-1]),
        ("new", lambda new: b"\0" + new[1:]),
        ("log_probs", lambda log_probs: log_probs[:-1]),
        ("log_tail", lambda log_tail: log_tail[:-1]),
    ],
)
def test_a_record_that_cannot_be_is_refused(key: str, change: Any) -> None:
    draws = key == "new"
    conditions = {"keep": "sampled", "draws": 5} if draws else {"keep": "topk", "top_k": 5}
    coding = coding_of(conditions, VOCAB)
    record = coding.encoded(drawn(5, 9) if draws else likeliest(5))
    with pytest.raises(ValueError, match=r"bytes for|outside of the vocabulary|at each|none of its own"):
        coding.decoded({**record, key: change(record[key])})


def test_ids_have_the_bits_that_the_vocabulary_needs() -> None:
    assert [id_bits(size) for size in (1, 2, 3, 65_536, 65_537, VOCAB)] == [1, 1, 2, 16, 17, 18]
    ids = RNG.integers(0, 1 << 17, 100)
    found = unpack(pack(ids, 17).tobytes(), 17)
    assert np.array_equal(found[:100], ids) and len(found) <= 107 and not found[100:].any()


def test_the_first_id_outside_of_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="the id 151646 is outside of the vocabulary of 151,646 tokens"):
        PackedIds(VOCAB).packed(np.array([0, VOCAB, -1]))
    with pytest.raises(ValueError, match="the id -1 is"):
        PackedIds(VOCAB).packed(np.array([0, -1, VOCAB]))
