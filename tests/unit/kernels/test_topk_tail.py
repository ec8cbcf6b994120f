"""A teacher's top k and its tail, from float32 inputs, against float64 from all logits of both models.

The tail is all other tokens together. Where a model is sure, it is far below the rounding of 1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddk_ds.kernels import Divergence, Options, top_k_of
from tests.unit.kernels.kd_case import Case, assert_agrees, error, make

K, VOCAB = 20, 4099


def with_deviations(student: float, teacher: float) -> Case:
    """Make 33 tokens whose logits have these deviations in student and teacher; the loss is the divergence alone."""
    case = make(33, VOCAB, std=1.0, ignored=0.1, gamma=1.0, ce_weight=0.0)
    assert case.teacher_weight is not None
    weight = (case.student_weight.detach() * student).requires_grad_()
    return replace(case, student_weight=weight, teacher_weight=case.teacher_weight * teacher)


def log_buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities (n, k + 1) of the tokens `ids` and of all others together."""
    others = torch.ones_like(log_probs, dtype=torch.bool).scatter_(1, ids, False)
    rest = torch.stack([row[chosen].logsumexp(0) for row, chosen in zip(log_probs, others, strict=True)])
    return torch.cat([log_probs.gather(1, ids), rest[:, None]], 1)


def by_definition(case: Case, ids: Tensor, divergence: Divergence, temperature: float) -> tuple[Tensor, list[Tensor]]:
    """Return T^2 times the divergence between the buckets, and its gradients, in float64."""
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    leaves = [leaf.detach().double().requires_grad_() for leaf in (case.student_hidden, case.student_weight)]
    valid = case.labels >= 0
    student = (leaves[0] @ leaves[1].T / temperature).log_softmax(-1)[valid]
    teacher = (case.teacher_hidden.double() @ case.teacher_weight.double().T / temperature).log_softmax(-1)[valid]
    p, q = log_buckets(student, ids[valid]), log_buckets(teacher, ids[valid])
    first, second = (q, p) if divergence == "forward_kl" else (p, q)
    loss = temperature**2 * (first.exp() * (first - second)).sum(-1).mean()
    return loss, list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("student", "teacher"), [(3.0, 10.0), (3.0, 30.0), (3.0, 100.0), (30.0, 3.0), (100.0, 30.0), (3.0, 3.0)]
)
def test_a_tail_below_the_rounding_of_one(
    student: float, teacher: float, temperature: float, divergence: Divergence
) -> None:
    case = replace(with_deviations(student, teacher), temperature=temperature, divergence=divergence)
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    options = Options(VOCAB, gamma=0.0, temperature=temperature, chunk_tokens=10)
    topk = top_k_of(case.teacher_hidden, case.teacher_weight, K, options=options)
    expected, expected_grads = by_definition(case, topk.ids, divergence, temperature)
    known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=topk)
    found = known.run()
    assert error(found.loss, expected) < 1e-5
    if divergence == "reverse_kl" and student > 3:
        return  # this gradient is far below the rounding of p (h - sum p h), with a tail or without
    for grad, want in zip(torch.autograd.grad(found.loss, known.leaves()), expected_grads, strict=True):
        assert error(grad, want) < 1e-3
    assert_agrees(known, 1e-5, 1e-3)  # the reference too, which has the top k alone


def test_the_tail_of_a_student_that_underflows_has_its_gradient() -> None:
    """The student gives the tail exp(-150), the teacher a half: each tail token gets its share of the pull."""
    logits = torch.tensor([[150.0, 0.0, -1.0, -2.0]])
    case = replace(
        make(1, 4, (4, 4), gamma=1.0, ce_weight=0.0, ignored=0.0),
        student_hidden=logits.requires_grad_(),
        student_weight=torch.eye(4),
        teacher_hidden=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        teacher_weight=torch.eye(4),
    )
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    topk = top_k_of(case.teacher_hidden, case.teacher_weight, 1, options=Options(4, gamma=0.0))
    found = replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=topk).run().loss
    grad = torch.autograd.grad(found, logits)[0][0].double()
    top = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).softmax(0)[0]
    shares = torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(grad, torch.cat([(1 - top)[None], -(1 - top) * shares]), rtol=1e-6, atol=0)


def test_a_top_k_of_all_tokens_has_no_tail() -> None:
    case = make(9, 31)
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    topk = top_k_of(case.teacher_hidden, case.teacher_weight, 31, options=Options(31, gamma=0.0))
    assert topk.log_tail.tolist() == [-torch.inf] * 9
    assert_agrees(replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=topk), 1e-5, 1e-5)
