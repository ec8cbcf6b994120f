"""A check of a loaded model: its backbone and its head, taken apart, give the logits of its own class; it is causal.

Training runs the backbone, and multiplies by the head inside the loss. An architecture that does anything else between
or after the two, such as ModernBERT's dense layer before the head, would train as another model in silence. One whose
tokens see later ones, such as XLNet without its masks, would see what it is to predict.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import nn
from torch.nn import functional

from ddk_ds.comm import Comm
from ddk_ds.engine.compiling import uncompiled
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.engine.unloaded_models import backbone_of
from ddk_ds.errors import ConfigError
from ddk_ds.kernels.rows_eager import apply_form

MAX_TOKENS = 128
"""Tokens of the row that is compared: few, so that all of its logits take no memory to speak of."""
# Largest difference over the largest logit, by the dtype of the head, to which both round its products (2^-9 in bf16);
# the model's own class may round again what it makes of them. A missing layer, factor or cap changes logits by a large
# part of their size.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
# Positions before a changed token whose logits are compared. Of a mixture of experts a few may change by rounding.
_LOOKED_AT = 8
# What torch says of a product of two dtypes.
_OF_DTYPES = re.compile("dtype|scalar type")


def check_split(model: Student | Teacher, input_ids: torch.Tensor, vocab_size: int, key: str, comm: Comm) -> None:
    """Raise ConfigError if the logits of our backbone and head differ from those of the model's class. Collective.

    Raises it too where the model multiplies tensors of different dtypes, as CTRL does in bf16, and where another last
    token changes the logits before it.

    Args:
        model: as loaded for training.
        input_ids: tokens (B, L) of this rank; the first row's first `MAX_TOKENS` are used.
        vocab_size: number of logits that are compared.
        key: the model's section of the configuration.
    """
    row = input_ids[:1, :MAX_TOKENS]
    other = row.clone()
    other[:, -1] = (other[:, -1] + 1) % vocab_size

    def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        # In the head's own dtype: a copy of it in another one would take gigabytes.
        bias = None if head.bias is None else head.bias[:vocab_size]
        return apply_form(functional.linear(hidden, head.weight[:vocab_size], bias), head.form)[0]

    try:
        with uncompiled(), model.evaluating():
            ours, with_other = model(torch.cat([row, other]), logits).unflatten(0, (2, -1)).float()
            theirs = _whole_logits(model.whole, row)[..., :vocab_size].flatten(0, 1).float()
    except RuntimeError as error:
        if not _OF_DTYPES.search(str(error)):
            raise
        raise ConfigError(
            f"{key}.path: {type(model.whole).__name__} does not compute with all of its parameters in "
            f"{model.whole.get_output_embeddings().weight.dtype}: set train.precision to fp32, or choose another {key}"
        ) from error
    before = slice(-1 - _LOOKED_AT, -1)
    moved = (with_other[before] - ours[before]).abs().amax(1).median()
    numbers = torch.stack([(ours - theirs).abs().max(), theirs.abs().max(), moved])
    difference, largest, moved = comm.all_reduce_max(numbers.nan_to_num(torch.inf, torch.inf)).tolist()
    limit = _LIMITS[model.whole.get_output_embeddings().weight.dtype] * largest
    if not difference <= limit:
        raise ConfigError(
            f"{key}.path: {type(model.whole).__name__} cannot be distilled: its logits are not those of its backbone "
            f"and output head, but differ by up to {difference:.3g} where the largest is {largest:.3g} (a difference "
            f"of {limit:.2g} would be rounding)"
        )
    if not moved <= limit:
        raise ConfigError(
            f"{key}.path: {type(model.whole).__name__} cannot be distilled: its tokens see later ones (another last "
            f"token changes the logits before it by up to {moved:.3g}): choose another model"
        )


def _whole_logits(whole: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, L, V) of a transformers model whose backbone belongs to an engine, by its own forward.

    The engine gathers the backbone's weights; those of each module outside of it are gathered when it is called, since
    a head that is tied to the embedding is released with it.
    """
    inside = set(backbone_of(whole).modules())
    with ExitStack() as gathered:

        def gather(module: nn.Module, _arguments: Any) -> None:
            own: list[Any] = list(module.parameters(recurse=False))
            released = [p for p in own if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
            gathered.enter_context(GatheredParameters(released))

        for module in whole.modules():
            if module not in inside:
                gathered.callback(module.register_forward_pre_hook(gather).remove)
        logits: torch.Tensor = whole(input_ids=input_ids, use_cache=False).logits
    return logits
