"""Global ids to micro-batches: the same slices for any world size, with reading processes and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_ds.data.loader import MixtureDataset, document_positions, interval_loader, validation_batches
from ddk_ds.data.mds import open_split
from ddk_ds.data.readers import Readers
from ddk_ds.data.store import LocalStore
from ddk_ds.errors import DataError, TemporaryError

NAMES = ["large", "small", "tree"]


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> MixtureDataset:
    return MixtureDataset(prepared, NAMES)


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    with closing(Readers(2)) as started:
        started.start()
        yield started


def draw(dataset: MixtureDataset, total: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).integers(0, len(dataset), total)


def test_global_ids_follow_the_order_of_names(dataset: MixtureDataset, prepared: Path) -> None:
    splits = [open_split(LocalStore(prepared), f"{name}/train") for name in NAMES]
    assert dataset.sizes.tolist() == [len(split) for split in splits]
    assert dataset.sample_offsets.tolist() == [0, len(splits[0]), len(splits[0]) + len(splits[1])]
    assert [sizes.tolist() for sizes in dataset.shard_sizes] == [split.shard_sizes.tolist() for split in splits]
    assert dataset.shas == [split.sha for split in splits]
    expected = [(domain, split.tokens(i)) for domain, split in enumerate(splits) for i in range(len(split))]
    for sample_id, (domain, tokens) in enumerate(expected):
        sample = dataset[sample_id]
        assert (sample["domain"], sample["sample_id"]) == (domain, sample_id)
        np.testing.assert_array_equal(sample["input_ids"].numpy(), tokens)
    with pytest.raises(IndexError):
        dataset[len(expected)]


def test_the_validation_split_is_a_dataset(prepared: Path) -> None:
    held_out = MixtureDataset(prepared, ["tree"], split="validation")
    split = open_split(LocalStore(prepared), "tree/validation")
    np.testing.assert_array_equal(held_out[3]["input_ids"].numpy(), split.tokens(3))


def test_an_unknown_domain_is_named(prepared: Path) -> None:
    with pytest.raises(DataError, match="no domain 'medium'"):
        MixtureDataset(prepared, ["large", "medium"])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [False, True])
def test_ranks_together_read_the_ids_in_order(
    dataset: MixtureDataset, readers: Readers, world: int, workers: bool
) -> None:
    micro_batch, start = 3, 24
    ids = draw(dataset, 24 + 48)
    ranks = [
        list(
            interval_loader(
                dataset,
                ids,
                rank=rank,
                world=world,
                micro_batch=micro_batch,
                start_sample=start,
                readers=readers if workers else None,
            )
        )
        for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {48 // (world * micro_batch)}
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    np.testing.assert_array_equal(torch.cat([batch["sample_id"] for batch in in_order]), ids[start:])
    for batch in in_order:
        assert batch["input_ids"].shape == (micro_batch, 32)
        assert batch["input_ids"].dtype == batch["domain"].dtype == batch["sample_id"].dtype == torch.int64
        for row, sample_id in enumerate(batch["sample_id"].tolist()):
            sample = dataset[sample_id]
            assert torch.equal(batch["input_ids"][row], sample["input_ids"])
            assert batch["domain"][row] == sample["domain"]


def test_loading_leaves_the_training_rng_alone(dataset: MixtureDataset, readers: Readers) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for processes in (None, readers):
        list(interval_loader(dataset, draw(dataset, 4), rank=0, world=1, micro_batch=2, readers=processes))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("total", "start"), [(23, 0), (24, 6), (24, 36)])
def test_samples_must_divide_into_ranks_and_micro_batches(dataset: MixtureDataset, total: int, start: int) -> None:
    with pytest.raises(AssertionError, match=r"do not divide into 4 ranks x 3"):
        interval_loader(dataset, draw(dataset, total), rank=0, world=4, micro_batch=3, start_sample=start)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_validation_is_the_same_samples_for_any_world_size(prepared: Path, world: int, micro_batch: int) -> None:
    ranks = [
        validation_batches(prepared, NAMES, num_samples=7, rank=rank, world=world, micro_batch=micro_batch)
        for rank in range(world)
    ]
    for domain, name in enumerate(NAMES):
        shares = [rank[domain] for rank in ranks]
        assert {len(share) for share in shares} == {-(-7 // (world * micro_batch))}
        in_order = [batch for step in zip(*shares, strict=True) for batch in step]
        assert all(ids.shape == (micro_batch, 32) and ids.dtype == torch.int64 for ids, *_ in in_order)
        assert all(real.shape == (micro_batch,) and real.dtype == torch.bool for _, real, *_ in in_order)
        read = torch.cat([ids[real] for ids, real, *_ in in_order])
        split = open_split(LocalStore(prepared), f"{name}/validation")
        np.testing.assert_array_equal(read.numpy(), np.stack([split.tokens(i) for i in range(7)]))
        assert all(not ids[~real].any() for ids, real, *_ in in_order)


def test_too_few_validation_samples_are_named(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"domain 'tree' .* validation samples, 1,000 are asked for"):
        validation_batches(prepared, ["tree"], num_samples=1000, rank=0, world=1, micro_batch=2)


class Unreachable:
    """A dataset whose store does not answer."""

    def read(self, sample_id: int) -> None:
        raise TemporaryError(f"sample {sample_id}: the store does not answer")


@pytest.mark.parametrize("workers", [False, True])
def test_an_error_that_time_may_mend_keeps_its_kind(readers: Readers, workers: bool) -> None:
    dataset: Any = Unreachable()
    processes = readers if workers else None
    batches = interval_loader(dataset, np.arange(2), rank=0, world=1, micro_batch=2, readers=processes)
    with pytest.raises(TemporaryError, match=r"^sample 0: the store does not answer$"):
        next(batches)


@pytest.mark.parametrize("workers", [False, True])
def test_positions_begin_anew_in_each_document(prepared: Path, readers: Readers, workers: bool) -> None:
    dataset = MixtureDataset(prepared, NAMES, masked=True)
    processes = readers if workers else None
    several = 0
    for batch in interval_loader(dataset, np.arange(24), rank=0, world=1, micro_batch=3, readers=processes):
        positions = batch["positions"]
        assert positions is not None and positions.shape == (3, 32) and positions.dtype == torch.int64
        for sample_id, row in zip(batch["sample_id"].tolist(), positions, strict=True):
            lengths = dataset.read(sample_id)[0].lengths
            assert lengths is not None
            assert row.tolist() == [position for length in lengths.tolist() for position in range(length)]
            several += len(lengths) > 1
    assert several
    joined = MixtureDataset(prepared, NAMES)
    assert next(interval_loader(joined, np.arange(3), rank=0, world=1, micro_batch=3)).get("positions") is None
    [[first, *_]] = validation_batches(prepared, ["tree"], num_samples=1, rank=0, world=1, micro_batch=2, masked=True)
    held_out = MixtureDataset(prepared, ["tree"], "validation", masked=True)
    assert first.positions is not None
    torch.testing.assert_close(first.positions[0], document_positions([held_out.read(0)[0].lengths])[0])  # type: ignore[index]
    assert first.positions[1].tolist() == list(range(32)), "a row that only fills up the batch"
