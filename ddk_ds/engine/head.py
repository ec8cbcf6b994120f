"""The root module of the student's engine, and the output heads of both models.

DeepSpeed gathers a module's own parameters around its call. So the student's head is a module that owns the output
weight and runs the loss inside its forward. The root runs backbone and head in one forward: if they were called
outside of the engine, micro-batches would overwrite one another's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from ddk_ds.engine.attention_masks import backbone_pass
from ddk_ds.engine.filters import LayerFilters, LayerTaps
from ddk_ds.engine.router_loss import RouterLoss
from ddk_ds.engine.sequence_parallel import SequenceGroup
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.kernels import LogitForm

TEACHER_GATHER = "teacher_gather"
"""The stage of a step in which it waits for the teacher's weights."""


class OutputHead(NamedTuple):
    """A gathered output head: weight (V, H), bias (V,) or None, and the form of the model's logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    form: LogitForm = LogitForm()


# A function of (hidden (n, H), head), called while the head is gathered: the loss, or whatever else needs logits.
HeadFunction = Callable[[torch.Tensor, OutputHead], Any]


class StudentHead(nn.Module):
    """The owner of the student's output weight (tied or not), which calls a function of it and the hidden states."""

    def __init__(self, head: nn.Module, form: LogitForm) -> None:
        super().__init__()
        self.form = form
        self.weight: nn.Parameter = head.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = getattr(head, "bias", None)

    def forward(self, hidden: torch.Tensor, function: HeadFunction) -> Any:
        """Return function(hidden, gathered head) for hidden (n, H), in the head's dtype: Mamba's are in float32."""
        return function(hidden.to(self.weight.dtype), OutputHead(self.weight, self.bias, self.form))


class StudentRoot(nn.Module):
    """The module that the student's engine wraps: backbone, head, and TED's filters if there are any."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        form: LogitForm,
        filters: LayerFilters | None,
        depth: int,
        router: RouterLoss | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self._sequence = sequence
        self.router = router
        self.router_loss: torch.Tensor | None = None
        self.backbone = backbone
        self.head = StudentHead(head, form)
        self.filters = filters
        self._taps = None if filters is None else LayerTaps(backbone, [pair[0] for pair in filters.shape.pairs], depth)

    def forward(
        self,
        input_ids: torch.Tensor,
        function: HeadFunction | None,
        teacher_states: Sequence[torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> Any:
        """Return function(hidden (B*L, H), head) for input_ids (B, L) int64; None without a function.

        `positions` (B, L), on the CPU, are those of the tokens in their documents, if documents are kept apart. With
        the teacher's hidden states of the matched layers: a pair of that and of the filters' results.
        """
        if teacher_states is None:
            return self._head(self._hidden(input_ids, positions), function)
        filters: Any = self.filters
        assert filters is not None and self._taps is not None, "built without filters"
        with self._taps.recording() as states:
            hidden = self._hidden(input_ids, positions)
        return self._head(hidden, function), filters(states, teacher_states)

    def _hidden(self, input_ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        options = {} if self.router is None or not self.training else {"output_router_logits": True}
        with backbone_pass(self.backbone, input_ids, positions, sequence=self._sequence) as given:
            output = self.backbone(**given, use_cache=False, **options)
        if self.router is not None and options:
            logits = output.router_logits  # () if no layer of the model has experts
            self.router_loss = self.router(logits) if logits else output.last_hidden_state.new_zeros(())
        return output.last_hidden_state.flatten(0, 1)

    def _head(self, hidden: torch.Tensor, function: HeadFunction | None) -> Any:
        return None if function is None else self.head(hidden, function)


class FrozenHead:
    """A frozen model's output head; if it is sharded, it is gathered only inside `gathered()` and `held()`.

    It belongs to no engine's module tree, so it can be gathered during the student's forward without entering the trace
    of the student's parameters. It is gathered on a stream of its own, for which only the computation waits that needs
    it.
    """

    def __init__(self, head: nn.Module, form: LogitForm, clock: StageClock) -> None:
        self._head = OutputHead(head.weight, getattr(head, "bias", None), form)  # type: ignore[arg-type]
        self._parts: list[Any] = [part for part in self._head[:2] if hasattr(part, "ds_id")]  # those that are sharded
        self._clock = clock
        self._stream = None if get_accelerator().is_synchronized_device() else get_accelerator().Stream()
        self._gathered: list[Any] = []
        self._arriving: list[Any] = []
        self._holders = 0

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the head's weight."""
        return self._head.weight.dtype

    def gather(self) -> None:
        """Begin to gather the head unless that is done; the host goes on. The next block releases it. Collective."""
        with get_accelerator().stream(self._stream):
            for part in self._parts:
                if part.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    self._gathered.append(part)
                    self._arriving.append(part.all_gather_coalesced([part]))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin to gather the head, and release it at the end of the outermost block. Collective."""
        self.gather()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._gathered and not self._holders:
                self._wait()
                self._gathered[0].partition(param_list=self._gathered)
                self._gathered.clear()

    @contextmanager
    def gathered(self) -> Iterator[OutputHead]:
        """Yield the complete head; at the end release it, unless an outer block holds it. Collective."""
        with self.held():
            self._wait()
            yield self._head

    def _wait(self) -> None:
        """Make what is computed from now on wait for the head."""
        if not self._arriving:
            return
        accelerator = get_accelerator()
        with self._clock.waiting(TEACHER_GATHER):
            with accelerator.stream(self._stream):
                for handle in self._arriving:
                    handle.wait()
            if self._stream is not None:
                accelerator.current_stream().wait_stream(self._stream)
        self._arriving.clear()
