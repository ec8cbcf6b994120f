"""One optimizer step's own parts: its dropout seed, its batches' sums and its line of the ledger."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.kernels import KDLoss
from ddk_ds.train.step import StepMetrics, seed_step, step_clock, step_numbers, train_step


def test_a_steps_dropout_is_its_own() -> None:
    """Other steps, ranks and seeds draw other numbers, and the same again the same: SHA-256 of the three, 63 bits."""
    drawn = {}
    for key in ((1, 2, 3), (1, 2, 4), (1, 3, 2), (2, 2, 3)):
        seed_step(*key)
        drawn[key] = torch.rand(4)
        digest = hashlib.sha256("/".join(map(str, key)).encode()).hexdigest()
        torch.manual_seed(int(digest[:16], 16) // 2)
        assert torch.equal(torch.rand(4), drawn[key])
    assert len({tuple(values.tolist()) for values in drawn.values()}) == 4


class Clock:
    """Counts what waits, as the student's clock does."""

    def __init__(self) -> None:
        self.waits: list[str] = []

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        self.waits.append(name)
        yield

    def take_seconds(self) -> dict[str, float]:
        return {"forward": 2.0}

    def take_peaks(self) -> dict[str, int]:
        return {"forward": 7}

    def take_allocator(self) -> dict[str, int]:
        return {"reserved": 9}


class Doubled(SingleProcess):
    """The first of two ranks that hold the same."""

    world_size = 2

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


class Recorder:
    """A student and a method in one: they note what the step asks of them. A batch's loss is its number of labels."""

    router = sequence = None

    def __init__(self) -> None:
        self.clock = Clock()
        self.backwards: list[tuple[float, bool]] = []
        self.passes: list[int] = []
        self.batches: list[Any] = []
        self.rates: list[float] = []

    @contextlib.contextmanager
    def teacher_outputs(self, batches: Sequence[Any]) -> Iterator[list[int]]:
        self.passes.append(len(batches))
        yield [int(batch.input_ids[0, 0]) for batch in batches]

    def loss(self, student: Any, batch: Any, teacher_output: int) -> KDLoss:
        assert teacher_output == int(batch.input_ids[0, 0]), "another batch's output of the teacher"
        self.batches.append(batch)
        count = torch.tensor(float((batch.labels >= 0).sum()))
        losses = KDLoss(count / batch.num_valid, count * 10, count * 100)
        if not batch.by_token:
            return losses
        valid = (batch.labels.flatten() >= 0).float() / batch.num_valid
        return losses._replace(token_ce=valid * (1 + batch.input_ids.flatten()), token_kl=valid / 4)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.backwards.append((float(loss), last))

    def update(self, rate: float, numbers: torch.Tensor) -> tuple[float, list[float]]:
        self.rates.append(rate)
        return 0.5, numbers.tolist()

    def step_sums(self) -> torch.Tensor:
        return torch.tensor([1.5, 2.5], dtype=torch.float64)

    def end_step(self, sums: Sequence[float]) -> dict[str, Any]:
        return {"weights": sums}


def test_a_step_adds_up_its_micro_batches() -> None:
    """Three micro-batches of 2 x 4 tokens, 6 labels each; the other rank has the same. The teacher runs on two."""
    domains = [[0, 2], [2, 2], [0, 0]]
    micro_batches: Any = [
        {"input_ids": torch.full((2, 4), number), "domain": torch.tensor(of), "sample_id": torch.zeros(2)}
        for number, of in enumerate(domains)
    ]
    both: Any = Recorder()
    metrics = train_step(
        both,
        both,
        micro_batches,
        learning_rate=0.25,
        progress=0.5,
        teacher_pass_size=2,
        num_domains=3,
        device=torch.device("cpu"),
        comm=Doubled(),
        meanwhile=lambda: [float(len(both.backwards)), 0.0],
    )
    assert metrics.domain_tokens == [18, 0, 18]  # 3 samples of 3 labels on each of two ranks
    assert both.passes == [2, 1] and both.rates == [0.25]
    # DeepSpeed averages gradients over the ranks: each backward pass is of twice the loss.
    assert both.backwards == [(pytest.approx(2 * 6 / 36), last) for last in (False, False, True)]
    assert (metrics.loss, metrics.ce, metrics.kl) == (pytest.approx(1.0), 360.0, 3600.0)
    assert (metrics.grad_norm, metrics.method) == (0.5, {"weights": [3.0, 5.0]})
    assert metrics.agreed == [6.0, 0.0], "called after the last of three backward passes, and summed over two ranks"
    assert [batch.labels.tolist() for batch in both.batches] == [[[k, k, k, -100]] * 2 for k in range(3)]
    assert all(batch.progress == 0.5 and float(batch.num_valid) == 36 for batch in both.batches)
    assert metrics.domain_losses == [] and not any(batch.by_token for batch in both.batches)
    assert both.clock.waits == ["sync", "sync"]
    assert (metrics.seconds, metrics.peaks, metrics.allocator) == ({"forward": 2.0}, {"forward": 7}, {"reserved": 9})
    alone: Any = Recorder()
    arguments: Any = {"learning_rate": 0.1, "progress": 0.0, "num_domains": 3, "device": torch.device("cpu")}
    train_step(alone, alone, micro_batches, **arguments, comm=SingleProcess())
    assert alone.passes == [1, 1, 1] and all(batch.weights is None for batch in alone.batches)
    weighted: Any = Recorder()
    train_step(weighted, weighted, micro_batches, **arguments, comm=SingleProcess(), domain_weights=[2.0, 9.0, 0.5])
    assert [batch.weights.tolist() for batch in weighted.batches] == [[2.0, 0.5], [0.5, 0.5], [2.0, 2.0]]
    assert weighted.batches[0].row_weights.tolist() == [2.0] * 4 + [0.5] * 4
    assert all(float(batch.num_valid) == 18 for batch in weighted.batches)


