"""Distillation from what the teacher has said before, which a cache holds by sample: drawn tokens, or the likeliest.

The loss is that of `distillation.Distillation` with what is known in place of the teacher's softmax: the shares of
draws, with which the gradient is the same on average (kernels/teacher_draws.py), or the probabilities of the k
likeliest tokens, with all others as one. Samples that the cache does not have go through the teacher, are added, and
are used as they were added.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Loss
from ddk_ds.config.sections import TeacherCache as CacheSection
from ddk_ds.data.loader import MicroBatch, MixtureDataset, document_positions, target_mask
from ddk_ds.data.mds import Targets
from ddk_ds.data.teacher_cache import TeacherCache
from ddk_ds.data.teacher_samples import NO_LABEL, Drawn, Likeliest, Record, Said, Top
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.teacher import Teacher
from ddk_ds.engine.transfers import to_device
from ddk_ds.kernels import (
    KDLoss,
    LabelLogProbs,
    Options,
    TeacherDraws,
    TeacherTopK,
    counted_draws,
    draws_of,
    linear_kd_loss,
    top_k_of,
)
from ddk_ds.methods.base import IGNORE_INDEX, Batch, next_token_labels
from ddk_ds.methods.distillation import WithDivergence
from ddk_ds.mixture.order import name_key

Place = tuple[str, int]
"""Domain of a sample, and its number in the domain."""


class Row(NamedTuple):
    """A sample's token ids (L,), and positions (L,) on the CPU if documents are kept apart.

    `targets` is None if all tokens are targets.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    targets: Targets | None


class Known(NamedTuple):
    """Tokens of a teacher at each position of a micro-batch."""

    tokens: TeacherTopK
    kl_offset: torch.Tensor | None = None
    """(n,) float32, what is added to a position's divergence; None: nothing."""


