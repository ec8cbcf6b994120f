"""Packing and the choice of held-out documents, on plain arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_ds.data import spooled
from ddk_ds.data.held_out import HeldOut, choose_validation
from ddk_ds.data.mds import pack, pack_lengths, token_dtype
from ddk_ds.data.reading import Spool
from ddk_ds.data.spooled import Spooled, Stretch


@pytest.mark.parametrize("sequence_length", [1, 4, 7, 100, 101])
def test_samples_are_the_joined_documents_cut_at_every_length(sequence_length: int) -> None:
    source = np.random.default_rng(0)
    documents = [source.integers(0, 60_000, size, dtype=np.uint16) for size in (3, 1, 50, 8, 20, 2, 16)]
    joined = np.concatenate(documents)
    samples = list(pack(documents, sequence_length))
    assert len(samples) == 100 // sequence_length
    assert all(sample.shape == (sequence_length,) and sample.dtype == np.uint16 for sample in samples)
    packed = np.concatenate(samples) if samples else joined[:0]
    np.testing.assert_array_equal(packed, joined[: len(samples) * sequence_length])


def test_a_document_that_fills_a_sample_is_one() -> None:
    full = np.arange(4, dtype=np.uint16)
    assert [sample.tolist() for sample in pack([full], 4)] == [[0, 1, 2, 3]]
    assert [sample.tolist() for sample in pack([full[:3], full[3:], full[:1]], 4)] == [[0, 1, 2, 3]]


def test_ids_are_as_narrow_as_the_vocabulary_allows() -> None:
    """The largest id of a vocabulary of 65,536 is 65,535, which is that of uint16."""
    assert [token_dtype(size) for size in (65_535, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def chosen(keys: np.ndarray, lengths: np.ndarray, chunk: int = 7, **rule: float) -> np.ndarray:  # type: ignore[type-arg]
    """Choose held-out documents from chunks and return one mask (n,) over all documents."""
    starts = range(0, len(keys), chunk)
    held_out = choose_validation(((keys[i : i + chunk], lengths[i : i + chunk]) for i in starts), **rule)  # type: ignore[arg-type]
    return np.concatenate([held_out.mask(keys[i : i + chunk], i) for i in starts])


def test_held_out_documents_are_the_smallest_keys_in_any_order_and_chunks() -> None:
    source = np.random.default_rng(1)
    keys = source.integers(0, 2**63, 500).astype(np.uint64) * np.uint64(2)
    lengths = source.integers(1, 40, 500)
    held_out = chosen(keys, lengths, min_tokens=1000)
    assert keys[held_out].max() < keys[~held_out].min()
    last = keys == keys[held_out].max()
    assert 1000 <= lengths[held_out].sum() < 1000 + int(lengths[last].item())
    order = source.permutation(500)
    for chunk in (1, 100, 1000):
        np.testing.assert_array_equal(chosen(keys[order], lengths[order], chunk, min_tokens=1000), held_out[order])


def test_the_first_documents_of_equal_keys_are_held_out() -> None:
    keys = np.array([5, 9, 5, 5, 9, 1], np.uint64)
    mask = chosen(keys, np.full(6, 10), chunk=2, min_tokens=25)
    assert mask.tolist() == [True, False, True, False, False, True]
    mask = chosen(keys, np.full(6, 10), chunk=2, min_tokens=20)  # two documents have just as many
    assert mask.tolist() == [True, False, False, False, False, True]


def test_too_few_tokens_hold_everything_out() -> None:
    assert chosen(np.arange(3, dtype=np.uint64), np.ones(3, np.int64), min_tokens=10).all()
    largest = np.full(2, 2**64 - 1, np.uint64)
    assert chosen(largest, np.ones(2, np.int64), min_tokens=10).all()


def test_no_documents_hold_nothing_out() -> None:
    assert choose_validation([], min_tokens=10) == HeldOut(0)


def test_a_key_alone_holds_out_what_is_below_it() -> None:
    assert HeldOut(5).mask(np.array([5, 4, 5, 6], np.uint64), 0).tolist() == [False, True, False, False]


def test_a_fraction_holds_out_that_share_of_the_keys_range() -> None:
    keys = (np.arange(1000, dtype=np.float64) / 1000 * 2.0**64).astype(np.uint64)
    held_out = chosen(keys, np.ones(1000, np.int64), fraction=0.1)
    np.testing.assert_array_equal(np.flatnonzero(held_out), np.arange(100))


def filled(
    folder: Path, lengths: list[list[int]], open_ends: list[bool], name: str = "code", seed: int = 7
) -> tuple[Spool, list[list[int]], list[int]]:
    """Return a spool, and the ids and keys of its documents: a batch for each list of part lengths.

    `open_ends`: True where the batch's last part goes on in the next batch.
    """
    spool, source, documents, keys = Spool(folder, name, "uint16"), np.random.default_rng(seed), [], []
    current: list[int] = []
    for parts, open_end in zip(lengths, open_ends, strict=True):
        closes = np.array([True] * (len(parts) - 1) + [not open_end])
        ids = source.integers(0, 60_000, sum(parts)).astype(np.uint16)
        ended, first = [], 0
        for part, closed in zip(parts, closes.tolist(), strict=True):
            current += ids[first : first + part].tolist()
            first += part
            if closed:
                ended.append(current)
                current = []
        digests = [source.bytes(16) for _ in ended]
        keys += [int.from_bytes(digest[:8], "big") for digest in digests]
        spool.append(ids, np.array(parts), closes, digests, [10 * len(document) for document in ended])
        documents += ended
    return spool, documents, keys


# Two batches, then a document in three parts over three batches, and one that ends with them.
BATCHES = [[3, 1, 4], [5], [2, 6], [7], [1, 3]]
OPEN = [False, False, True, True, False]


@pytest.mark.parametrize(("records", "ids"), [(1 << 16, 1 << 20), (2, 3), (1, 1)])
def test_a_spool_gives_back_each_splits_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: int, ids: int
) -> None:
    """Whatever the number of records and ids that are read at a time."""
    monkeypatch.setattr(spooled, "_RECORDS", records)
    monkeypatch.setattr(spooled, "_IDS", ids)
    spool, documents, keys = filled(tmp_path, BATCHES, OPEN)
    assert [len(document) for document in documents] == [3, 1, 4, 5, 2, 14, 3]
    assert (spool.num_documents, spool.num_tokens) == (7, 32)
    spool.sync()
    held = list(spool.records())
    assert [first for first, _ in held] == list(range(0, 7, records))
    joined = np.concatenate([chunk for _, chunk in held])
    assert joined["key"].tolist() == keys and joined["tokens"].tolist() == list(map(len, documents))
    assert joined["bytes"].tolist() == [10 * len(document) for document in documents]
    for border in (0, sorted(keys)[3], 2**64 - 1):
        held_out = HeldOut(border, last=-1)
        for validation in (False, True):
            pieces = list(spool.ids(held_out, validation=validation))
            expected = [
                x
                for document, key in zip(documents, keys, strict=True)
                if (key < border) == validation
                for x in document
            ]
            assert [x for piece in pieces for x in piece.tolist()] == expected
            assert all(0 < len(piece) <= ids for piece in pieces)
    spool.remove()
    assert list(tmp_path.iterdir()) == []
    spool.remove()  # somebody was faster


def test_a_spool_that_is_opened_again_is_cut_to_what_was_finished(tmp_path: Path) -> None:
    spool, documents, keys = filled(tmp_path, BATCHES[:2], OPEN[:2])
    spool.close()
    spool = Spool(tmp_path, "code", "uint16", num_documents=2, num_tokens=4)
    part = np.array([9, 8], np.uint16)
    spool.append(part, np.array([2]), np.array([True]), [(5).to_bytes(8, "big") + bytes(8)], [7])
    assert (spool.num_documents, spool.num_tokens) == (3, 6)
    spool.sync()
    ((first, chunk),) = spool.records()
    assert first == 0 and chunk["key"].tolist() == [*keys[:2], 5] and chunk["tokens"].tolist() == [3, 1, 2]
    read = [x for piece in spool.ids(HeldOut(0), validation=False) for x in piece.tolist()]
    assert read == [*documents[0], *documents[1], 9, 8]
    spool.close()


@pytest.mark.parametrize("records", [1 << 16, 1])
def test_a_stretch_of_a_split_is_that_of_the_joined_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: int
) -> None:
    """All stretches of a split that lies in four pairs of files, one of which has no document."""
    monkeypatch.setattr(spooled, "_RECORDS", records)
    documents: list[list[int]] = []
    keys: list[int] = []
    for name in ("a", "b", "c", "d"):
        spool, added, added_keys = filled(tmp_path, BATCHES, OPEN, name, seed=len(keys))
        spool.close()
        documents, keys = documents + added, keys + added_keys
    Spool(tmp_path, "empty", "uint16").close()
    joined = Spooled([tmp_path / name for name in ("a", "b", "empty", "c", "d")], "uint16")
    held_out = HeldOut(sorted(keys)[12])
    for validation in (False, True):
        own = [document for document, key in zip(documents, keys, strict=True) if (key < held_out.key) == validation]
        ids = [(number, x) for number, document in enumerate(own) for x in document]
        starts = joined.starts(held_out, validation=validation)
        assert starts[0] == (0, 0) and starts[3][0] == 14
        for begin in range(0, len(ids), 3):
            for end in range(begin + 1, len(ids) + 1, 5):
                stretch = Stretch(begin, end, starts)
                pieces = joined.ids(held_out, validation=validation, stretch=stretch)
                assert [x for piece in pieces for x in piece.tolist()] == [x for _, x in ids[begin:end]]
                chunks = joined.lengths(held_out, validation=validation, stretch=stretch)
                lengths = [number for chunk in chunks for number in chunk.tolist()]
                numbers = [number for number, _ in ids[begin:end]]
                assert lengths == [numbers.count(number) for number in sorted(set(numbers))]


def test_a_spool_is_closed_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A stream whose last write fails when it is closed."""

        def __init__(self) -> None:
            self.raw = self
            self.closed = 0

        def close(self) -> None:
            self.closed += 1
            if self.closed == 1:
                raise OSError(28, "No space left on device")

    spool = Spool(tmp_path, "code", "uint16")
    spool.close()
    full = [Full(), Full()]
    monkeypatch.setattr(spool, "_streams", full)
    spool.close()
    assert [stream.closed for stream in full] == [2, 2]


def test_one_of_the_two_rules_chooses() -> None:
    for rule in ({}, {"min_tokens": 1, "fraction": 0.5}):
        with pytest.raises(AssertionError, match="exactly one"):
            choose_validation([], **rule)
    assert choose_validation([], fraction=0.25) == HeldOut(2**62)


@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("sequence_length", [1, 3, 4, 8, 50, 101])
def test_lengths_of_the_documents_in_each_sample(sequence_length: int, chunk: int) -> None:
    sizes = [3, 1, 50, 8, 20, 2, 16]
    # A token's number of its document, packed as the tokens are.
    numbers = np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)
    expected = [np.unique(sample, return_counts=True)[1].tolist() for sample in pack([numbers], sequence_length)]
    chunks = [np.array(sizes[i : i + chunk]) for i in range(0, len(sizes), chunk)]
    found = pack_lengths([np.zeros(0, np.int64), *chunks], sequence_length)
    assert [of_sample.tolist() for of_sample in found] == expected
