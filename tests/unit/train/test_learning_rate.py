"""The learning rate by step, for each schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from ddk_ds.config import Optimizer
from ddk_ds.train.learning_rate import learning_rate


def rates(steps: int, total: int, warmup: int, peak: float = 1.0, least: float = 0.1, **more: Any) -> list[float]:
    """Return the learning rates of the first steps."""
    options = Optimizer(learning_rate=peak, min_learning_rate=least, warmup_steps=warmup, **more)
    return [learning_rate(step, total, options) for step in range(steps)]


def by_transformers(make: Any, steps: int, warmup: int, peak: float) -> list[float]:
    """Return the rates of transformers' schedule that `make` returns for an optimizer, with our warm-up.

    Its rate before its first step is 0: its warm-up is one step ahead, all after it is at the same steps.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*theirs[1 : warmup + 1], *theirs[warmup:]]


def test_the_learning_rate_by_hand() -> None:
    """Warm-up of 4 steps to 1, then a cosine over 6 steps to 0.1; cos(pi k / 6) is 1, sqrt(3)/2, 1/2, 0, ..."""
    root = math.sqrt(3) / 2
    falling = [0.55 + 0.45 * cosine for cosine in (1, root, 0.5, 0, -0.5, -root, -1)]
    expected = [0.25, 0.5, 0.75, 1.0, *falling, 0.1, 0.1]  # it stays at its minimum
    assert rates(13, 10, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [1, 7])
def test_the_learning_rate_is_that_of_transformers(warmup: int) -> None:
    total, peak, least = 50, 3e-5, 3e-6
    cosine = partial(
        get_cosine_with_min_lr_schedule_with_warmup,
        num_warmup_steps=warmup,
        num_training_steps=total,
        min_lr=least,
    )
    expected = by_transformers(cosine, total + 1, warmup, peak)
    assert rates(total + 1, total, warmup, peak, least) == pytest.approx(expected, rel=1e-9)
    line = partial(get_linear_schedule_with_warmup, num_warmup_steps=warmup, num_training_steps=total)
    expected = by_transformers(line, total + 1, warmup, peak)
    found = rates(total + 1, total, warmup, peak, 0.0, schedule="linear")
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-20)
    constant = rates(total, total, warmup, peak, least, schedule="constant")
    assert constant[warmup:] == pytest.approx([peak] * (total - warmup), rel=1e-12)


@pytest.mark.parametrize("shape", ["1-sqrt", "linear", "cosine"])
def test_a_late_decay_is_that_of_transformers(shape: str) -> None:
    total, warmup, decay, peak, least = 60, 5, 12, 2e-4, 2e-5
    wsd = partial(
        get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=total,
        decay_type=shape,
        min_lr_ratio=least / peak,
    )
    options = {"schedule": "wsd", "decay_steps": decay, "decay_shape": shape}
    found = rates(total + 1, total, warmup, peak, least, **options)
    expected = by_transformers(wsd, total + 1, warmup, peak)
    assert found[warmup:] == pytest.approx(expected[warmup : total + 1], rel=1e-9)  # its warm-up begins at the minimum
    # A longer run has the same steps before its decay, so a fork can begin its decay at any of them.
    assert rates(total + 40, total + 40, warmup, peak, least, **options)[: total - decay] == found[: total - decay]


def test_a_decay_of_no_given_length_is_a_tenth_of_the_run() -> None:
    found = rates(51, 50, 2, schedule="wsd", decay_shape="linear")
    assert found[:46] == [0.5, *[1.0] * 45] and found[46:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_a_learning_rate_whose_warmup_is_none_or_all() -> None:
    assert rates(3, 2, 0) == pytest.approx([1.0, 0.55, 0.1])
    assert rates(5, 3, 3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.1])
    assert rates(4, 3, 8) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
