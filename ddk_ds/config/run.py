"""One run's configuration, and the rules between its sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ddk_ds.config.sections import (
    Checkpoint,
    Data,
    Guard,
    Limits,
    Loss,
    Mixture,
    Model,
    Natural,
    Optimizer,
    Section,
    Stop,
    Student,
    Train,
)
from ddk_ds.errors import ConfigError


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run, and of its directory."""
    output_dir: str = "runs"
    """Directory that holds the runs' directories."""
    init_from: str | None = None
    """A checkpoint, or a run's directory, whose weights, optimizer, step and place in the data this run begins with."""
    seed: Natural = 0
    """Seed of the data order and of dropout."""
    method: Literal["ddk", "cpt"] = "ddk"
    """ddk: distillation from a teacher (Eq. 3); cpt: cross-entropy alone, without a teacher."""
    student: Student
    """The model in training."""
    teacher: Model | None = None
    """The frozen model; needed by `method: ddk`."""
    data: Data
    mixture: Mixture = Mixture()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    stop: Stop
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    limits: Limits = Limits()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys, merged into the dictionary made from the rest; contradictions are errors."""

    @property
    def run_dir(self) -> Path:
        """Directory of this run."""
        return Path(self.output_dir) / self.name

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if self.method == "ddk" and self.teacher is None:
            raise ValueError("method: ddk needs a teacher: set teacher.path, or method: cpt")
        if self.method == "cpt" and self.teacher is not None:
            raise ValueError("method: cpt takes no teacher: remove teacher, or set method: ddk")
        if self.method == "cpt" and self.mixture.controller.startswith("ddk"):
            raise ValueError(
                f"mixture.controller: {self.mixture.controller} compares with a teacher, which method: cpt has not: "
                "set mixture.controller to by_size, equal or static"
            )
        if (self.mixture.controller == "static") != (self.mixture.proportions is not None):
            raise ValueError("mixture.proportions goes with mixture.controller: static, and only with it")
        if self.stop.steps is not None and self.optimizer.warmup_steps >= self.stop.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, stop.steps {self.stop.steps}: the learning "
                "rate would never reach its peak; lower the first"
            )
        if self.stop.discrepancy is not None and self.teacher is None:
            raise ValueError("stop.discrepancy compares with a teacher, which method: cpt has not: remove it")
        uses_nvme = "nvme" in (self.optimizer.offload, self.student.offload_params) or (
            self.teacher is not None and self.teacher.offload_params == "nvme"
        )
        if uses_nvme and self.train.nvme_path is None:
            raise ValueError("something is offloaded to nvme: set train.nvme_path to a directory on a local disk")
        if self.data.domains is not None and len(set(self.data.domains)) != len(self.data.domains):
            raise ValueError(f"data.domains names a domain twice: {', '.join(self.data.domains)}")
        return self

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches a rank runs in one optimizer step on `world_size` ranks; ConfigError if they do not divide."""
        per_pass = self.train.micro_batch_samples * world_size
        count, rest = divmod(self.train.global_batch_samples, per_pass)
        if rest or not count:
            raise ConfigError(
                f"train.global_batch_samples {self.train.global_batch_samples} is not a multiple of "
                f"train.micro_batch_samples {self.train.micro_batch_samples} x {world_size} ranks = {per_pass}: "
                "change one of the three"
            )
        return count