def test_tokens_that_are_no_targets_do_not_count_and_a_step_without_any_is_none() -> None:
    """Of 2 x 4 tokens; the first of a sample is predicted by nothing."""
    targets = torch.tensor([[True, False, True, True], [False] * 4])
    micro: Any = {"input_ids": torch.full((2, 4), 7), "domain": torch.tensor([1, 0]), "sample_id": torch.zeros(2)}
    arguments: Any = {"learning_rate": 0.1, "progress": 0.0, "num_domains": 2, "device": torch.device("cpu")}
    for mask, labels in ((targets, [[-100, 7, 7, -100], [-100] * 4]), (targets & False, [[-100] * 4] * 2)):
        both: Any = Recorder()
        metrics = train_step(both, both, [{**micro, "targets": mask}], **arguments, comm=SingleProcess())
        count = sum(label == 7 for row in labels for label in row)
        assert [batch.labels.tolist() for batch in both.batches] == [labels]
        assert metrics.domain_tokens == [0, count] and metrics.loss == (1.0 if count else 0.0)


def test_a_steps_losses_are_added_up_by_domain() -> None:
    """Of micro-batches 0 and 1 each token has a cross-entropy of 1 and 2 nats, and a divergence of 1/4; two ranks."""
    micro_batches: Any = [
        {"input_ids": torch.full((2, 4), number), "domain": torch.tensor(of), "sample_id": torch.zeros(2)}
        for number, of in enumerate([[0, 2], [2, 2]])
    ]
    both: Any = Recorder()
    arguments: Any = {"learning_rate": 0.1, "progress": 0.0, "num_domains": 3, "device": torch.device("cpu")}
    metrics = train_step(both, both, micro_batches, **arguments, comm=Doubled(), by_domain=True)
    of_two_ranks = [6.0, 0.0, 6.0 + 24.0, 6 / 4, 0.0, 18 / 4]
    assert metrics.domain_losses == pytest.approx(of_two_ranks, rel=1e-6)
    assert "domain_losses" not in step_numbers(metrics)


def test_the_ledgers_numbers_of_a_step() -> None:
    metrics = StepMetrics(math.inf, 2.0, math.nan, 0.25, [3, 4], {}, {"forward": 1.0}, {"forward": 2})
    numbers = {"loss": None, "ce": 2.0, "kl": None, "grad_norm": 0.25, "domain_tokens": [3, 4]}
    assert step_numbers(metrics) == numbers
    with_method = StepMetrics(1.0, 2.0, 0.0, 0.25, [3, 4], {"mse": 0.5})
    assert step_numbers(with_method) == {**numbers, "loss": 1.0, "kl": 0.0, "method": {"mse": 0.5}}


def test_the_ledgers_clock_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"forward": 2_345_500_001, "update": 2_345_499_999}
    metrics = StepMetrics(1.0, 1.0, 0.0, 1.0, [300, 700], {}, {"forward": 1.23456789}, peaks)
    clock = step_clock(metrics, {"step": 4.0, "data": 0.00004}, 1e12)
    assert clock == {
        "step_s": 4.0,
        "data_s": 0.0,
        "forward_s": 1.2346,
        "tokens_per_s": 250.0,
        "mfu": None,
        "peak_memory_gb": 2.346,
        "peak_gb": {"forward": 2.346, "update": 2.345},
    }
    failed = {"reserved": 71_999_500_001, "retries": 3, "ooms": 0}
    with_gpu = step_clock(replace(metrics, allocator=failed), {"step": 4.0, "data": 0.00004}, 1e12)
    assert with_gpu == clock | {"reserved_gb": 72.0, "alloc_retries": 3, "alloc_ooms": 0}
    three = StepMetrics(1.0, 1.0, 0.0, 1.0, [1000], {}, {}, peaks)
    assert step_clock(three, {"step": 3.0}, 1e12)["tokens_per_s"] == 333.3
    # An H100 SXM does 989e12 dense bf16 operations a second (NVIDIA's data sheet).
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert step_clock(metrics, {"step": 4.0}, 4 * 989e12 / 3)["mfu"] == 0.3333
