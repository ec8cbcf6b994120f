"""The student engine's root and the two output heads.

DeepSpeed gathers a module's own parameters around its call. So the student's head is a module that owns the output
weight and runs the loss inside its forward, and the root runs backbone and head in one forward: calling the two
beside the engine makes micro-batches overwrite one another's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from ddk_ds.kernels import LogitForm


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

    def __init__(self, backbone: nn.Module, head: nn.Module, form: LogitForm) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = StudentHead(head, form)

    def forward(self, input_ids: torch.Tensor, function: HeadFunction) -> Any:
        """input_ids (B, L) int64 -> function(hidden (B*L, H), head)."""
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1), function)


class FrozenHead:
    """A frozen model's sharded output head, gathered only inside `gathered()`.

    It belongs to no engine's module tree at the time of use, so that it can be gathered within the student's forward
    without entering the student's parameter trace.
    """

    def __init__(self, head: nn.Module, form: LogitForm) -> None:
        self._head = OutputHead(head.weight, getattr(head, "bias", None), form)  # type: ignore[arg-type]

    @contextmanager
    def gathered(self) -> Iterator[OutputHead]:
        """The whole head on this rank; released at the end unless it was there before (a collective)."""
        parts: list[Any] = [part for part in self._head[:2] if part is not None]
        away = [part for part in parts if part.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if away:
            away[0].all_gather(param_list=away)
        try:
            yield self._head
        finally:
            if away:
                away[0].partition(param_list=away)
