"""Packing and the choice of held-out documents, on plain arrays."""

from __future__ import annotations

import numpy as np
import pytest

from ddk_ds.data.mds import pack
from ddk_ds.data.reading import HeldOut, choose_validation


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


def test_too_few_tokens_hold_everything_out() -> None:
    assert chosen(np.arange(3, dtype=np.uint64), np.ones(3, np.int64), min_tokens=10).all()
    largest = np.full(2, 2**64 - 1, np.uint64)
    assert chosen(largest, np.ones(2, np.int64), min_tokens=10).all()


def test_no_documents_hold_nothing_out() -> None:
    assert choose_validation([], min_tokens=10) == HeldOut(0)


def test_a_fraction_holds_out_that_share_of_the_keys_range() -> None:
    keys = (np.arange(1000, dtype=np.float64) / 1000 * 2.0**64).astype(np.uint64)
    held_out = chosen(keys, np.ones(1000, np.int64), fraction=0.1)
    np.testing.assert_array_equal(np.flatnonzero(held_out), np.arange(100))
