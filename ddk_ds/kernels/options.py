"""Options of the distillation head, its result, and the tuples that its parts pass to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.divergences import DIVERGENCES, WITH_COEFFICIENT, Divergence

Engine = Literal["auto", "eager", "native", "triton"]
LogitsDtype = Literal["float32", "model"]

# Half-precision gradients of this many chunks go through one matmul: each addition to the weight's float32 gradient
# reads and writes all of it. (On a CPU only where they do not lie over the logits.)
GROUP_CHUNKS = 4
# Where chunk_tokens is not given: bytes for both models' float32 logits of a chunk, on a GPU also for those gradients.
# Matmuls of fewer tokens than MIN_CHUNK are slow.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1_250_000_000}
MIN_CHUNK, MAX_CHUNK = 512, 8192
# Columns of a logits buffer are a multiple of this, so that loads are wide and matmuls aligned for any vocabulary.
ALIGN = 64


class LogitForm(NamedTuple):
    """Logits of a head: softcap * tanh(scale * x / softcap), or scale * x where softcap is 0 (Gemma, Cohere)."""

    scale: float = 1.0
    softcap: float = 0.0


_PLAIN = LogitForm()


class TeacherTopK(NamedTuple):
    """A teacher that is not here, known by at most k tokens of each row at the loss's temperature.

    The tokens are its k likeliest (`top_k_of`) or, with the share of each among draws and no tail, some that were drawn
    from it. The rest of its probability is one bucket, which is compared with the rest of the student's. Its log is
    here since 1 less the sum of the k probabilities has no digits left where the teacher is sure.
    """

    ids: Tensor
    """(n, k) int64, each token of a row once; -1 after a row's last one, and there the log-probability is -inf."""
    log_probs: Tensor
    """(n, k) log-probabilities of the k tokens."""
    log_tail: Tensor
    """(n,) log of the probability of all other tokens together; -inf where there are none."""


class LabelLogProbs(NamedTuple):
    """Tensors for the log-probability that a teacher gives to each label, at temperature 1."""

    labels: Tensor
    """(n,) int64, negative where there is none."""
    log_probs: Tensor
    """(n,) float32, written; 0 where there is no label."""


class Rows(NamedTuple):
    """Tensors that a row kernel reads and writes for m tokens.

    Their width W is the vocabulary's V or up to ALIGN - 1 more. What lies between is padding: it may hold anything,
    takes no part, and a kernel may overwrite it.
    """

    student: Tensor
    """(m, W) logits before their `LogitForm`; a kernel may overwrite them."""
    teacher: Tensor | TeacherTopK | None
    """The teacher's logits (m, W) or its top k; None for cross-entropy alone."""
    labels: Tensor
    """(m,) int64, negative where ignored."""
    ce: Tensor
    """(m,) float64, written; 0 where ignored."""
    divergence: Tensor
    """(m,) float64, written; 0 where ignored."""
    grad: Tensor | None
    """(m, W), written: ce_weight dCE + gamma T^2 dD by row, and 0 as padding; it can lie in the student's memory.

    None if not wanted.
    """


class KDLoss(NamedTuple):
    """A distillation loss and its parts: sums over valid tokens divided by `num_valid`.

    `loss = ce_weight * ce + gamma * T^2 * kl` is differentiable; `ce` and `kl` (the divergence at temperature T, in
    nats, without T^2) are detached scalars. The last two are (n,), by token, 0 where ignored; None unless requested.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    token_ce: Tensor | None = None
    token_kl: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """Everything of a call that is not a tensor. A forgotten gamma would train without the teacher: no default."""

    vocab_size: int
    """Tokens of the tokenizer; further rows of the heads are padding and take no part."""
    gamma: float
    """Weight of the divergence, >= 0. With 0 the teacher is not read."""
    temperature: float = 1.0
    """Temperature T > 0 of both softmaxes in the divergence."""
    divergence: Divergence = "forward_kl"
    """Name of the divergence; `divergences.py` has the formulas."""
    coefficient: float = 0.5
    """beta or alpha in (0, 1), for the divergences that have one."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy, >= 0. With 0 it is not computed and reported as 0."""
    scale_by_temperature: bool = True
    """Multiply the divergence by T^2, which keeps its gradient's scale (Hinton et al. 2015)."""
    ignore_index: int = -100
    """Label of tokens that take no part in the loss."""
    chunk_tokens: int = 0
    """Tokens whose logits are held at a time: 2 * chunk_tokens * vocab_size numbers; 0 for `default_chunk_tokens`."""
    logits_dtype: LogitsDtype = "float32"
    """"model" rounds the logits of a half-precision model: faster on some CPUs, useless near the teacher."""
    student_form: LogitForm = _PLAIN
    """Scale and softcap of the student's logits."""
    teacher_form: LogitForm = _PLAIN
    """Scale and softcap of the teacher's logits."""
    engine: Engine = "auto"
    """Row kernel to use; tests and benchmarks set it."""

    @property
    def kd_weight(self) -> float:
        """Factor of the divergence in the loss: gamma, times T^2 if it is scaled by the temperature."""
        return self.gamma * (self.temperature**2 if self.scale_by_temperature else 1.0)

    def check(self) -> None:
        """Raise ConfigError, which names the first option that is out of range and its value."""
        for name, value in (("gamma", self.gamma), ("ce_weight", self.ce_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}: give a finite number >= 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature is {self.temperature}: give a finite number > 0")
        if self.divergence not in DIVERGENCES:
            raise ConfigError(f"divergence is {self.divergence!r}: give one of {', '.join(DIVERGENCES)}")
        if self.divergence in WITH_COEFFICIENT and not 0 < self.coefficient < 1:
            raise ConfigError(f"coefficient is {self.coefficient}: {self.divergence} needs one between 0 and 1")
        if self.chunk_tokens < 0:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}: give 1 or more, or 0 for a default")
        if self.logits_dtype not in ("float32", "model"):
            raise ConfigError(f"logits_dtype is {self.logits_dtype!r}: give 'float32' or 'model'")
        for name, form in (("student_form", self.student_form), ("teacher_form", self.teacher_form)):
            if not (math.isfinite(form.scale) and math.isfinite(form.softcap) and form.softcap >= 0):
                raise ConfigError(f"{name} is {form}: give finite numbers, softcap >= 0")


def padded(vocab_size: int) -> int:
    """Return the width W of a row of logits."""
    return -(-vocab_size // ALIGN) * ALIGN


def default_chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Return the number of tokens in a chunk for this vocabulary and kind of device.

    It depends on nothing else, so that a resumed run adds in the same order.
    """
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    per_element = 2 * 4 if device_type == "cpu" else 2 * 4 + GROUP_CHUNKS * 2
    fitting = budget // (per_element * vocab_size) // 128 * 128
    return max(MIN_CHUNK, min(MAX_CHUNK, fitting))
