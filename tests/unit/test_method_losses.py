"""The methods' losses on heads and hidden states, without engines, against plain torch in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from ddk_ds.comm import SingleProcess
from ddk_ds.config import Doremi, Loss
from ddk_ds.engine.head import OutputHead
from ddk_ds.kernels import LogitForm, Options
from ddk_ds.methods import Batch, make_method, next_token_labels, token_losses
from ddk_ds.methods.base import IGNORE_INDEX
from ddk_ds.methods.doremi import DoremiProxy

VOCAB, SAMPLES, LENGTH = 13, 3, 5
FORMS = LogitForm(0.5, 2.0), LogitForm(2.0, 0.0)
VALID = 40  # the step's valid tokens: 12 of this micro-batch, and others'


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_of(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Return the logits (n, VOCAB) in float64; the heads' further rows are padding."""
    logits = head.form.scale * F.linear(hidden.double(), head.weight.double(), head.bias.double())[:, :VOCAB]  # type: ignore[union-attr]
    return head.form.softcap * (logits / head.form.softcap).tanh() if head.form.softcap else logits


class Models:
    """A student and a teacher, which hold hidden states and a head each and note what is asked of them."""

    def __init__(self) -> None:
        self.hidden_states = normal(1, SAMPLES * LENGTH, 6).requires_grad_()
        self.head = OutputHead(normal(2, VOCAB + 3, 6), normal(3, VOCAB + 3), FORMS[0])
        self.teacher_states = normal(4, SAMPLES * LENGTH, 8)
        self.teacher_head = OutputHead(normal(5, VOCAB + 1, 8), normal(6, VOCAB + 1), FORMS[1])
        # What TED's filters return: of two matched layers, in the teacher's width.
        self.filtered_states = [normal(seed, SAMPLES * LENGTH, 8) for seed in (7, 8, 9, 10)]
        self.asked: list[str] = []
        self.student: Any = self
        self.teacher: Any = SimpleNamespace(
            hidden=self._teacher_hidden,
            hidden_with_layers=lambda ids, _: [("tapped", number) for number, _ in enumerate(ids)],
            head=SimpleNamespace(gathered=self._gathered),
            shared_head=self._shared,
        )

    def _teacher_hidden(self, ids: list[torch.Tensor], _: list[None]) -> list[torch.Tensor]:
        self.asked.append(f"hidden of {len(ids)}")
        return [self.teacher_states for _ in ids]

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[OutputHead]:
        yield self.teacher_head

    @contextlib.contextmanager
    def _shared(self, batches: Any) -> Iterator[None]:
        self.asked.append("shared head")
        yield

    def __call__(self, input_ids: torch.Tensor, function: Any, positions: None = None) -> Any:
        return function(self.hidden_states, self.head)

    def filtered(self, input_ids: torch.Tensor, function: Any, teacher_states: Any, positions: None = None) -> Any:
        result = None if function is None else self(input_ids, function)
        return result, (self.filtered_states[:2], self.filtered_states[2:])

    def teacher_ce(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(hidden, self.teacher_head), labels)


def batch_at(progress: float = 0.0) -> Batch:
    ids = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([float(VALID)], dtype=torch.float64)
    return Batch(ids, next_token_labels(ids), torch.zeros(SAMPLES, dtype=torch.int64), tokens, tokens.sum(), progress)


def method_of(models: Models, name: str, **sections: Any) -> Any:
    config: Any = SimpleNamespace(method=name, loss=Loss(**sections), ted=SimpleNamespace(weight=0.7), doremi=None)
    teacher = None if name == "cpt" else models.teacher
    return make_method(config, teacher, Options(VOCAB, gamma=0.0, chunk_tokens=4), 1, {})


def plain(models: Models, batch: Batch, gamma: float, temperature: float) -> tuple[float, float, float]:
    """Return loss, cross-entropy and KL(teacher, student) of the valid tokens, divided by the step's number."""
    valid = batch.labels.flatten() != -100
    ours = logits_of(models.hidden_states, models.head)[valid]
    theirs = logits_of(models.teacher_states, models.teacher_head)[valid]
    ce = F.cross_entropy(ours, batch.labels.flatten()[valid], reduction="sum") / VALID
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (ours, theirs))
    kl = F.kl_div(student, teacher, reduction="sum", log_target=True) / VALID
    return float(ce + gamma * temperature**2 * kl), float(ce), float(kl)


def test_labels_are_the_next_tokens() -> None:
    ids = torch.tensor([[5, 6, 7], [1, 0, 2]])
    assert next_token_labels(ids).tolist() == [[6, 7, -100], [0, 2, -100]]