@dataclass
class CachedTeacher:
    """A cache of a teacher, and how it is filled."""

    store: TeacherCache
    dataset: MixtureDataset
    section: CacheSection
    comm: Comm
    complete: bool = False
    """True if every rank has found all samples of the interval: the teacher is not asked, and no rank waits for it."""
    micro_batch: int = 1
    """Samples of a micro-batch."""
    pass_size: int = 1
    """Micro-batches that the teacher computes in one pass."""
    looks_ahead: bool = False
    """True if samples can be read at once that the run comes to only later."""
    later: dict[Place, int] = field(default_factory=dict)
    """Samples of the interval that this rank misses, in the order of their use, with their global ids."""
    taught: int = 0
    """Samples that have gone through the teacher on all ranks since this was last set to 0."""

    def places(self, sample_ids: torch.Tensor | None) -> list[Place]:
        """Return the places of the samples with these global ids (B,)."""
        assert sample_ids is not None, "the loop gives the ids of its samples"
        return self.dataset.places(sample_ids.numpy())

    def ahead(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield micro-batches with what is known of their samples, which is read when they are asked for.

        Raises TemporaryError there if a store has not taken what this rank has added.
        """
        for batch in batches:
            self.store.check()
            yield {**batch, "said": [self.store.read(*place) for place in self.places(batch["sample_id"])]}

    def said(self, batch: Batch) -> list[Record | None]:
        """Return what is known of the samples of a micro-batch, and look for those that were not there before."""
        places = self.places(batch.sample_id)
        before = batch.said or [None] * len(places)
        return [self.store.read(*place) if one is None else one for place, one in zip(places, before, strict=True)]

    def look_for(self, sample_ids: npt.NDArray[np.int64]) -> dict[str, int]:
        """Look for the samples with these global ids (n,), which are an interval's, and set `complete`. Collective.

        Return how many of each domain a rank misses: those of the first rank that misses any.
        """
        found = self.comm.gather_objects(call_together(self.comm, lambda: self._missing(sample_ids)))
        if self.looks_ahead:
            own = sample_ids.reshape(-1, self.comm.world_size, self.micro_batch)[:, self.comm.rank].ravel()
            unknown = np.ones(len(own), bool)
            for name, places, numbers in self.dataset.by_domain(own):
                unknown[places] = ~np.isin(numbers, self.store.known(name))
            self.later = dict(zip(self.dataset.places(own[unknown]), own[unknown].tolist(), strict=True))
        missing: dict[str, int] = next(filter(None, found), {})
        self.complete = not missing
        return missing

    def take_later(self, count: int, now: Container[Place]) -> dict[Place, Row]:
        """Return up to `count` samples, not among those of `now`, that the interval needs next."""
        found: dict[Place, Row] = {}
        for place, sample_id in self.later.items():
            if len(found) == count:
                break
            if place not in now:
                packed, _ = self.dataset.read(sample_id)
                ids, positions = torch.from_numpy(packed.tokens.astype(np.int64)), document_positions([packed.lengths])
                found[place] = Row(ids, None if positions is None else positions[0], packed.targets)
        return found

    def add(self, place: Place, said: Said) -> Record:
        """Add what the teacher says of a sample, and return what is kept of it."""
        self.later.pop(place, None)
        return self.store.add(*place, said)

    def _missing(self, sample_ids: npt.NDArray[np.int64]) -> dict[str, int]:
        self.store.refresh()  # other ranks and runs write too
        missing = {}
        for name, _, numbers in self.dataset.by_domain(sample_ids):
            missing[name] = len(np.setdiff1d(numbers, self.store.known(name)))
        return {name: count for name, count in missing.items() if count}


class CachedDistillation(WithDivergence):
    """CE + gamma * T^2 * D(teacher, student), D from what a cache holds: draws (of the forward KL alone) or a top k."""

    def __init__(self, cached: CachedTeacher, teacher: Teacher | None, loss: Loss, options: Options) -> None:
        """Make the method; without a `teacher` every sample must be in the cache."""
        super().__init__(loss, options)
        self._cached, self._teacher = cached, teacher

    @contextmanager
    def known(self, batches: Sequence[Batch]) -> Iterator[Iterable[Known]]:
        """Yield what is known of the teacher at each position (B*L) of each micro-batch, one at a time."""
        length, device = batches[0].labels.shape[1], batches[0].labels.device
        yield (self._known(of_batch, length, device) for of_batch in self.fill(batches))

    def fill(self, batches: Sequence[Batch]) -> list[list[Record | None]]:
        """Return what is kept of the samples of each micro-batch, after those that were missing were added.

        The missing ones of all `batches` go through the teacher together, in micro-batches of the same size: products
        of another number of rows can be rounded otherwise. One that is not full takes samples that come later. Without
        a teacher nothing is added, and what is missing is None. Collective.
        """
        said = [self._cached.said(batch) for batch in batches]
        if self._teacher is None or self._cached.complete:
            return said
        rows: dict[Place, list[tuple[int, int]]] = {}
        for number, (batch, of_batch) in enumerate(zip(batches, said, strict=True)):
            for row, place in enumerate(self._cached.places(batch.sample_id)):
                if of_batch[row] is None:
                    rows.setdefault(place, []).append((number, row))
        size, device = len(said[0]), batches[0].input_ids.device
        tokens = {place: _row(batches[number], row) for place, [(number, row), *_] in rows.items()}
        groups = self._most_anywhere(-(-len(tokens) // size), device)
        tokens |= self._cached.take_later(groups * size - len(tokens), tokens)
        places = list(tokens)
        at_once = [places[size * number : size * (number + 1)] for number in range(groups)]
        for first in range(0, groups, self._cached.pass_size):
            of_pass = at_once[first : first + self._cached.pass_size]
            for place, one in self._ask(self._teacher, batches[0], of_pass, tokens):
                kept = self._cached.add(place, one)
                for number, row in rows.get(place, ()):
                    said[number][row] = kept
        return said

    def distil(self, hidden: torch.Tensor, head: OutputHead, teacher_output: Known, batch: Batch) -> KDLoss:
        """Compute the micro-batch's part of the loss from hidden (n, Hs) and what is known of the teacher, n = B*L."""
        options = replace(self.options_at(batch), student_form=head.form)
        labels = batch.labels.flatten()
        found = linear_kd_loss(
            hidden,
            head.weight,
            None,
            None,
            labels,
            num_valid=batch.num_valid,
            options=options,
            student_bias=head.bias,
            teacher_topk=teacher_output.tokens,
            row_weights=batch.row_weights,
            per_token=batch.by_token,
        )
        if teacher_output.kl_offset is None:
            return found
        # Without a gradient: it makes the reported divergence one to the whole teacher, on average.
        offsets = teacher_output.kl_offset * (labels != IGNORE_INDEX)
        token_kl = found.token_kl
        if token_kl is not None:
            token_kl = token_kl + (offsets.double() / batch.num_valid).to(token_kl.dtype)
        if batch.row_weights is not None:
            offsets = offsets * batch.row_weights
        offset = offsets.sum(dtype=torch.float64) / batch.num_valid
        return found._replace(
            loss=found.loss + (options.kd_weight * offset).to(found.loss.dtype),
            kl=found.kl + offset.to(found.kl.dtype),
            token_kl=token_kl,
        )

    def _known(self, records: Sequence[Record | None], length: int, device: torch.device) -> Known:
        there = [record for record in records if record is not None]
        assert len(there) == len(records), "all were asked for, or the interval was checked"
        told = self._cached.store.coding.unpacked(there, length, lambda tensor: to_device(tensor, device))
        if isinstance(told, Top):
            return Known(TeacherTopK(*told))
        return Known(*counted_draws(*told, self._cached.section.draws))

    def _most_anywhere(self, count: int, device: torch.device) -> int:
        """Return the largest count of all ranks: they gather the teacher's weights together. Collective."""
        return int(self._cached.comm.all_reduce_max(torch.tensor(float(count), device=device)))

    def _ask(
        self, teacher: Teacher, batch: Batch, at_once: Sequence[list[Place]], tokens: Mapping[Place, Row]
    ) -> Iterator[tuple[Place, Said]]:
        """Yield what the teacher says of samples in one pass, whose micro-batches have these places. Collective.

        `tokens` has each of them. A micro-batch that is not full is filled up with a sample of `batch`.
        """
        spare, device = self._cached.places(batch.sample_id)[0], batch.input_ids.device
        filled = [places + [spare] * (len(batch.input_ids) - len(places)) for places in at_once]
        rows = [[tokens.get(place, _row(batch, 0)) for place in each] for each in filled]
        ids = [torch.stack([to_device(row.ids, device) for row in each]) for each in rows]
        apart = ([row.positions for row in each if row.positions is not None] for each in rows)
        positions = [torch.stack(each) if each else None for each in apart]
        targets = [target_mask([row.targets for row in each], len(each[0].ids)) for each in rows]
        hidden = teacher.hidden(ids, positions)
        self._cached.taught += self._cached.comm.world_size * sum(map(len, filled))  # the same on each rank
        with teacher.clock.stage("teacher"), teacher.head.gathered() as head:
            options = replace(self.options_at(batch), teacher_form=head.form)
            labels = map(next_token_labels, ids, positions, targets)
            for states, of_one, mask, places, needed in zip(hidden, labels, targets, filled, at_once, strict=True):
                if needed:
                    yield from zip(needed, self._answers(states, of_one, mask, head, places, options), strict=False)

    def _answers(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None,
        head: OutputHead,
        places: list[Place],
        options: Options,
    ) -> list[Said]:
        """Return what the teacher says of each sample of a micro-batch, from its hidden states (B*L, Ht).

        Of tokens that are no `targets` (B, L) it says what takes no room.
        """
        section = self._cached.section
        of_labels = LabelLogProbs(labels.flatten(), labels.new_empty(labels.numel(), dtype=torch.float32))
        rest: dict[str, Any] = {"options": options, "bias": head.bias, "of_labels": of_labels}
        answer: TeacherDraws | TeacherTopK
        if section.keep == "topk":
            answer = top_k_of(states, head.weight, section.top_k, **rest)
            answer = answer._replace(log_probs=answer.log_probs.bfloat16().float())  # as they are stored
        else:
            keys = torch.tensor([sample_key(*place) for place in places], device=states.device)
            answer = draws_of(states, head.weight, keys, section.draws, seed=section.seed, **rest)
        of_labels.log_probs.view_as(labels)[:, :-1].masked_fill_(labels[:, :-1] == IGNORE_INDEX, NO_LABEL)
        if targets is not None:
            _say_nothing(answer, to_device(targets, labels.device))
        columns = (part.unflatten(0, (len(places), -1)).cpu().numpy() for part in (*answer, of_labels.log_probs))
        kind = Likeliest if section.keep == "topk" else Drawn
        return [kind(*of_sample) for of_sample in zip(*columns, strict=True)]


def _row(batch: Batch, row: int) -> Row:
    targets = None if batch.targets is None else batch.targets[row].numpy()
    return Row(batch.input_ids[row], None if batch.positions is None else batch.positions[row], targets)


def _say_nothing(answer: TeacherDraws | TeacherTopK, targets: torch.Tensor) -> None:
    """Give the positions before tokens that are no `targets` (B, L) one answer for all, which compresses to nothing.

    The loss ignores them. It is the token 0, drawn each time, or the first k tokens, with probabilities of about 0.
    """
    unused = ~targets.roll(-1, 1)
    unused[:, -1] = False  # the last position has no next token
    rows = unused.flatten()
    if isinstance(answer, TeacherDraws):
        answer.ids[rows], answer.entropy[rows] = 0, 0.0
    else:
        answer.ids[rows] = torch.arange(answer.ids.shape[1], device=rows.device)
        answer.log_probs[rows], answer.log_tail[rows] = -100.0, 0.0


def sample_key(domain: str, number: int) -> int:
    """Return the number from which the draws of a sample follow: that of no other domain is near it."""
    return (name_key(domain) >> 2) + number
