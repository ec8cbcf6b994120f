"""Distillation from what the teacher has said before: tokens drawn from it, which a cache holds by sample.

The loss is that of `distillation.Distillation` with the draws' shares in place of the teacher's softmax, whose gradient
is the same on average (kernels/teacher_draws.py). Samples that the cache does not have go through the teacher, are
added, and are used as they were added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Loss
from ddk_ds.data.loader import MicroBatch, MixtureDataset
from ddk_ds.data.teacher_cache import TeacherCache
from ddk_ds.data.teacher_samples import Said
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.teacher import Teacher
from ddk_ds.engine.transfers import to_device
from ddk_ds.kernels import KDLoss, Options, TeacherDraws, draws_of, linear_kd_loss
from ddk_ds.methods.base import IGNORE_INDEX, Batch
from ddk_ds.methods.distillation import WithDivergence
from ddk_ds.mixture.order import name_key

Place = tuple[str, int]
"""Domain of a sample, and its number in the domain."""


@dataclass
class CachedTeacher:
    """A cache of a teacher, and how it is filled."""

    store: TeacherCache
    dataset: MixtureDataset
    draws: int
    seed: int
    comm: Comm
    complete: bool = False
    """True if every rank has found all samples of the interval: the teacher is not asked, and no rank waits for it."""
    taught: int = 0
    """Samples that have gone through the teacher on all ranks since this was last set to 0."""

    def places(self, sample_ids: torch.Tensor | None) -> list[Place]:
        """Return the places of the samples with these global ids (B,)."""
        assert sample_ids is not None, "the loop gives the ids of its samples"
        return [self.dataset.place(sample_id) for sample_id in sample_ids.tolist()]

    def ahead(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield micro-batches with what is known of their samples, which is read when they are asked for."""
        for batch in batches:
            yield {**batch, "said": [self.store.read(*place) for place in self.places(batch["sample_id"])]}

    def said(self, batch: Batch) -> list[Said | None]:
        """Return what is known of the samples of a micro-batch, and look for those that were not there before."""
        places = self.places(batch.sample_id)
        before = batch.said or [None] * len(places)
        return [self.store.read(*place) if one is None else one for place, one in zip(places, before, strict=True)]

    def look_for(self, sample_ids: npt.NDArray[np.int64]) -> dict[str, int]:
        """Look for the samples with these global ids (n,), which are an interval's, and set `complete`. Collective.

        Return how many of each domain a rank misses: those of the first rank that misses any.
        """
        found = self.comm.gather_objects(call_together(self.comm, lambda: self._missing(sample_ids)))
        missing: dict[str, int] = next(filter(None, found), {})
        self.complete = not missing
        return missing

    def _missing(self, sample_ids: npt.NDArray[np.int64]) -> dict[str, int]:
        self.store.refresh()  # other ranks and runs write too
        missing = {}
        ends = self.dataset.sample_offsets + self.dataset.sizes
        for name, first, end in zip(self.dataset.names, self.dataset.sample_offsets, ends, strict=True):
            wanted = np.unique(sample_ids[(sample_ids >= first) & (sample_ids < end)]) - first
            missing[name] = len(np.setdiff1d(wanted, self.store.known(name), assume_unique=True))
        return {name: count for name, count in missing.items() if count}