def test_token_losses_are_torchs() -> None:
    models, batch = Models(), batch_at()
    losses = token_losses(models.hidden_states, models.head, batch.labels.flatten(), Options(VOCAB, gamma=0.0))
    expected = F.cross_entropy(logits_of(models.hidden_states, models.head), batch.labels.flatten(), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_continued_pretraining_is_cross_entropy() -> None:
    models, batch = Models(), batch_at()
    method = method_of(models, "cpt")
    with method.teacher_outputs([batch, batch]) as outputs:
        assert list(outputs) == [None, None]
    result = method.loss(models.student, batch, None)
    _, ce, _ = plain(models, batch, 0, 1)
    assert (float(result.loss), float(result.ce), float(result.kl)) == (pytest.approx(ce), pytest.approx(ce), 0.0)
    assert (method.end_step(method.step_sums().tolist()), method.state_dict()) == ({}, {})


@pytest.mark.parametrize(("progress", "gamma", "temperature"), [(0.0, 0.4, 2.0), (0.25, 0.55, 1.75), (1.0, 1.0, 1.0)])
def test_distillation_is_equation_3_at_the_runs_progress(progress: float, gamma: float, temperature: float) -> None:
    models, batch = Models(), batch_at(progress)
    method = method_of(models, "kd", gamma=0.4, gamma_end=1.0, temperature=2.0, temperature_end=1.0)
    with method.teacher_outputs([batch, batch]) as outputs:
        result = method.loss(models.student, batch, outputs[1])
    assert models.asked == ["hidden of 2", "shared head"]
    assert [float(part) for part in result[:3]] == pytest.approx(plain(models, batch, gamma, temperature), rel=1e-5)


@pytest.mark.parametrize("name", ["cpt", "kd"])
def test_weights_of_samples_are_in_the_loss_and_in_its_gradients(name: str) -> None:
    """Two micro-batches of one step against sum_i w_i (CE_i + gamma T^2 KL_i) / the step's valid tokens in float64."""
    models, weights = Models(), (torch.tensor([2.0, 0.25, 1.5]), torch.tensor([0.5, 3.0, 1.0]))
    models.head.weight.requires_grad_()
    leaves = (models.hidden_states, models.head.weight)
    method = method_of(models, name, gamma=0.4, temperature=2.0)
    valid = batch_at().labels.flatten() != -100
    labels = batch_at().labels.flatten()[valid]
    ours, theirs = (
        logits_of(*both)[valid]
        for both in ((models.hidden_states, models.head), (models.teacher_states, models.teacher_head))
    )
    kl = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    each = F.cross_entropy(ours, labels, reduction="none") + (0.4 * 4 * kl if name == "kd" else 0)
    expected = sum((each * w.repeat_interleave(LENGTH)[valid]).sum() for w in weights) / VALID
    batches = [replace(batch_at(), weights=w) for w in weights]
    with method.teacher_outputs(batches) as outputs:
        results = [method.loss(models.student, batch, output) for batch, output in zip(batches, outputs, strict=True)]
    loss = sum(result.loss for result in results)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss) == pytest.approx(sum(float(r.ce + 1.6 * r.kl) for r in results), rel=1e-5)
    for found, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_without_a_weight_the_teacher_does_not_run() -> None:
    models, batch = Models(), batch_at()
    method = method_of(models, "kd", gamma=0.0, gamma_end=1.0)
    with method.teacher_outputs([batch, batch]) as outputs:
        assert list(outputs) == [None, None] and models.asked == []
        result = method.loss(models.student, batch, outputs[0])
    assert float(result.loss) == pytest.approx(plain(models, batch, 0, 1)[1], rel=1e-5)
    later = batch_at(0.5)
    with method.teacher_outputs([later]) as outputs:
        assert len(outputs) == 1 and models.asked == ["hidden of 1", "shared head"]


def test_teds_first_stage_is_the_filters_mean_cross_entropy_through_the_teachers_head() -> None:
    models, batch = Models(), batch_at()
    method = method_of(models, "ted_filters")
    with method.teacher_outputs([batch, batch]) as outputs:
        assert list(outputs) == [("tapped", 0), ("tapped", 1)] and models.asked == ["shared head"]
    result = method.loss(models.student, batch, (models.teacher_states, []))
    each = [models.teacher_ce(states, batch.labels.flatten()) * 12 / VALID for states in models.filtered_states]
    expected = float(torch.stack(each).mean())
    assert [float(part) for part in result[:3]] == pytest.approx([expected, expected, 0.0], rel=1e-5)


