"""The frozen teacher: sharded on a ZeRO-3 engine, or a plain module on each rank's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import PreTrainedModel

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.engine.attention_masks import backbone_pass
from ddk_ds.engine.compiling import compile_layers, compile_whole
from ddk_ds.engine.ds_config import teacher_ds_config, teacher_sizes
from ddk_ds.engine.eight_bits import product_fault
from ddk_ds.engine.filters import FilterShape, LayerTaps
from ddk_ds.engine.gather_brake import GatherBrake
from ddk_ds.engine.head import TEACHER_GATHER, FrozenHead, HeadFunction
from ddk_ds.engine.layers import LayerByLayer, layers_of, prepare_layers
from ddk_ds.engine.model_files import ModelFiles, model_shape
from ddk_ds.engine.quantized import quantize_layers
from ddk_ds.engine.sequence_parallel import SequenceGroup, sequence_group
from ddk_ds.engine.stage_clock import StageClock, time_gathers
from ddk_ds.engine.student import check_vocabulary, load_built, zero_init
from ddk_ds.engine.unloaded_models import backbone_of
from ddk_ds.errors import ConfigError


class Teacher:
    """The frozen model: its backbone and, apart from it, its head.

    A sharded backbone belongs to an engine without an optimizer. A resident one (`shard_within: gpu`) is a plain
    module: nothing is gathered, and each of its passes takes one micro-batch.
    """

    def __init__(
        self,
        engine: Any,
        whole: PreTrainedModel,
        head: FrozenHead,
        taps: LayerTaps | None,
        layers: LayerByLayer | None,
        clock: StageClock,
        unquantized: Sequence[str] = (),
        sequence: SequenceGroup | None = None,
    ) -> None:
        self.sequence = sequence
        self.engine = engine
        """The backbone's engine; of a resident teacher the backbone itself."""
        self.whole = whole
        self.head = head
        self._taps = taps
        self._layers = layers
        self.clock = clock
        self.unquantized = unquantized
        """Layers and matrices that `teacher.quantize` left as they were, in words."""

    @torch.inference_mode()
    def hidden(
        self, batches: Sequence[torch.Tensor], positions: Sequence[torch.Tensor | None] = ()
    ) -> list[torch.Tensor]:
        """Return the last hidden states (B*L, H) of each micro-batch of token ids (B, L).

        A sharded teacher computes them in one pass if it was loaded for several. They are in the head's dtype; Mamba's
        backbone gives float32. `positions` (B, L) of each micro-batch, on the CPU, are those of the tokens in their
        documents, if documents are kept apart.
        """
        positions = positions or [None] * len(batches)
        with self.clock.stage("teacher"):
            if self._layers is None:
                pairs = zip(batches, positions, strict=True)
                return [self._states(ids, of_ids).flatten(0, 1) for ids, of_ids in pairs]
            apart = [part for part in positions if part is not None]
            with self._layers.parts(len(batches)):
                joined = torch.cat(list(batches)), torch.cat(apart) if apart else None
                states = self._states(*joined, len(batches))
            return [part.flatten(0, 1) for part in states.chunk(len(batches))]

    def _states(self, input_ids: torch.Tensor, positions: torch.Tensor | None, parts: int = 1) -> torch.Tensor:
        with backbone_pass(backbone_of(self.whole), input_ids, positions, parts, self.sequence) as given:
            states: torch.Tensor = self.engine(**given, use_cache=False).last_hidden_state
        return states.to(self.head.dtype)

    def hidden_with_layers(
        self, batches: Sequence[torch.Tensor], positions: Sequence[torch.Tensor | None] = ()
    ) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Return for each micro-batch its last hidden states, and those (B*L, H) of the layers that TED matches."""
        assert self._taps is not None, "the teacher was loaded without matched layers"
        if self._layers is None and len(batches) > 1:
            pairs = zip(batches, positions or [None] * len(batches), strict=True)
            return [self.hidden_with_layers([ids], [of_ids])[0] for ids, of_ids in pairs]
        with self._taps.recording() as states:
            hidden = self.hidden(batches, positions)
        # Autograd does not accept tensors that were made in inference mode.
        layers = [[part.clone() for part in state.chunk(len(batches))] for state in states]
        return [(last, [parts[index] for parts in layers]) for index, last in enumerate(hidden)]

    def __call__(self, input_ids: torch.Tensor, function: HeadFunction, positions: torch.Tensor | None = None) -> Any:
        """Return `function(hidden, head)` for token ids and positions (B, L), with hidden states (B*L, H)."""
        with self.clock.stage("teacher"):
            hidden = self.hidden([input_ids], [positions])[0]
            with self.head.gathered() as head:
                return function(hidden, head)

    @contextmanager
    def shared_head(self, batches: Sequence[Any]) -> Iterator[None]:
        """Begin to gather the head for the loss of the first of `batches`; if there are several, they share the gather.

        The head arrives while the teacher's last layers are computed, since the host is ahead of them.
        """
        self.head.gather()
        with self.head.held() if len(batches) > 1 else nullcontext():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block without gradients and without timing; then release the gathered and prefetched weights."""
        try:
            with torch.no_grad(), self.clock.paused():
                yield
        finally:
            if isinstance(self.engine, deepspeed.DeepSpeedEngine):
                self.engine.optimizer.get_param_coordinator().release_and_reset_all(self.engine.module)


