"""The optimizer's section, and the steps of its learning rate's schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ddk_ds.config.sections import Fraction, Natural, NonNegativeFloat, Positive, PositiveFloat, Section


class Optimizer(Section):
    """AdamW, with a learning rate that rises linearly from 0 and then follows a schedule."""

    learning_rate: PositiveFloat = 3e-5
    """Peak learning rate."""
    min_learning_rate: NonNegativeFloat = 3e-6
    """Learning rate at the run's end; a constant schedule has no use for it."""
    warmup_steps: Natural = 1000
    """Optimizer steps of the linear warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. cosine, linear: it falls until the run's end. constant: it stays. wsd
    (warm-up-stable-decay, arXiv 2404.06395): it stays and falls in the last `decay_steps`, so that a longer run has
    the same steps before its decay, and a fork of any of their checkpoints can begin the decay there."""
    decay_steps: Positive | None = None
    """Last steps of the run, in which the learning rate of wsd falls; null: a tenth of the run."""
    decay_shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"
    """Shape in which it falls; arXiv 2405.18392 finds 1 - sqrt(progress) the best."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: PositiveFloat = 1e-8
    """Constant in AdamW's denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases (tensors of one axis) have none."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down to it; 0: no clipping."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Memory that holds the optimizer's states; none: the device's own."""
    fused: bool = True
    """Use torch's fused AdamW, which updates the states in one pass on GPU and CPU; false: one operation at a time."""

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Optimizer:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}: lower it"
            )
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps is {self.decay_steps}, and schedule {self.schedule} has none: set schedule: wsd, or "
                "leave decay_steps out"
            )
        return self


def decay_begin(options: Optimizer, total_steps: int) -> int:
    """Return the step at which the learning rate begins to fall in a run of `total_steps`."""
    if options.schedule != "wsd":
        return options.warmup_steps
    decay = options.decay_steps or max(1, round(total_steps / 10))
    return max(options.warmup_steps, total_steps - decay)


def check_schedule(options: Optimizer, total_steps: int) -> None:
    """Raise ValueError if a run of `total_steps` ends before its warm-up, or is shorter than warm-up and decay."""
    decay = options.decay_steps or 0
    if options.warmup_steps >= total_steps or options.warmup_steps + decay > total_steps:
        also, mend = (f" and optimizer.decay_steps {decay}", " or decay_steps") if decay else ("", "")
        raise ValueError(
            f"optimizer.warmup_steps is {options.warmup_steps}{also}, the run has at most {total_steps:,} steps: the "
            f"learning rate would never reach its peak; lower optimizer.warmup_steps{mend}"
        )