def test_teds_second_stage_adds_the_mean_squared_error_of_filtered_states() -> None:
    models, batch = Models(), batch_at()
    method = method_of(models, "ted", gamma=0.4, temperature=2.0)
    result = method.loss(models.student, batch, (models.teacher_states, []))
    valid = batch.labels.flatten() != -100
    a, b, c, d = (states[valid].double() for states in models.filtered_states)
    mse = float((F.mse_loss(a, c) + F.mse_loss(b, d)) / 2) * 12 / VALID
    loss, ce, kl = plain(models, batch, 0.4, 2.0)
    assert [float(part) for part in result[:3]] == pytest.approx([loss + 0.7 * mse, ce, kl], rel=1e-5)
    method.loss(models.student, batch, (models.teacher_states, []))
    assert method.end_step(method.step_sums().tolist()) == {"mse": pytest.approx(2 * mse, rel=1e-5)}
    assert method.end_step(method.step_sums().tolist()) == {"mse": 0.0}


def test_doremis_excess_is_the_mean_of_what_its_tokens_lose_over_the_reference(tmp_path: Path) -> None:
    """Two micro-batches of three samples: domain 0 has two in each, domain 2 one, domain 1 none."""
    models, ids = Models(), batch_at().input_ids
    tokens = torch.tensor([16.0, 0.0, 8.0], dtype=torch.float64)
    batch = Batch(ids, next_token_labels(ids), torch.tensor([0, 2, 0]), tokens, tokens.sum(), 0.0)
    models.teacher.clock = SimpleNamespace(stage=lambda name: contextlib.nullcontext())
    method: Any = DoremiProxy(models.teacher, Options(VOCAB, gamma=0.0, chunk_tokens=4), Doremi(), 3, {})
    assert method.state_dict()["weights"] == pytest.approx([1 / 3] * 3) and method.state_dict()["steps"] == 0
    labels = batch.labels.flatten()
    ours = F.cross_entropy(logits_of(models.hidden_states, models.head), labels, reduction="none")
    theirs = F.cross_entropy(logits_of(models.teacher_states, models.teacher_head), labels, reduction="none")
    with method.teacher_outputs([batch, batch]) as outputs:
        torch.testing.assert_close(outputs[1].double(), theirs, rtol=1e-5, atol=1e-6)
        results = [method.loss(models.student, batch, output) for output in outputs]
    assert float(sum(result.ce for result in results)) == pytest.approx(float(2 * ours.sum() / 24), rel=1e-5)
    lost = (ours - theirs).clamp(min=0).view(3, LENGTH).sum(1).tolist()  # the last token of a sample has no label
    metrics = method.end_step(method.step_sums().tolist())
    assert metrics["excess"][1] is None
    assert [metrics["excess"][k] for k in (0, 2)] == pytest.approx([(lost[0] + lost[2]) / 8, lost[1] / 4], rel=1e-5)
    method.export(models.student, tmp_path, names := ["zebra", "ape", "cat"], SingleProcess())
    assert yaml.safe_load((tmp_path / "proportions.yaml").read_text()) == dict(
        zip(names, metrics["weights"], strict=True)
    )
    with method.teacher_outputs([batch]) as outputs:
        method.loss(models.student, batch, outputs[0])
    second = method.end_step(method.step_sums().tolist())["weights"]
    assert method.state_dict()["steps"] == 2 and second != metrics["weights"]
    method.export(models.student, tmp_path, names, SingleProcess())
    written = yaml.safe_load((tmp_path / "proportions.yaml").read_text())
    assert list(written) == names, "in the run's order"
    assert list(written.values()) == pytest.approx(np.mean([metrics["weights"], second], 0))


def test_doremi_weighs_a_domain_of_a_single_token() -> None:
    models, ids = Models(), batch_at().input_ids[:2]
    labels = next_token_labels(ids)
    labels[1, 1:] = IGNORE_INDEX
    tokens = (labels != IGNORE_INDEX).sum(1).double()
    assert tokens[1] == 1
    batch = Batch(ids, labels, torch.tensor([0, 1]), tokens, tokens.sum(), 0.0)
    method: Any = DoremiProxy(models.teacher, Options(VOCAB, gamma=0.0, chunk_tokens=4), Doremi(), 2, {})
    loss = method.loss(models.student, batch, torch.zeros(labels.numel(), dtype=torch.float64)).loss
    logits = logits_of(models.hidden_states[: labels.numel()], models.head)
    of_domain = [F.cross_entropy(part, at) for part, at in zip(logits.chunk(2), labels, strict=True)]
    assert float(loss) == pytest.approx(float(sum(of_domain) / 2), rel=1e-5)
