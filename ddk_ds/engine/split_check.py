"""A check of a loaded model: its backbone and its head, taken apart, give the logits of its own class; it is causal.

Training runs the backbone, and multiplies by the head inside the loss. An architecture that does anything else between
or after the two, such as ModernBERT's dense layer before the head, would train as another model in silence. One whose
tokens see later ones, such as XLNet without its masks, would see what it is to predict. And one that lets a document of
a sample see the one before it, through attention or a state, would train on other text than a run says that keeps them
apart.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import nn
from torch.nn import functional

from ddk_ds.comm import Comm
from ddk_ds.engine.compiling import uncompiled
from ddk_ds.engine.document_attention import by_masks
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.sequence_parallel import whole_samples
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.engine.unloaded_models import backbone_of
from ddk_ds.engine.whole_models import WholeModel
from ddk_ds.errors import ConfigError
from ddk_ds.kernels.rows_eager import apply_form

MAX_TOKENS = 128
"""Tokens of the row that is compared: few, so that all of its logits take no memory to speak of."""
# Largest difference over the largest logit, by the dtype of the head, to which both round its products (2^-9 in bf16);
# the model's own class may round again what it makes of them. A missing layer, factor or cap changes logits by a large
# part of their size.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
# The parts of a sample that ranks share have other shapes than the whole, so products are rounded otherwise: in bf16
# SmolLM2-135M makes 3 % of the largest logit of that. A state that does not cross from part to part changes far more.
_OF_PARTS = 2.5
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
    sequence = model.sequence
    row = input_ids[:1, : MAX_TOKENS if sequence is None else MAX_TOKENS // sequence.size * sequence.size]
    other = row.clone()
    other[:, -1] = (other[:, -1] + 1) % vocab_size

    logits = partial(_logits, vocab_size=vocab_size)
    try:
        with uncompiled(), model.evaluating():
            both = torch.cat([row, other])
            ours, with_other = model(both, logits).unflatten(0, (2, -1)).float()
            with whole_samples(sequence):
                # Of both rows too: of another shape products are rounded otherwise, which the layers of some models in
                # bf16 make 3 % of the largest logit.
                theirs = _whole_logits(model.whole, both)[:1, :, :vocab_size].float()
            theirs = (theirs if sequence is None else sequence.part(theirs))[0]
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
    of_split = limit if sequence is None else _OF_PARTS * limit
    if not difference <= of_split:
        raise ConfigError(
            f"{key}.path: {type(model.whole).__name__} cannot be distilled: its logits are not those of its backbone "
            f"and output head, but differ by up to {difference:.3g} where the largest is {largest:.3g} (a difference "
            f"of {of_split:.2g} would be rounding)"
        )
    if not moved <= limit:
        raise ConfigError(
            f"{key}.path: {type(model.whole).__name__} cannot be distilled: its tokens see later ones (another last "
            f"token changes the logits before it by up to {moved:.3g}): choose another model"
        )


def check_documents(model: Student | Teacher, input_ids: torch.Tensor, vocab_size: int, key: str, comm: Comm) -> None:
    """Raise ConfigError if a document's logits depend on the document before it in its sample, or on its place there.

    Collective. The arguments are those of `check_split`.
    """
    if leak := leak_of_documents(model, input_ids, vocab_size, comm):
        raise ConfigError(
            f"data.documents is masked, but {key}.path {type(model.whole).__name__} "
            f"({model.whole.config.model_type}) {leak}: set data.documents to joined, or choose another model"
        )


def leak_of_documents(
    model: Student | Teacher | WholeModel, input_ids: torch.Tensor, vocab_size: int, comm: Comm
) -> str:
    """Return in what a model does not keep the documents of a sample apart; "" if it does. Collective.

    The first row is tried at its full length, since windows and chunks of attention can be as long, in two passes of
    two rows with different borders. On a GPU it is tried by masks too, which keep short documents apart there.
    """
    leak = _leak(model, input_ids[0], vocab_size, comm)
    if not leak and input_ids.device.type != "cpu":
        with by_masks():
            leak = _leak(model, input_ids[0], vocab_size, comm)
    return leak


def _leak(model: Student | Teacher | WholeModel, row: torch.Tensor, vocab_size: int, comm: Comm) -> str:
    first, second = row.tensor_split([len(row) * 3 // 8])  # chunks of attention end elsewhere in it when it comes first
    positions = torch.cat([torch.arange(len(part)) for part in (first, second, second, first)]).view(2, -1)
    spread = torch.linspace(0, len(second) - 1, MAX_TOKENS // 2 - _LOOKED_AT).long()
    places = torch.cat([torch.arange(_LOOKED_AT).clamp(max=len(second) - 1), spread]).to(row)
    # The second document behind the first one, and where it comes first.
    looked_at = torch.cat([len(first) + places, len(row) + places])

    def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        return _logits(hidden[looked_at], head, vocab_size).float()

    with uncompiled(), model.evaluating(), whole_samples(model.sequence):
        (behind, alone), (behind_other, _) = (
            model(torch.stack([torch.cat([one, second]), torch.cat([second, one])]), logits, positions).chunk(2)
            for one in (first, (first + 1) % vocab_size)
        )
    seen, moved = (behind_other - behind).abs().amax(1), (behind - alone).abs().amax(1)
    # A near tie of a mixture of experts may turn at a few places.
    numbers = torch.stack([seen[:_LOOKED_AT].median(), moved.quantile(0.75), alone.abs().max()])
    by_tokens, by_place, largest = comm.all_reduce_max(numbers.nan_to_num(torch.inf, torch.inf)).tolist()
    limit = _LIMITS[model.whole.get_output_embeddings().weight.dtype] * largest
    # Products of the same shape are rounded alike, so that what is seen of other tokens is found where it is little.
    for what, by, most in (("other tokens in", by_tokens, limit / 10), ("its place behind", by_place, limit)):
        if not by <= most:
            return (
                f"does not keep documents apart: {what} the document before it in a sample change a document's logits "
                f"by {by:.3g} where the largest is {largest:.3g} (a difference of {most:.2g} would be rounding)"
            )
    return ""


def _logits(hidden: torch.Tensor, head: OutputHead, vocab_size: int) -> torch.Tensor:
    """Return the logits (n, vocab_size) of hidden states (n, H)."""
    # In the head's own dtype: a copy of it in another one would take gigabytes.
    bias = None if head.bias is None else head.bias[:vocab_size]
    return apply_form(functional.linear(hidden, head.weight[:vocab_size], bias), head.form)[0]


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
