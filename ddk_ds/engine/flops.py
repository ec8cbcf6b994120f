"""Floating-point operations of a token, counted from the shapes of weights. Pure.

Two counts of attention are in use. A position sees half of the sequence on average: that is what a causal kernel
computes, and what finished runs are charged with. The whole square is what MFU is defined by (arXiv 2204.02311), what
torch's FlopCounterMode counts, and what reproduces the paper's Table 12: plans and the ledger's MFU take it.

Floating-point operations of whole runs. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.model_files import ModelFiles

# Dense bf16 tensor-core FLOP/s by the device's name, longest match first (the vendor's data sheets).
PEAK_FLOP_PER_S = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
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


@dataclass(frozen=True)
class RunFlops:
    """Floating-point operations of whole runs on the same tokens."""

    cpt: float
    """Continued pre-training: 3 student forwards a token."""
    kd: float | None
    """And 1 teacher forward; None without a teacher."""
    controller: float | None
    """DDK's own: the student measured before each interval and at the end, the teacher once (it never changes)."""
    own: float
    """The configured run, its measurements included: every method measures at the same times."""

    @property
    def ddk(self) -> float | None:
        """KD and the controller."""
        return None if self.kd is None or self.controller is None else self.kd + self.controller

    @property
    def kd_over_cpt(self) -> float | None:
        """Table 12 of the paper has 3.68 for Qwen1.5 14B to 1.8B."""
        return None if self.kd is None else self.kd / self.cpt

    @property
    def ddk_over_kd(self) -> float | None:
        """Table 12 of the paper has 1.0069, with the teacher measured at every interval."""
        return None if self.kd is None or self.ddk is None else self.ddk / self.kd


def run_flops(
    config: Config, student: float, teacher: float | None, *, steps: int, measurements: int, domains: int
) -> RunFlops:
    """`student` and `teacher` are FLOPs of a token's forward pass; `measurements` are those of the student's."""
    tokens = steps * config.train.global_batch_samples * config.data.sequence_length
    measured = domains * config.data.validation_samples * config.data.sequence_length
    measuring = measurements * student * measured + (teacher or 0.0) * measured
    return RunFlops(
        cpt=3 * student * tokens,
        kd=None if teacher is None else (3 * student + teacher) * tokens,
        controller=None if teacher is None else measuring,
        own=training_flops(config, student, teacher or 0.0) * tokens + measuring,
    )


def utilisation(flops: float, seconds: float, device_name: str) -> float | None:
    """FLOPs over seconds as a share of the device's peak (MFU); None where the peak is not known."""
    names = sorted((name for name in PEAK_FLOP_PER_S if name in device_name), key=len)
    return flops / seconds / PEAK_FLOP_PER_S[names[-1]] if names else None