def load_teacher(
    config: Config,
    files: ModelFiles,
    vocab_size: int,
    comm: Comm,
    shape: FilterShape | None = None,
    clock: StageClock | None = None,
) -> Teacher:
    """Load the frozen teacher, without any optimizer state. Collective.

    With `shape` it can also return the hidden states of the layers that TED matches. `clock` measures the seconds of
    the teacher's stages in each step; None makes a new clock. Raises ConfigError if the model cannot be built, filled
    from `files` or prepared as section teacher asks, or if its head has fewer rows than `vocab_size`.
    """
    section = config.teacher
    assert section is not None, "the run has no teacher"
    device = torch.device(get_accelerator().current_device_name())
    if fault := product_fault(section, device):
        raise ConfigError(fault)
    stored = model_shape(files).as_sharded(section, config.train.precision)
    ds_config = teacher_ds_config(config, teacher_sizes(stored.largest_layer, stored.head))
    resident = section.place == "gpu"
    group = None if resident else comm.group_within(section.place)
    construction = device if resident else zero_init(ds_config, group)
    model = load_built(config, section, "teacher.path", files, comm, construction)
    check_vocabulary(model, vocab_size, "teacher.path")
    model.requires_grad_(False).eval()
    clock = clock or StageClock(device.type)
    head = FrozenHead(model.get_output_embeddings(), files.logit_form, clock)
    backbone, sequence = backbone_of(model), sequence_group(config, comm)
    taps = None if shape is None else LayerTaps(backbone, [pair[1] for pair in shape.pairs], files.num_layers)
    unquantized: Sequence[str] = ()
    if section.quantize != "none":
        shard = partial(deepspeed.zero.Init, config_dict_or_path=ds_config, data_parallel_group=group)
        decoder, split = layers_of(backbone, files.num_layers), _leave if resident else shard
        unquantized = quantize_layers(decoder, section, files.config, split)
    if resident:
        if section.compile_layers and taps is None:
            compile_whole(backbone, model.config, device.type)
        elif section.compile_layers:  # the hooks of the taps stay outside of what is compiled
            compile_layers(layers_of(backbone, files.num_layers), model.config)
        return Teacher(backbone, model, head, taps, None, clock, unquantized, sequence)
    prepare_layers(backbone, files.num_layers, section)
    layers = LayerByLayer(layers_of(backbone, files.num_layers)) if section.pass_size > 1 else None
    engine, _, _, _ = deepspeed.initialize(model=backbone, config=ds_config)
    engine.eval()
    assert not hasattr(engine.optimizer, "fp32_partitioned_groups_flat"), "the teacher's engine holds optimizer state"
    brake = GatherBrake(get_accelerator(), stored.largest_layer)
    time_gathers(engine.optimizer.get_param_coordinator(), brake, clock, TEACHER_GATHER)
    return Teacher(engine, model, head, taps, layers, clock, unquantized, sequence)


def _leave(module: nn.Module) -> None:
    """Leave the tensors of `module` complete."""
