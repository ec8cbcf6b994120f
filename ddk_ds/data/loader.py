"""From global sample ids to a rank's micro-batches: the same global batches for any number of ranks and workers.

A global sample id is the offset of the sample's domain + the sample's number in the domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import Lengths, Packed, Split, Targets, open_split
from ddk_ds.data.readers import Read, Readers
from ddk_ds.data.store import LocalStore, Shard, Store
from ddk_ds.data.teacher_samples import Record
from ddk_ds.errors import DataError


class Sample(TypedDict):
    """One sample: `input_ids` (L,) int64, the index of its domain, and its global id."""

    input_ids: torch.Tensor
    domain: int
    sample_id: int


class MixtureDataset(Dataset[Sample]):
    """Samples of the N domains `names` of one prepared directory, numbered in the order of `names`.

    It holds no locks, shared memory or open files, so that it can be sent to another process.

    Attributes:
        names: names of the domains.
        sizes: (N,) number of samples of each domain.
        sample_offsets: (N,) global id of each domain's first sample.
        shard_sizes: N arrays (S,), number of samples of each shard.
        order_sizes: N arrays, numbers of samples by which a run orders them (`mds.SplitIndex`).
        shas: N hashes, each over all shards of a domain's split.
    """

    def __init__(
        self,
        root: str | Path | Store,
        names: Sequence[str],
        split: str = "train",
        vocab_size: int | None = None,
        *,
        masked: bool = False,
    ) -> None:
        """Open the domains; samples with ids >= `vocab_size` raise DataError. None: the data's own vocabulary.

        `masked` is True if the documents of a sample are kept apart; the data must have their borders.
        """
        store = LocalStore(root) if isinstance(root, str | Path) else root
        manifest = load_manifest(store)
        manifest.require(names)
        self.names = list(names)
        self.masked = masked
        self._splits = [open_split(store, f"{name}/{split}", vocab_size or manifest.vocab_size) for name in names]
        self.sizes: npt.NDArray[np.int64] = np.array([len(opened) for opened in self._splits], np.int64)
        self.sample_offsets: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        self.shard_sizes = [opened.shard_sizes for opened in self._splits]
        self.order_sizes = [opened.order_sizes for opened in self._splits]
        self.shas = [opened.sha for opened in self._splits]

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, sample_id: int) -> Sample:
        packed, domain = self.read(sample_id)
        ids = torch.from_numpy(packed.tokens.astype(np.int64))
        return {"input_ids": ids, "domain": domain, "sample_id": int(sample_id)}

    def read(self, sample_id: int) -> tuple[Packed, int]:
        """Return a sample, with its documents' lengths if they are kept apart, and the index of its domain.

        Raises:
            DataError: the sample's shard is damaged or cannot be fetched.
            IndexError: there is no such sample.
        """
        domain, number = self._place(sample_id)
        packed = self._splits[domain].packed(number)
        return packed if self.masked else packed._replace(lengths=None), domain

    def places(self, ids: npt.NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return the names of the domains of samples `ids` (n,), which must be there, and their numbers in these."""
        domains = np.searchsorted(self.sample_offsets, ids, side="right") - 1
        numbers = ids - self.sample_offsets[domains]
        return [(self.names[domain], number) for domain, number in zip(domains, numbers.tolist(), strict=True)]

    def by_domain(
        self, ids: npt.NDArray[np.int64]
    ) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield each domain with the places (m,) in `ids` (n,) of its samples, and their numbers (m,) in the domain."""
        for name, first, size in zip(self.names, self.sample_offsets, self.sizes, strict=True):
            places = np.flatnonzero((ids >= first) & (ids < first + size))
            yield name, places, ids[places] - first

    def first_uses(self, ids: npt.NDArray[np.int64]) -> list[tuple[int, Shard]]:
        """Return a pair (position, shard) for every shard that holds one of the samples `ids` (n,), sorted by position.

        The position is the index in `ids` of the first sample that lies in the shard.
        """
        ends = np.cumsum(np.concatenate(self.shard_sizes))
        numbers, positions = np.unique(np.searchsorted(ends, ids, side="right"), return_index=True)
        shards = [shard for split in self._splits for shard in split.shards]
        return sorted(
            ((int(position), shards[number]) for position, number in zip(positions, numbers, strict=True)),
            key=itemgetter(0),
        )

    def _place(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"global sample id {sample_id}; there are {len(self)} samples")
        domain = int(np.searchsorted(self.sample_offsets, sample_id, side="right")) - 1
        return domain, int(sample_id - self.sample_offsets[domain])


class MicroBatch(TypedDict):
    """A rank's part of one forward pass: `input_ids` (B, L), `domain` (B,) and `sample_id` (B,), all int64.

    `positions` (B, L) int64 are those of the tokens in their documents, if documents are kept apart. `targets` (B, L)
    is True for the tokens that are targets; None: all are. `said` (B,) is what a cache of the teacher has of the
    samples, if there is one (methods/cached_distillation.py).
    """

    input_ids: torch.Tensor
    domain: torch.Tensor
    sample_id: torch.Tensor
    positions: NotRequired[torch.Tensor | None]
    targets: NotRequired[torch.Tensor | None]
    said: NotRequired[list[Record | None]]


def interval_loader(
    dataset: MixtureDataset,
    ids: npt.NDArray[np.int64],
    *,
    rank: int,
    world: int,
    micro_batch: int,
    start_sample: int = 0,
    readers: Readers | None = None,
) -> Iterator[MicroBatch]:
    """Return an iterator over one rank's micro-batches of one interval, beginning with sample `start_sample`.

    Rank r's m-th micro-batch is ids[start + (m * world + r) * B : ... + B]: the global batch of an optimizer
    step is the same slice of `ids` for any world size.

    Args:
        ids: (total,) global sample ids of the interval, in global order.
        micro_batch: B, number of samples of one rank's forward pass.
        start_sample: number of the interval's samples that are trained already.
        readers: the processes that read; None: this process reads.

    Raises:
        DataError: a shard is damaged or cannot be fetched; raised by the iterator.
    """
    remaining = len(ids) - start_sample
    assert remaining >= 0 and remaining % (world * micro_batch) == 0, (
        f"{remaining} samples from {start_sample} on do not divide into {world} ranks x {micro_batch}"
    )
    batches = ids[start_sample:].reshape(-1, world, micro_batch)[:, rank]
    return map(_micro_batch, (readers or Readers(0)).read(dataset, batches.tolist()))


def _micro_batch(read: Read) -> MicroBatch:
    return {
        "input_ids": torch.from_numpy(read.tokens.astype(np.int64)),
        "domain": torch.tensor(read.domains),
        "sample_id": torch.tensor(read.sample_ids),
        "positions": document_positions(read.lengths),
        "targets": target_mask(read.targets, read.tokens.shape[1]),
    }


def document_positions(lengths: Sequence[Lengths | None]) -> torch.Tensor | None:
    """Return the positions (B, L) int64 of B samples' tokens in their documents, from the documents' lengths.

    Return None without lengths: the positions are 0, 1, 2, ... up to the sample's end.
    """
    rows = []
    for of_sample in lengths:
        if of_sample is None:
            return None
        ends = np.cumsum(of_sample, dtype=np.int64)
        rows.append(np.arange(ends[-1]) - np.repeat(ends - of_sample, of_sample))
    return torch.from_numpy(np.stack(rows))


def target_mask(targets: Sequence[Targets | None], length: int) -> torch.Tensor | None:
    """Return which tokens of B samples are targets, (B, L) bool, from each sample's; None if all of all samples are."""
    if all(of_sample is None for of_sample in targets):
        return None
    everything = np.ones(length, np.bool_)
    return torch.from_numpy(np.stack([everything if of_sample is None else of_sample for of_sample in targets]))


