"""Sections `student` and `teacher`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

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
    whole_layers: bool = True
    """Gather a layer's weights as one: a hook for each layer in place of one for each of its parts; false: as
    DeepSpeed does by itself."""
    leaf_modules: tuple[str, ...] = ()
    """Further class names that ZeRO-3 gathers as one (mixture-of-experts blocks, where layers are not)."""
    compile_layers: bool = False
    """torch.compile of each layer: norms, rotary positions and gates become one kernel each; the first step takes
    longer, once a model."""

    @model_validator(mode="after")
    def _layers_agree(self) -> Model:
        if self.compile_layers and not self.whole_layers:
            raise ValueError("compile_layers takes a layer's weights gathered as one: set whole_layers to true")
        return self


class Student(Model):
    """The model in training."""

    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass: less memory, about a third more student compute; selective: all but
    the results of matrix products and of attention, which costs little."""


class Teacher(Model):
    """The frozen model. Where and how its weights are gathered changes no number of the run."""

    shard_within: Literal["world", "node", "gpu"] = "world"
    """Ranks that hold one copy of the weights between them: all; those of a node, so that gathers stay in it; each."""
    micro_batches_per_pass: Positive | Literal["auto"] = 1
    """Micro-batches whose hidden states one pass computes, layer by layer: each gather of a weight serves them all;
    auto: as many as memory holds by preflight's estimate."""
    quantize: Literal["none", "int8"] = "none"
    """Weights of its layers in 8 bits, a scale by row: half the memory and half the bytes of a gather in bf16, and
    other numbers, the perplexities that it is measured by too (docs/scale.md)."""

    @model_validator(mode="after")
    def _passes_agree(self) -> Teacher:
        if self.micro_batches_per_pass != 1 and not self.whole_layers:
            raise ValueError("micro_batches_per_pass goes layer by layer: set whole_layers to true")
        return self

    @property
    def per_pass(self) -> int:
        """Micro-batches of a pass; 1 while `auto` is not settled (train/teacher_passes.py)."""
        return 1 if self.micro_batches_per_pass == "auto" else self.micro_batches_per_pass