class CachedDistillation(WithDivergence):
    """CE + gamma * T^2 * KL(teacher, student), the KL from draws that a cache holds."""

    def __init__(self, cached: CachedTeacher, teacher: Teacher | None, loss: Loss, options: Options) -> None:
        """Make the method; without a `teacher` every sample must be in the cache."""
        super().__init__(loss, options)
        self._cached, self._teacher = cached, teacher

    @contextmanager
    def known(self, batches: Sequence[Batch]) -> Iterator[Sequence[TeacherDraws]]:
        """Yield the teacher's draws at each position (B*L) of each micro-batch."""
        yield [_as_draws(of_batch, batches[0].labels.device) for of_batch in self.fill(batches)]

    def fill(self, batches: Sequence[Batch]) -> list[list[Said | None]]:
        """Return what the teacher says of the samples of each micro-batch, after those that were missing were added.

        Without a teacher nothing is added, and what is missing is None. Collective.
        """
        places = [self._cached.places(batch.sample_id) for batch in batches]
        said = [self._cached.said(batch) for batch in batches]
        teacher = None if self._cached.complete else self._teacher
        if teacher is not None and self._missing_anywhere(said, batches[0].input_ids.device):
            self._ask(teacher, batches, places, said)
        return said

    def distil(self, hidden: torch.Tensor, head: OutputHead, teacher_output: TeacherDraws, batch: Batch) -> KDLoss:
        """Compute the micro-batch's part of the loss from hidden (n, Hs) and the teacher's draws (n), n = B*L."""
        options = replace(self.options_at(batch), student_form=head.form)
        labels, known = batch.labels.flatten(), teacher_output.known()
        found = linear_kd_loss(
            hidden,
            head.weight,
            None,
            None,
            labels,
            num_valid=batch.num_valid,
            options=options,
            student_bias=head.bias,
            teacher_topk=known,
        )
        # Without a gradient: it makes the reported divergence one to the whole teacher, on average.
        offsets = teacher_output.kl_offset(known) * (labels != IGNORE_INDEX)
        offset = offsets.sum(dtype=torch.float64) / batch.num_valid
        return found._replace(
            loss=found.loss + (options.kd_weight * offset).to(found.loss.dtype),
            kl=found.kl + offset.to(found.kl.dtype),
        )

    def _missing_anywhere(self, said: list[list[Said | None]], device: torch.device) -> bool:
        """Return True if a rank lacks a sample of this pass: all ranks gather the teacher's weights. Collective."""
        missing = torch.tensor(float(any(None in of_batch for of_batch in said)), device=device)
        return bool(self._cached.comm.all_reduce_max(missing))

    def _ask(
        self,
        teacher: Teacher,
        batches: Sequence[Batch],
        places: list[list[Place]],
        said: list[list[Said | None]],
    ) -> None:
        """Put into `said` what the teacher says of the samples that are None there, and add it to the cache."""
        hidden = teacher.hidden([batch.input_ids for batch in batches])
        self._cached.taught += self._cached.comm.world_size * sum(map(len, places))  # the same on each rank
        with teacher.clock.stage("teacher"), teacher.head.gathered() as head:
            options = replace(self.options_at(batches[0]), teacher_form=head.form)
            for states, of_batch, known in zip(hidden, places, said, strict=True):
                if None not in known:
                    continue
                # All of the micro-batch: products of another number of rows can be rounded otherwise.
                drawn = draws_of(
                    states,
                    head.weight,
                    torch.tensor([sample_key(*place) for place in of_batch], device=states.device),
                    self._cached.draws,
                    seed=self._cached.seed,
                    options=options,
                    bias=head.bias,
                )
                ids, entropy = (part.unflatten(0, (len(of_batch), -1)).cpu().numpy() for part in drawn)
                for row, one in enumerate(known):
                    if one is None:
                        known[row] = Said(ids[row], entropy[row])
                        self._cached.store.add(*of_batch[row], Said(ids[row], entropy[row]))


def sample_key(domain: str, number: int) -> int:
    """Return the number from which the draws of a sample follow: that of no other domain is near it."""
    return (name_key(domain) >> 2) + number


def _as_draws(said: Sequence[Said | None], device: torch.device) -> TeacherDraws:
    known = [one for one in said if one is not None]
    assert len(known) == len(said), "all were asked for, or the interval was checked"
    ids = torch.from_numpy(np.concatenate([one.ids for one in known]))
    entropy = torch.from_numpy(np.concatenate([one.entropy for one in known]))
    return TeacherDraws(to_device(ids, device), to_device(entropy, device))
