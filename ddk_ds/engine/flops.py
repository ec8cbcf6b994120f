"""Floating-point operations of a token, counted from the shapes of weights. Pure.

Two counts of attention are in use. A position sees half of the sequence on average: that is what a causal kernel
computes, and what finished runs are charged with. The whole square is what MFU is defined by (arXiv 2204.02311), what
torch's FlopCounterMode counts, and what reproduces the paper's Table 12: plans and the ledger's MFU take it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.model_files import ModelFiles

# Learned positions are looked up, not multiplied (GPT-2, GPT-Neo, StarCoder; OPT).
_LOOKED_UP = re.compile(r"(\.wpe|\.embed_positions|\.position_embeddings)\.weight$")


def count_forward_flops(
    shapes: Iterable[tuple[int, ...]], config: dict[str, Any], sequence_length: int, *, causal: bool = True
) -> float:
    """2 P + 2 L H T a token (4 L H T if not `causal`): a multiply and an add for every weight, and attention.

    P: all weights, the vocabulary's matrix once, for the head (looking up an embedding computes nothing). Attention: L
    layers of width H (heads x size of a head), whose scores and weighted sums each take 2 H a position, of T positions
    or on average of half of them. `shapes` are those of the weights, `config` is the model's config.json.
    """
    sizes = {True: 0, False: 0}
    vocab_size, largest = config.get("vocab_size"), 0
    for shape in shapes:
        is_vocabulary = len(shape) == 2 and shape[0] == vocab_size
        sizes[is_vocabulary] += math.prod(shape)
        largest = max(largest, math.prod(shape) if is_vocabulary else 0)
    layers, hidden, heads = (
        next((config[key] for key in keys if config.get(key)), 0)
        for keys in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"), ("num_attention_heads", "n_head"))
    )
    width = heads * config["head_dim"] if config.get("head_dim") else hidden
    return 2.0 * (sizes[False] + largest) + (2.0 if causal else 4.0) * layers * width * sequence_length


def model_flops(files: ModelFiles, sequence_length: int, *, causal: bool = True) -> float:
    """`count_forward_flops` of a model's tensors, without those that are only looked up."""
    shapes = [tensor.shape for name, tensor in files.tensors.items() if not _LOOKED_UP.search(f".{name}")]
    return count_forward_flops(shapes, files.config, sequence_length, causal=causal)


def training_flops(config: Config, student: float, teacher: float) -> float:
    """Of one token's training: 3 student forwards (its backward is two) + 1 teacher forward.

    The filters of `ted_filters` learn from their layer's output and the head: two frozen forwards. With gamma 0 the
    teacher does not run. Activations that are computed again (gradient checkpointing) are not counted.
    """
    if config.method == "ted_filters":
        return student + teacher
    return 3 * student + (teacher if teacher_runs(config) else 0.0)


def teacher_runs(config: Config) -> bool:
    """Whether a step of this run has a forward pass of the teacher."""
    distils = config.loss.gamma > 0 or bool(config.loss.gamma_end)
    return config.teacher is not None and (distils or config.method in ("ted", "ted_filters", "doremi_proxy"))
