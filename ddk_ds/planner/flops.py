"""Floating-point operations of whole runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ddk_ds.config import Config
from ddk_ds.engine.flops import training_flops


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
