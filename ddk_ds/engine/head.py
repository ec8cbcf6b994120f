"""The student engine's root and the two output heads.

DeepSpeed gathers a module's own parameters around its call. So the student's head is a module that owns the output
weight and runs the loss inside its forward, and the root runs backbone and head in one forward: calling the two
beside the engine makes micro-batches overwrite one another's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from ddk_ds.engine.filters import LayerFilters, LayerTaps
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.kernels import LogitForm

TEACHER_GATHER = "teacher_gather"
"""Stage of a step: waiting for the teacher's weights."""


class OutputHead(NamedTuple):
    """Weight (V, H) and bias (V,) or None of an output head, gathered, and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    form: LogitForm = LogitForm()


# (hidden (n, H), head) -> whatever the caller wants of the logits; runs while the head is gathered.
HeadFunction = Callable[[torch.Tensor, OutputHead], Any]


class StudentHead(nn.Module):
    """Owns the student's output weight (tied or not) and applies a function to it and the hidden states."""

    def __init__(self, head: nn.Module, form: LogitForm) -> None:
        super().__init__()
        self.form = form
        self.weight: nn.Parameter = head.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = getattr(head, "bias", None)

    def forward(self, hidden: torch.Tensor, function: HeadFunction) -> Any:
        """hidden (n, H) -> function(hidden, gathered head)."""
        return function(hidden, OutputHead(self.weight, self.bias, self.form))


class StudentRoot(nn.Module):
    """What the student's engine wraps: token ids and a function of the hidden states in, its result out."""

    def __init__(
        self, backbone: nn.Module, head: nn.Module, form: LogitForm, filters: LayerFilters | None, depth: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = StudentHead(head, form)
        self.filters = filters
        self._taps = None if filters is None else LayerTaps(backbone, [pair[0] for pair in filters.shape.pairs], depth)

    def forward(
        self,
        input_ids: torch.Tensor,
        function: HeadFunction | None,
        teacher_states: Sequence[torch.Tensor] | None = None,
    ) -> Any:
        """input_ids (B, L) int64 -> function(hidden (B*L, H), head).

        With the teacher's hidden states of the matched layers: that (None without a function), and the filtered states.
        """
        if teacher_states is None:
            return self._head(self._hidden(input_ids), function)
        filters: Any = self.filters
        assert filters is not None and self._taps is not None, "built without filters"
        with self._taps.open() as states:
            hidden = self._hidden(input_ids)
        return self._head(hidden, function), filters(states, teacher_states)

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def _head(self, hidden: torch.Tensor, function: HeadFunction | None) -> Any:
        return None if function is None else self.head(hidden, function)


class FrozenHead:
    """A frozen model's sharded output head, gathered only inside `gathered()`.

    It belongs to no engine's module tree at the time of use, so that it can be gathered within the student's forward
    without entering the student's parameter trace.
    """

    def __init__(self, head: nn.Module, form: LogitForm, clock: StageClock) -> None:
        self._head = OutputHead(head.weight, getattr(head, "bias", None), form)  # type: ignore[arg-type]
        self._clock = clock

    @contextmanager
    def gathered(self) -> Iterator[OutputHead]:
        """The whole head on this rank; released at the end unless it was there before (a collective)."""
        parts: list[Any] = [part for part in self._head[:2] if part is not None]
        away = [part for part in parts if part.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if away:
            with self._clock.waiting(TEACHER_GATHER):
                away[0].all_gather(param_list=away)
        try:
            yield self._head
        finally:
            if away:
                away[0].partition(param_list=away)