class HeldOutBatch(NamedTuple):
    """A rank's part of one forward pass of an evaluation."""

    input_ids: torch.Tensor
    """(B, L) int64."""
    real: torch.Tensor
    """(B,) bool: False for a row that only fills up the batch."""
    positions: torch.Tensor | None = None
    """(B, L) int64, of the tokens in their documents; None if documents are not kept apart."""
    targets: torch.Tensor | None = None
    """(B, L) bool, True for the tokens that are targets; None: all are."""


def validation_batches(
    root: str | Path | Store,
    names: Sequence[str],
    *,
    num_samples: int,
    rank: int,
    world: int,
    micro_batch: int,
    vocab_size: int | None = None,
    masked: bool = False,
) -> list[list[HeldOutBatch]]:
    """Read one rank's share of the first `num_samples` validation samples of each domain.

    Samples with ids >= `vocab_size` raise DataError; None: the data's own vocabulary. `masked` is True if the documents
    of a sample are kept apart.

    Returns:
        For each domain a list of batches. All lists are equally long, on all ranks; a row that only fills up a batch is
        zero and its `real` is False.

    Raises:
        DataError: a domain has fewer validation samples, or no target in them, or a shard is damaged or cannot be
            fetched.
    """
    store = LocalStore(root) if isinstance(root, str | Path) else root
    manifest = load_manifest(store)
    manifest.require(names)
    shares = []
    for name in names:
        split = open_split(store, f"{name}/validation", vocab_size or manifest.vocab_size)
        if len(split) < num_samples:
            raise DataError(
                f"domain {name!r} of {store.location} has {len(split):,} validation samples, {num_samples:,} are asked "
                "for; lower data.validation_samples or prepare the data again with more"
            )
        if manifest.domains[name].chat is not None:
            _require_targets(split, name, num_samples)
        share = []
        # Starts past num_samples (by less than a global batch) give the last ranks their all-padding batch.
        for first in range(rank * micro_batch, num_samples + rank * micro_batch, world * micro_batch):
            input_ids = torch.zeros(micro_batch, manifest.sequence_length, dtype=torch.int64)
            real = torch.arange(first, first + micro_batch) < num_samples
            lengths: list[Lengths | None] = [np.array([manifest.sequence_length]) if masked else None] * micro_batch
            targets: list[Targets | None] = [None] * micro_batch
            for row in range(int(real.sum())):
                packed = split.packed(first + row)
                input_ids[row] = torch.from_numpy(packed.tokens.astype(np.int64))
                lengths[row], targets[row] = packed.lengths if masked else None, packed.targets
            share.append(
                HeldOutBatch(
                    input_ids, real, document_positions(lengths), target_mask(targets, manifest.sequence_length)
                )
            )
        shares.append(share)
    return shares


def _require_targets(split: Split, name: str, num_samples: int) -> None:
    """Raise DataError if none of the first `num_samples` has a target that a token is before."""
    masks = (split.packed(number).targets for number in range(num_samples))
    if not any(mask is None or mask[1:].any() for mask in masks):
        raise DataError(
            f"domain {name!r}: no token of its first {num_samples:,} held-out samples is a target, so there is no "
            "perplexity: raise data.validation_samples, or prepare conversations that are shorter"
        )
