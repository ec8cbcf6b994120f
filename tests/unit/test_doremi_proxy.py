"""DoReMi's proxy at steps that lack a domain: its excess, the loss and its gradient, against plain computations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ddk_ds.config import Doremi
from ddk_ds.engine.head import OutputHead
from ddk_ds.kernels import Options
from ddk_ds.methods.base import Batch, next_token_labels
from ddk_ds.methods.doremi import DoremiProxy

VOCAB, LENGTH, WIDTH = 11, 5, 6


def proxy(num_domains: int, state: dict[str, Any] | None = None, **options: float) -> DoremiProxy:
    reference: Any = None  # only a reference model's losses are used, and they are given
    return DoremiProxy(reference, Options(VOCAB, gamma=0.0), Doremi(**options), num_domains, state or {})


def step(method: DoremiProxy, excess: list[float], tokens: list[float]) -> dict[str, Any]:
    return method.end_step([*(np.array(excess) * np.array(tokens)), *tokens])


def test_the_weight_of_a_harder_domain() -> None:
    """Ten domains, batches of 8, one domain 0.05 nats harder, 2,000 steps.

    By the authors' rule its mean weight is about 0.96; if an absent domain's excess were 0 it would be 0.93. Each step
    goes through a checkpoint.
    """
    rng, eta, c, steps = np.random.default_rng(0), 1.0, 1e-3, 2000
    weights, total = [0.1] * 10, [0.0] * 10
    last: dict[int, float] = {}
    state: dict[str, Any] = {}
    for _ in range(steps):
        tokens = np.bincount(rng.integers(0, 10, 8), minlength=10).astype(float)
        excess = [0.05 if i == 3 else 0.0 for i in range(10)]
        method = proxy(10, state)
        step(method, [e if n else 99.0 for e, n in zip(excess, tokens, strict=True)], tokens.tolist())
        state = json.loads(json.dumps(method.state_dict(), allow_nan=False))
        # The same in plain Python; a domain that no batch has had yet is as hard as the others on average.
        last |= {i: excess[i] for i in range(10) if tokens[i]}
        mean = sum(last.values()) / len(last)
        raised = [w * np.exp(eta * last.get(i, mean)) for i, w in enumerate(weights)]
        weights = [(1 - c) * w / sum(raised) + c / 10 for w in raised]
        total = [a + b for a, b in zip(total, weights, strict=True)]
    np.testing.assert_allclose(state["weights"], weights, rtol=1e-9)
    np.testing.assert_allclose(state["sum"], total, rtol=1e-9)
    assert state["sum"][3] / steps == pytest.approx(0.96, abs=0.005)


def test_a_domain_without_tokens_keeps_its_excess() -> None:
    method = proxy(3)
    first = step(method, [3.0, 0.0, 3.0], [40, 0, 20])
    assert first["excess"] == [3.0, None, 3.0]
    np.testing.assert_allclose(first["weights"], [1 / 3] * 3, rtol=1e-12)  # 0.49, 0.02, 0.49 with an excess of 0
    second = step(method, [2.0, 1.0, 0.5], [10, 10, 0])
    assert second["excess"] == [2.0, 1.0, 3.0]
    raised = np.exp([2.0, 1.0, 3.0])
    np.testing.assert_allclose(second["weights"], 0.999 * raised / raised.sum() + 0.001 / 3, rtol=1e-12)
    before = method.state_dict()
    assert step(method, [np.nan, 1.0, 1.0], [10, 10, 10])["excess"] == [2.0, 1.0, 3.0]  # a skipped step
    assert method.state_dict() == before


def test_a_weight_that_underflows_returns() -> None:
    """Without smoothing: 900 nats in favour of the second, then 900.5 of the first."""
    method = proxy(2, smoothing=0.0)
    assert step(method, [0.0, 900.0], [1, 1])["weights"] == [0.0, 1.0]
    method = proxy(2, json.loads(json.dumps(method.state_dict(), allow_nan=False)), smoothing=0.0)
    weights = step(method, [900.5, 0.0], [1, 1])["weights"]
    np.testing.assert_allclose(weights, [1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5))], rtol=1e-12)


@pytest.mark.parametrize("domains", [[0, 2, 2, 0], [1, 1, 1, 1], [2, 0, 1, 1]])
def test_the_loss_is_divided_by_the_weights_in_the_step(domains: list[int]) -> None:
    """Two micro-batches add up to the weighted mean of the domains' losses, in value and gradient (float64)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (4, LENGTH), generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    hidden = torch.randn(4, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    domain, labels = torch.tensor(domains), next_token_labels(ids)
    tokens = torch.bincount(domain, minlength=3).double() * (LENGTH - 1)
    weights = [0.5, 0.3, 0.2]
    method = proxy(3, {"weights": weights, "sum": [0.0] * 3, "steps": 0})
    loss = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 4)):
        batch = Batch(ids[rows], labels[rows], domain[rows], tokens, tokens.sum(), 0.0)

        def student(ids: Any, function: Any, positions: None, rows: slice = rows) -> Any:
            return function(hidden[rows].flatten(0, 1), OutputHead(weight, None))

        reference = torch.zeros(2 * LENGTH, dtype=torch.float64)
        loss = loss + method.loss(student, batch, reference).loss  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, weight)[0]

    token_loss = functional.cross_entropy(
        (hidden @ weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    by_sample = token_loss.view(4, LENGTH - 1).mean(1)
    present = sorted(set(domains))
    means = [by_sample[domain == i].mean() for i in present]
    expected = sum(weights[i] * mean for i, mean in zip(present, means, strict=True)) / sum(weights[i] for i in present)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0], rtol=1e-9, atol=1e-12)


def test_a_step_without_targets_changes_nothing() -> None:
    weight = torch.ones(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    labels, tokens = torch.full((2, LENGTH), -100), torch.zeros(3, dtype=torch.float64)
    batch = Batch(torch.zeros(2, LENGTH, dtype=torch.long), labels, torch.tensor([0, 2]), tokens, torch.ones(()), 0.0)

    def student(ids: Any, function: Any, positions: None) -> Any:
        return function(torch.ones(2 * LENGTH, WIDTH, dtype=torch.float64), OutputHead(weight, None))

    method = proxy(3)
    before = method.state_dict()
    result = method.loss(student, batch, torch.zeros(2 * LENGTH, dtype=torch.float64))  # type: ignore[arg-type]
    assert float(result.loss.detach()) == float(result.ce) == 0
    assert not torch.autograd.grad(result.loss, weight)[0].any()
    method.end_step(method.step_sums().tolist())
    assert method.state_dict() == before
