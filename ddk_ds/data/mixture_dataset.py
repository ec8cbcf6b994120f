"""All domains' samples under one numbering: a global sample id is the domain's offset + the local id."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import open_split
from ddk_ds.data.packing import Ids
from ddk_ds.data.store import LocalStore, Shard, Store


class Sample(TypedDict):
    """One sample: `input_ids` (L,) int64, the index of its domain, its global id."""

    input_ids: torch.Tensor
    domain: int
    sample_id: int


class MixtureDataset(Dataset[Sample]):
    """Samples of several domains of one prepared directory, in the order of `names`.

    Plain readers without locks, shared memory or open files: it can be pickled, forked and spawned.

    Attributes:
        names: the domains.
        sizes: (N,) samples of each domain.
        sample_offsets: (N,) global id of each domain's first sample.
        shard_sizes: N arrays (S,), samples of each shard.
        shas: N hashes of the split's shards.
    """

    def __init__(self, root: str | Path | Store, names: Sequence[str], split: str = "train") -> None:
        store = LocalStore(root) if isinstance(root, str | Path) else root
        manifest = load_manifest(store)
        manifest.require(names)
        self.names = list(names)
        self._splits = [open_split(store, f"{name}/{split}", manifest.vocab_size) for name in names]
        self.sizes: npt.NDArray[np.int64] = np.array([len(opened) for opened in self._splits], np.int64)
        self.sample_offsets: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        self.shard_sizes = [opened.shard_sizes for opened in self._splits]
        self.shas = [opened.sha for opened in self._splits]

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, sample_id: int) -> Sample:
        tokens, domain = self.read(sample_id)
        return {"input_ids": torch.from_numpy(tokens.astype(np.int64)), "domain": domain, "sample_id": int(sample_id)}

    def read(self, sample_id: int) -> tuple[Ids, int]:
        """The ids (L,) of a sample in the shards' dtype, and the index of its domain. Raises DataError, IndexError."""
        domain, place = self._place(sample_id)
        return self._splits[domain].tokens(place), domain

    def first_uses(self, ids: npt.NDArray[np.int64]) -> list[tuple[int, Shard]]:
        """ids (n,) global sample ids -> (position of its first sample, shard) of every shard among them, in order."""
        ends = np.cumsum(np.concatenate(self.shard_sizes))
        numbers, positions = np.unique(np.searchsorted(ends, ids, side="right"), return_index=True)
        shards = [shard for split in self._splits for shard in split.shards]
        return sorted(
            ((int(at), shards[number]) for at, number in zip(positions, numbers, strict=True)), key=itemgetter(0)
        )

    def _place(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"global sample id {sample_id}; there are {len(self)} samples")
        domain = int(np.searchsorted(self.sample_offsets, sample_id, side="right")) - 1
        return domain, int(sample_id - self.sample_offsets[domain])
