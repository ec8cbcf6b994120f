"""Linear layers of a frozen model in 8 bits: a weight is an integer times its row's scale (LLM.int8's absmax, arXiv
2208.07339, without its outlier columns).

ZeRO-3 shards and gathers one dtype, so a weight's integers rest as the bytes of a tensor in the compute dtype: half as
many elements in bf16. Products are made in the compute dtype, in which the integers are exact.

The teacher on its ZeRO-3 engine: weights that never change, passes that need no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.engine.ds_config import bucket_sizes, teacher_ds_config
from ddk_ds.engine.filters import FilterShape, LayerTaps
from ddk_ds.engine.head import TEACHER_GATHER, FrozenHead, HeadFunction
from ddk_ds.engine.layers import LayerByLayer, layers_of, prepare_layers
from ddk_ds.engine.model_files import ModelFiles, model_shape
from ddk_ds.engine.stage_clock import StageClock, time_gathers
from ddk_ds.engine.student import backbone_of, check_vocabulary, load_sharded
from ddk_ds.errors import ConfigError

LEVELS = 127


class Int8Linear(nn.Module):
    """y = (x @ q.T) * scale + bias for q (out, in) int8; nothing of it has a gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (out, in), `bias` (out,) or None, in the compute dtype."""
        super().__init__()
        integers, scale = quantize(weight)
        self.packed = nn.Parameter(integers.view(weight.dtype), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.packed.view(torch.int8).to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> integers int8 (out, in) in -127..127, and scale (out,) in the weight's dtype."""
    scale = (weight.float().abs().amax(1) / LEVELS).to(weight.dtype)
    steps = torch.where(scale > 0, scale, 1).float()
    return (weight.float() / steps[:, None]).round().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


@torch.no_grad()
def quantize_layers(layers: nn.ModuleList, ds_config: dict[str, Any], group: Any) -> None:
    """Replace every linear layer in the sharded `layers`, one layer of the model after the other. Collective.

    Raises ConfigError where there is none, or one whose rows do not fill whole elements.
    """
    replaced = 0
    for layer in layers:
        found = {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}
        new = nn.ModuleDict()
        for name, module in found.items():
            parts = [part for part in (module.weight, module.bias) if part is not None]
            with deepspeed.zero.GatheredParameters(parts):
                width = module.weight.shape[1]
                if width % module.weight.itemsize:
                    raise ConfigError(f"teacher.quantize: {name} has rows of {width}, which do not fill whole elements")
                new[name.replace(".", "/")] = Int8Linear(module.weight.data, module.bias)
        deepspeed.zero.Init(module=new, config_dict_or_path=ds_config, data_parallel_group=group)
        for name in found:
            layer.set_submodule(name, new[name.replace(".", "/")])
        replaced += len(found)
    if not replaced:
        raise ConfigError("teacher.quantize: int8, and its layers have no torch.nn.Linear: set none")


class Teacher:
    """The frozen model: a backbone on an engine without optimizer, and its head beside it."""

    def __init__(
        self, engine: Any, head: FrozenHead, taps: LayerTaps | None, layers: LayerByLayer | None, clock: StageClock
    ) -> None:
        self.engine = engine
        self.head = head
        self._taps = taps
        self._layers = layers
        self.clock = clock

    @torch.inference_mode()
    def hidden(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Token ids (B, L) of micro-batches -> the last hidden states (B*L, H) of each, by one pass; no graph."""
        with self.clock.stage("teacher"), self._parts(len(batches)):
            ids = batches[0] if len(batches) == 1 else torch.cat(list(batches))
            states = self.engine(input_ids=ids, use_cache=False).last_hidden_state
            return [part.flatten(0, 1) for part in states.chunk(len(batches))]

    def tapped(self, batches: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """`hidden`, and the hidden states (B*L, H) of the layers that TED matches."""
        assert self._taps is not None, "loaded without matched layers"
        with self._taps.open() as states:
            hidden = self.hidden(batches)
        # What inference mode made cannot be kept for a gradient.
        tapped = [[part.clone() for part in state.chunk(len(batches))] for state in states]
        return [(one, [state[place] for state in tapped]) for place, one in enumerate(hidden)]

    def __call__(self, input_ids: torch.Tensor, function: HeadFunction) -> Any:
        """input_ids (B, L) -> function(hidden (B*L, H), head)."""
        with self.clock.stage("teacher"):
            hidden = self.hidden([input_ids])[0]
            with self.head.gathered() as head:
                return function(hidden, head)

    @contextmanager
    def head_for(self, batches: Sequence[Any]) -> Iterator[None]:
        """Around the use of the head by micro-batches of one pass: where they are several, they share its gather."""
        with self.head.gathered() if len(batches) > 1 else nullcontext():
            yield

    def _parts(self, count: int) -> Any:
        if count == 1:
            return nullcontext()
        assert self._layers is not None, "loaded for one micro-batch a pass"
        return self._layers.parts(count)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes; releases what they gathered and prefetched."""
        try:
            with torch.no_grad(), self.clock.paused():
                yield
        finally:
            self.engine.optimizer.get_param_coordinator().release_and_reset_all(self.engine.module)


def load_teacher(
    config: Config,
    files: ModelFiles,
    vocab_size: int,
    comm: Comm,
    shape: FilterShape | None = None,
    clock: StageClock | None = None,
) -> Teacher:
    """The teacher, frozen, without any optimizer state; it can give the hidden states of the layers in `shape`.

    Collective. Raises ConfigError where the files do not fit.
    """
    assert config.teacher is not None, "a run without a teacher asked for one"
    resting = model_shape(files).at_rest(config.teacher, config.train.precision)
    ds_config = teacher_ds_config(config, bucket_sizes(resting.largest_layer))
    group = comm.group_within(config.teacher.shard_within)
    model = load_sharded(config, config.teacher, "teacher.path", files, ds_config, comm, group)
    check_vocabulary(model, vocab_size, "teacher.path")
    model.requires_grad_(False).eval()
    clock = clock or StageClock(get_accelerator().device_name())
    head = FrozenHead(model.get_output_embeddings(), files.logit_form, clock)
    backbone = backbone_of(model)
    taps = None if shape is None else LayerTaps(backbone, [pair[1] for pair in shape.pairs], files.num_layers)
    if config.teacher.quantize == "int8":
        quantize_layers(layers_of(backbone, files.num_layers), ds_config, group)
    prepare_layers(backbone, files.num_layers, config.teacher)
    layers = LayerByLayer(layers_of(backbone, files.num_layers)) if config.teacher.per_pass > 1 else None
    engine, _, _, _ = deepspeed.initialize(model=backbone, config=ds_config)
    engine.eval()
    assert not hasattr(engine.optimizer, "fp32_partitioned_groups_flat"), "the teacher's engine holds optimizer state"
    time_gathers(engine.optimizer.get_param_coordinator(), clock, TEACHER_GATHER)
    return Teacher(engine, head, taps, layers, clock)
