"""What the distillation head computes and with what: options as values, and the tuples that its parts pass on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.divergences import DIVERGENCES, WITH_COEFFICIENT, Divergence

Engine = Literal["auto", "eager", "native", "triton"]
LogitsDtype = Literal["float32", "model"]

# Half-precision gradients wait for so many chunks: adding up the weight's gradient in float32 costs a read and a write
# of it each time. (On a CPU only where they do not lie over the logits.)
GROUP_CHUNKS = 4
# Bytes of a chunk's float32 logits of both models, and on a GPU of those gradients, where chunk_tokens is not given.
# Fewer tokens than MIN_CHUNK would make the matmuls thin.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1_250_000_000}
MIN_CHUNK, MAX_CHUNK = 512, 8192


class LogitForm(NamedTuple):
    """Logits of a head: softcap * tanh(scale * x / softcap), or scale * x where softcap is 0 (Gemma, Cohere)."""

    scale: float = 1.0
    softcap: float = 0.0


_PLAIN = LogitForm()


class TeacherTopK(NamedTuple):
    """A teacher known by its k likeliest tokens: ids (n, k) int64, log-probabilities (n, k) at the loss's temperature.

    The rest of its mass is one bucket, compared with the rest of the student's.
    """

    ids: Tensor
    log_probs: Tensor


class Rows(NamedTuple):
    """What a row kernel reads and writes: the element-wise part of m tokens."""

    student: Tensor
    """(m, V) logits before their `LogitForm`; a kernel may overwrite them."""
    teacher: Tensor | TeacherTopK | None
    """The same of the teacher, or its top k; None: cross-entropy alone."""
    labels: Tensor
    """(m,) int64, negative where ignored."""
    ce: Tensor
    """(m,) float64, written; 0 where ignored."""
    divergence: Tensor
    """(m,) float64, written; 0 where ignored."""
    grad: Tensor | None
    """(m, V), written: ce_weight dCE + gamma T^2 dD by row. It may lie in the student's memory. None: not wanted."""


class KDLoss(NamedTuple):
    """A distillation loss and its parts: sums over valid tokens divided by `num_valid`.

    `loss = ce_weight * ce + gamma * T^2 * kl` is differentiable; `ce` and `kl` (the divergence at temperature T, in
    nats, without T^2) are detached scalars; the last two are (n,) by token, 0 where ignored, where they were asked for.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    token_ce: Tensor | None = None
    token_kl: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """Everything of a call that is not a tensor."""

    vocab_size: int
    """Tokens of the tokenizer; rows of the heads from here on are padding and take no part."""
    gamma: float
    """Weight of the divergence, >= 0. With 0 the teacher is not touched."""
    temperature: float = 1.0
    """T > 0, of both softmaxes in the divergence."""
    divergence: Divergence = "forward_kl"
    """See `divergences`."""
    coefficient: float = 0.5
    """beta or alpha of the divergences that have one, in (0, 1)."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy, >= 0. With 0 it is not computed and reported as 0."""
    scale_by_temperature: bool = True
    """Multiply the divergence by T^2, which keeps its gradient's scale (Hinton et al. 2015)."""
    ignore_index: int = -100
    """Label of the tokens that take no part."""
    chunk_tokens: int = 0
    """Tokens whose logits are held at a time; 0: `default_chunk_tokens`. They take 2 * chunk_tokens * vocab_size."""
    logits_dtype: LogitsDtype = "float32"
    """"model" rounds the logits of a half-precision model: faster on some CPUs, useless near the teacher."""
    student_form: LogitForm = _PLAIN
    """Scale and softcap of the student's logits."""
    teacher_form: LogitForm = _PLAIN
    """Scale and softcap of the teacher's logits."""
    engine: Engine = "auto"
    """The row kernel; for tests and benchmarks."""

    @property
    def kd_weight(self) -> float:
        """What the divergence's value is multiplied by."""
        return self.gamma * (self.temperature**2 if self.scale_by_temperature else 1.0)

    def check(self) -> None:
        """Raise ConfigError naming the first option that is out of range."""
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

    def pack(self) -> tuple[list[float], list[int], list[str]]:
        """As lists of plain values: custom operators take no objects."""
        numbers = [self.gamma, self.temperature, self.coefficient, self.ce_weight]
        sizes = [self.vocab_size, self.ignore_index, self.chunk_tokens, int(self.scale_by_temperature)]
        names: list[str] = [self.divergence, self.logits_dtype, self.engine]
        return [float(x) for x in (*numbers, *self.student_form, *self.teacher_form)], sizes, names

    @classmethod
    def unpack(cls, numbers: list[float], sizes: list[int], names: list[str]) -> Options:
        """Inverse of `pack`."""
        gamma, temperature, coefficient, ce_weight = numbers[:4]
        vocab_size, ignore_index, chunk_tokens, scale_by_temperature = sizes
        divergence, logits_dtype, engine = names
        return cls(
            vocab_size=vocab_size,
            gamma=gamma,
            temperature=temperature,
            divergence=cast(Divergence, divergence),
            coefficient=coefficient,
            ce_weight=ce_weight,
            scale_by_temperature=bool(scale_by_temperature),
            ignore_index=ignore_index,
            chunk_tokens=chunk_tokens,
            logits_dtype=cast(LogitsDtype, logits_dtype),
            student_form=LogitForm(*numbers[4:6]),
            teacher_form=LogitForm(*numbers[6:8]),
            engine=cast(Engine, engine),
        )


def default_chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk, a function of vocabulary and device alone: a resume adds up in the same order."""
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    per_element = 2 * 4 if device_type == "cpu" else 2 * 4 + GROUP_CHUNKS * 2
    fitting = budget // (per_element * vocab_size) // 128 * 128
    return max(MIN_CHUNK, min(MAX_CHUNK, fitting))
