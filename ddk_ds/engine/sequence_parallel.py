"""Sequence parallelism: the ranks of a group share each sample, and each computes a part of its positions.

DeepSpeed's Ulysses (arXiv 2309.14509; for transformers' models in ALST, arXiv 2506.13996): before attention the ranks
exchange positions for heads, so that each has the whole sequence for some of the heads, and after it they exchange
back. All else in a model works position by position. The loss is a sum over tokens that is divided once by their number
on all ranks, so nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
import transformers.masking_utils
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.engine.config_sizes import divides_heads
from ddk_ds.errors import ConfigError

_find_packed_sequences = transformers.masking_utils.find_packed_sequence_indices


class SequenceGroup:
    """The ranks that share each sample, and this rank's part of its positions."""

    def __init__(self, comm: Comm, size: int) -> None:
        self.size = size
        self.rank = comm.rank % size
        self.group = comm.group_of(size)
        self.shared = True
        """False in a block of `whole_samples`."""
        self.positions: torch.Tensor | None = None
        """(B, L / size) positions of this rank's tokens in the pass that runs."""

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's positions (B, L / size) of a tensor (B, L)."""
        return tensor.chunk(self.size, 1)[self.rank] if self.shared else tensor

    def inputs(self, input_ids: torch.Tensor, positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Return the arguments of a backbone's pass for this rank's part of token ids and positions (B, L)."""
        length = input_ids.shape[1]
        assert length % self.size == 0, f"{length} positions do not divide into {self.size} ranks"
        if positions is None:
            positions = torch.arange(length, device=input_ids.device).expand(len(input_ids), -1)
        self.positions = self.part(positions).contiguous()
        return {"input_ids": self.part(input_ids).contiguous(), "position_ids": self.positions}


def sequence_group(config: Config, comm: Comm) -> SequenceGroup | None:
    """Return the group of this rank, the same for both models; None if each sample is one rank's own. Collective."""
    size = config.train.sequence_parallel
    return None if size == 1 else _group(cast(Hashable, comm), size)


@lru_cache(maxsize=1)  # both models share it: each process group of NCCL holds buffers of its own
def _group(comm: Any, size: int) -> SequenceGroup:
    return SequenceGroup(comm, size)


@contextmanager
def whole_samples(sequence: SequenceGroup | None) -> Iterator[None]:
    """Compute all positions of each sample on every rank in the block: checks of a model, and continuations."""
    if sequence is None:
        yield
        return
    sequence.shared = False
    try:
        yield
    finally:
        sequence.shared = True


def split_attention(kernel: str, sequence: SequenceGroup) -> str:
    """Register attention whose positions lie on the ranks of `sequence`, computed by `kernel`; return its name."""
    name = f"ulysses_{kernel}"
    core, mask = ALL_ATTENTION_FUNCTIONS[kernel], ALL_MASK_ATTENTION_FUNCTIONS[kernel]

    @lru_cache
    def ulysses(batch: int, heads: int, kv_heads: int, width: int) -> Any:
        return UlyssesSPAttentionHF(
            core,
            batch_size=batch,
            attn_head_count=heads,
            attn_head_size=width,
            kv_head_count=kv_heads,
            num_hidden_layers=0,
            process_group=sequence.group,
            seq_length_is_variable=True,
        )

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        if hasattr(module, "num_key_value_groups"):  # Ulysses changes it where it repeats heads
            module.num_key_value_groups = query.shape[1] // key.shape[1]
        if not sequence.shared:
            return core(module, query, key, value, attention_mask, **options)
        split = ulysses(len(query), query.shape[1], key.shape[1], query.shape[3])
        assert sequence.positions is not None, "called outside of a pass"
        own = sequence.positions[: len(query)]  # of some of the rows, where a layer takes micro-batches one by one
        return split(module, query, key, value, attention_mask, **{**options, "position_ids": own})

    def full_mask(**options: Any) -> Any:
        """Return the mask of all positions: it is used after the exchange."""
        if sequence.shared:
            for key in ("q_length", "kv_length"):
                if key in options:
                    options[key] *= sequence.size
            if "cache_position" in options:  # transformers 4
                old = options["cache_position"]
                options["cache_position"] = torch.arange(len(old) * sequence.size, device=old.device)
        return mask(**options)

    def packed(position_ids: torch.Tensor) -> Any:
        """Find no packed sequences in the part of a sample: transformers would mask by the part's own indices."""
        return None if sequence.shared else _find_packed_sequences(position_ids)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, full_mask)
    transformers.masking_utils.find_packed_sequence_indices = packed
    return name


def check_sequence_parallel(config: dict[str, Any], key: str, kernel: str, size: int, *, masked: bool = False) -> None:
    """Raise ConfigError if a model's attention cannot be split over `size` ranks.

    `config` is its config.json's; `masked` is True if documents are kept apart.
    """
    if size == 1:
        return
    asked = f"train.sequence_parallel is {size}, but"
    if kernel == "eager":
        raise ConfigError(f"{asked} attention of {key}.path is computed by eager, which is not split: set it to 1")
    if masked and kernel == "flash_attention_2":
        # Its kernels of variable length take one row, in which the ranks' parts of several samples would be mixed.
        raise ConfigError(f"{asked} flash_attention_2 of {key} does not keep documents apart then: set it to sdpa")
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise ConfigError(f"{asked} config.json of {key}.path names no number of attention heads: set it to 1")
    if not divides_heads(size, heads, kv_heads):
        raise ConfigError(
            f"{asked} {key}.path has {heads} attention heads and {kv_heads} of keys and values: choose a number that "
            "divides the first, and divides the second or is a multiple of it"
        )
