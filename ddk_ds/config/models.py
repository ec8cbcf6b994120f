"""Sections `student` and `teacher`."""

from __future__ import annotations

from typing import Literal

from ddk_ds.config.sections import Positive, Section


class Model(Section):
    """A Hugging Face causal language model."""

    path: str
    """Directory or hub name of the model: config.json, safetensors weights, tokenizer."""
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention kernel that transformers is asked for."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded parameters rest between uses."""
    trust_remote_code: bool = False
    """Run the Python code that the model's directory brings along; only for code that you have read."""
    leaf_modules: tuple[str, ...] = ()
    """Class names that ZeRO-3 gathers as one (mixture-of-experts blocks)."""


class Student(Model):
    """The model in training."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more student compute."""


class Teacher(Model):
    """The frozen model. None of its options changes a number of the run."""

    shard_within: Literal["world", "node", "gpu"] = "world"
    """Ranks that hold one copy of the weights between them: all; those of a node, so that gathers stay in it; each."""
    micro_batches_per_pass: Positive = 1
    """Micro-batches whose hidden states one pass computes, layer by layer: each gather of a weight serves them all."""
