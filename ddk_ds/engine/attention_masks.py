"""The masks of attention: none where a causal one is enough, and documents of one sample that do not see each other.

Documents are kept apart in two ways at once. Positions begin anew in each of them, which is transformers' own form of
packed sequences: flash attention goes by it (its kernels of variable length), and so do learned and rotary positions.
And every mask that a model makes for sdpa or eager, of a sliding window or of chunks too, is cut at the borders here:
several families make theirs without looking at the positions. engine/split_check.py measures that both are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, packed_sequence_mask_function

from ddk_ds.engine.sequence_parallel import SequenceGroup

_transformers_masks = {kernel: ALL_MASK_ATTENTION_FUNCTIONS[kernel] for kernel in ("sdpa", "eager")}
_running: list[torch.Tensor] = []
"""(B, L) the number of each token's document in its sample, in the pass that runs; empty if documents are joined."""


def use_own_masks() -> None:
    """Make models of this process mask by `documents_apart`, and sdpa work without a mask where causal is enough.

    Without `documents_apart` a sample is one sequence of tokens at positions 0, 1, 2, ..., so that attention is simply
    causal. When transformers is called without a mask, it expects packed sequences whose positions begin again, and
    builds a (B, 1, L, L) mask against them. With a mask torch's flash kernel cannot be used, and all L x L scores are
    computed instead of half.
    """
    for kernel in _transformers_masks:
        ALL_MASK_ATTENTION_FUNCTIONS[kernel] = partial(_mask, kernel)


@contextmanager
def documents_apart(positions: torch.Tensor | None) -> Iterator[None]:
    """Keep the documents of each sample apart in the passes of the block.

    `positions` (B, L) are those of the tokens in their documents; None: each sample is one sequence.
    """
    if positions is not None:
        _running.append((positions == 0).cumsum(1))
    try:
        yield
    finally:
        if positions is not None:
            _running.pop()


def backbone_inputs(
    backbone: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None,
    parts: int = 1,
    sequence: SequenceGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Return the arguments of a backbone's pass for token ids and positions (B, L), in a block of `documents_apart`.

    Of a sample that several ranks share (`sequence`) they are this rank's part.

    transformers' path to flash's kernels of variable length takes one row alone, and joins documents in silence if
    there are more: with flash attention each of `parts` micro-batches is a row (transformers' Flash Attention 2 with
    packed sequences).
    """
    if sequence is not None and sequence.shared:
        return sequence.inputs(input_ids, positions)
    if positions is None:
        return {"input_ids": input_ids}
    config: Any = backbone.config
    if config._attn_implementation == "flash_attention_2":
        input_ids, positions = input_ids.reshape(parts, -1), positions.reshape(parts, -1)
    return {"input_ids": input_ids, "position_ids": positions}


def sees_later_tokens(config: Any) -> bool:
    """Return True if a transformers model with this config has attention to later tokens, in text and not only images.

    EmbeddingGemma has it, and PaliGemma in its prompts. Gemma 4's "vision" is of images alone.
    """
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _mask(kernel: str, *arguments: Any, **options: Any) -> Any:
    """Return transformers' mask, cut at the borders of documents.

    With sdpa return None, its own causal mask, unless documents are kept apart, or a token is padding, cached or
    outside of an attention window.
    """
    if _running:
        inside = and_masks(options["mask_function"], packed_sequence_mask_function(_running[-1]))
        # In numbers also for sdpa: it would convert a mask of truth values in each layer, and keep it for the backward.
        return _transformers_masks["eager"](*arguments, **{**options, "mask_function": inside})
    queries = options["q_length"] if "q_length" in options else len(options["cache_position"])
    window = options.get("local_size")
    causal = (
        kernel == "sdpa"
        and options.get("attention_mask") is None
        and queries == options["kv_length"]
        and (window is None or options["kv_length"] < window)
        and not sees_later_tokens(options.get("config"))
    )
    return None if causal else _transformers_masks[kernel](*arguments, **options)
