"""The masks of attention: none where a causal one is enough, and documents of one sample that do not see each other.

Documents are kept apart in several ways at once. Positions begin anew in each of them, which is transformers' own form
of packed sequences: flash attention goes by it (its kernels of variable length), and so do learned and rotary
positions. sdpa goes through the documents one by one (engine/document_attention.py). And every mask that a model makes
for sdpa or eager, of a sliding window or of chunks too, is cut at the borders here: several families make theirs
without looking at the positions. engine/split_check.py measures that it is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers.masking_utils
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, packed_sequence_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ddk_ds.engine.document_attention import Documents, attention_in_documents, documents_now, documents_of
from ddk_ds.engine.sequence_parallel import SequenceGroup
from ddk_ds.engine.transfers import to_device

_find_packed_sequences = transformers.masking_utils.find_packed_sequence_indices
_transformers_masks = {kernel: ALL_MASK_ATTENTION_FUNCTIONS[kernel] for kernel in ("sdpa", "eager")}


def use_own_masks() -> None:
    """Make models of this process mask as `backbone_pass` asks, and sdpa work without a mask where causal is enough.

    Outside of it a sample is one sequence of tokens at positions 0, 1, 2, ..., so that attention is simply
    causal. When transformers is called without a mask, it expects packed sequences whose positions begin again, and
    builds a (B, 1, L, L) mask against them. With a mask torch's flash kernel cannot be used, and all L x L scores are
    computed instead of half.
    """
    for kernel in _transformers_masks:
        ALL_MASK_ATTENTION_FUNCTIONS[kernel] = partial(_mask, kernel)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_in_documents
    transformers.masking_utils.find_packed_sequence_indices = _packed


@contextmanager
def backbone_pass(
    backbone: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None,
    parts: int = 1,
    sequence: SequenceGroup | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the arguments of a backbone's pass for token ids (B, L), and keep documents apart in the block.

    Of a sample that several ranks share (`sequence`) they are this rank's part.

    transformers' path to flash's kernels of variable length takes one row alone, and joins documents in silence if
    there are more: with flash attention each of `parts` micro-batches is a row (transformers' Flash Attention 2 with
    packed sequences).

    Args:
        positions: (B, L) on the host, of the tokens in their documents; None: each sample is one sequence.
    """
    on_device = to_device(positions, input_ids.device)
    apart: AbstractContextManager[None] = nullcontext()
    if positions is not None and on_device is not None:
        apart = documents_of(backbone, positions, on_device)
    with apart:
        if sequence is not None and sequence.shared:
            yield sequence.inputs(input_ids, on_device)
        elif on_device is None:
            yield {"input_ids": input_ids}
        else:
            config: Any = backbone.config
            if config._attn_implementation == "flash_attention_2":
                input_ids, on_device = input_ids.reshape(parts, -1), on_device.reshape(parts, -1)
            yield {"input_ids": input_ids, "position_ids": on_device}


def sees_later_tokens(config: Any) -> bool:
    """Return True if a transformers model with this config has attention to later tokens, in text and not only images.

    EmbeddingGemma has it, and PaliGemma in its prompts. Gemma 4's "vision" is of images alone.
    """
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _packed(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return transformers' numbers of packed sequences: None where documents are known, since it waits for a GPU."""
    return _find_packed_sequences(position_ids) if documents_now() is None else None


@torch.compiler.disable  # a resident teacher compiled as a whole would have a graph for each set of lengths
def _longest(documents: Documents) -> int:
    return max(documents.lengths)


def _mask(kernel: str, *arguments: Any, **options: Any) -> Any:
    """Return transformers' mask, cut at the borders of documents.

    With sdpa return None, its own causal mask, unless documents are kept apart by the mask, or a token is padding,
    cached or outside of an attention window.
    """
    documents = documents_now()
    queries = options["q_length"] if "q_length" in options else len(options["cache_position"])
    window = options.get("local_size")
    complete = options.get("attention_mask") is None and queries == options["kv_length"]
    causal = (
        kernel == "sdpa"
        and complete
        and (documents is None or documents.one_by_one)
        and (window is None or (options["kv_length"] if documents is None else _longest(documents)) < window)
        and not sees_later_tokens(options.get("config"))
    )
    if causal:
        return None
    if documents is not None:
        inside = and_masks(options["mask_function"], packed_sequence_mask_function(documents.numbers))
        options = {**options, "mask_function": inside}
    # In numbers also for sdpa: it would convert a mask of truth values in each layer, and keep it for the backward.
    in_numbers = documents is not None or complete
    return _transformers_masks["eager" if in_numbers else kernel](*arguments, **options)
