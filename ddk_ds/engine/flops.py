"""Floating-point operations (FLOPs) of models, of training steps and of runs, counted from shapes of weights. Pure.

`forward_flops` defines the count; everything else here applies it to a model's files, to a step or to a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddk_ds.config import Config
from ddk_ds.engine.config_sizes import attention_width, config_size, used_weights

if TYPE_CHECKING:  # it imports transformers, for which a plan's --help should not wait
    from ddk_ds.engine.model_files import ModelFiles

# Dense bf16 tensor-core FLOP/s by the device's name, longest match first (the vendor's data sheets).
PEAK_FLOP_PER_S = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
# Learned positions are looked up, not multiplied (GPT-2, GPT-Neo, StarCoder; OPT).
_LOOKED_UP = re.compile(r"(\.wpe|\.embed_positions|\.position_embeddings)\.weight$")


def forward_flops(
    num_weights: float, num_layers: int, attention_width: int, sequence_length: int, *, causal: bool
) -> float:
    """Return the FLOPs of one token's forward pass: 2 P + 4 L H T, or 2 P + 2 L H T if `causal`.

    A multiplication and an addition count as two. P = `num_weights` is the number of weights that a token is multiplied
    by: every weight of the layers, but of a mixture of experts only those that it is sent to, and the output head;
    looking up an embedding computes nothing. In each of the L layers a token's attention scores and the weighted sum of
    values take 2 H each for every position attended to, where H = `attention_width` is heads x size of a head.

    There are two counts of attention. Without `causal` a token attends to all T positions: MFU is defined by this count
    (arXiv 2204.02311), torch's FlopCounterMode uses it, and it reproduces the paper's Table 12; plans and the ledger's
    MFU take it. With `causal` a token attends to T / 2 positions on average, which is what a causal kernel computes;
    the costs of finished runs are counted like this.
    """
    return 2.0 * num_weights + (2.0 if causal else 4.0) * num_layers * attention_width * sequence_length


def count_forward_flops(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], sequence_length: int, *, causal: bool = True
) -> float:
    """Return `forward_flops` of the model with weights of these `shapes`, by name, and this `config` (its config.json).

    Tensors that are only looked up do not count.
    """
    layers, width = config_size(config, "layers"), attention_width(config)
    return forward_flops(active_weights(shapes, config), layers, width, sequence_length, causal=causal)


def active_weights(shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> float:
    """Return the number of weights that a token is multiplied by, given the `shapes` of all weights by name.

    Of the matrices with one row per word of the vocabulary only the largest counts, as the output head: it may be tied.
    """
    number, head = 0.0, 0
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[0] == config.get("vocab_size"):
            head = max(head, math.prod(shape))
        elif not _LOOKED_UP.search(f".{name}"):
            number += used_weights(name, shape, config)
    return number + head


def model_flops(files: ModelFiles, sequence_length: int, *, causal: bool = True) -> float:
    """Return `forward_flops` of a model on disk."""
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    return count_forward_flops(shapes, files.config, sequence_length, causal=causal)


def training_flops(config: Config, student: float, teacher: float) -> float:
    """Return the FLOPs of training on one token, given `forward_flops` of `student` and `teacher`.

    They are 3 forward passes of the student (its backward pass counts as two) and 1 of the teacher. With gamma 0 the
    teacher does not run. In a run of `ted_filters` both models are frozen: one forward pass each, and the filters
    themselves are not counted. Activations that gradient checkpointing computes again are not counted.
    """
    if config.preset.freezes_student:
        return student + teacher
    return 3 * student + (teacher if teacher_runs(config) else 0.0)


def step_flops(config: Config, student: ModelFiles, teacher: ModelFiles | None, world_size: int) -> float:
    """Return the FLOPs of one optimizer step on one of `world_size` ranks, with attention counted as for MFU."""
    length = config.data.sequence_length
    models = (0.0 if files is None else model_flops(files, length, causal=False) for files in (student, teacher))
    return config.train.global_batch_samples * length * training_flops(config, *models) / world_size


def teacher_runs(config: Config) -> bool:
    """Return True if a step of this run has a forward pass of the teacher."""
    return config.loads_teacher and (config.distils or config.preset.always_runs_teacher)


@dataclass(frozen=True)
class RunFlops:
    """FLOPs of complete runs of several methods on the same tokens."""

    cpt: float
    """Continued pre-training: 3 forward passes of the student for each token."""
    kd: float | None
    """Distillation: `cpt` and 1 forward pass of the teacher for each token; None without a teacher."""
    evaluation: float
    """Measurements of the student before each interval and at the end, and one of the teacher, which never changes."""
    own: float
    """The configured run, with `evaluation`: every method measures at the same times."""

    @property
    def controller(self) -> float | None:
        """FLOPs that DDK's controller needs in addition to `kd`: `evaluation`; None without a teacher."""
        return None if self.kd is None else self.evaluation

    @property
    def ddk(self) -> float | None:
        """FLOPs of a run of DDK: `kd` plus `controller`; None without a teacher."""
        return None if self.kd is None else self.kd + self.evaluation

    @property
    def kd_over_cpt(self) -> float | None:
        """FLOPs of `kd` divided by those of `cpt`; None without a teacher.

        The paper's Table 12 has 3.68 (Qwen1.5 14B to 1.8B).
        """
        return None if self.kd is None else self.kd / self.cpt

    @property
    def ddk_over_kd(self) -> float | None:
        """FLOPs of `ddk` divided by those of `kd`; None without a teacher.

        The paper's Table 12 has 1.0069, because it measures the teacher again at every interval.
        """
        return None if self.kd is None or self.ddk is None else self.ddk / self.kd


def run_flops(
    config: Config,
    student: float,
    teacher: float | None,
    *,
    steps: int,
    measurements: int,
    domains: int,
    taught: int | None = None,
) -> RunFlops:
    """Count the FLOPs of a run of `steps` steps that measures the student `measurements` times on `domains` domains.

    `student` and `teacher` are `forward_flops` of the two models; `teacher` is None in a run without one. `taught` is
    the number of samples that go through the teacher; None: all that the method asks it for.
    """
    samples = steps * config.train.global_batch_samples
    tokens = samples * config.data.sequence_length
    share = 1.0 if taught is None else taught / samples
    measured = domains * config.data.validation_samples * config.data.sequence_length
    evaluation = measurements * student * measured + (teacher or 0.0) * measured
    return RunFlops(
        cpt=3 * student * tokens,
        kd=None if teacher is None else (3 * student + teacher) * tokens,
        evaluation=evaluation,
        own=training_flops(config, student, share * (teacher or 0.0)) * tokens + evaluation,
    )


def utilisation(flops: float, seconds: float, device_name: str) -> float | None:
    """Return MFU: `flops` done in `seconds`, divided by the device's peak; None if its peak is not known."""
    names = sorted((name for name in PEAK_FLOP_PER_S if name in device_name), key=len)
    return flops / seconds / PEAK_FLOP_PER_S[names[-1]] if names else None
