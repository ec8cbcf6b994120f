"""The loss, its options and its pieces on two or three tokens, from Python's math and the papers' formulas alone.

Other tests hold the kernels against kernels/reference.py; here that reference too meets values that it did not compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import DIVERGENCES, KDLoss, LogitForm, Options, default_chunk_tokens, linear_kd_loss
from ddk_ds.kernels.options import TeacherTopK
from ddk_ds.kernels.reference import reference_kd_loss, reference_logits, reference_nll

C = 0.3
TEACHER = ((0.75, 0.25), (0.1, 0.9))
"""The teacher's probabilities of two tokens at T = 2, to which any constant in its logits leads; then the student's
logits."""
STUDENT = ((0.4, -0.2), (-0.5, 0.3))
LABELS = (0, 1)


def kl(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mixed(weight: float, a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


PAPERS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "forward_kl": kl,
    "reverse_kl": lambda q, p: kl(p, q),
    # GKD, Eq. 1: D_JSD(beta)(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.
    "jensen_shannon": lambda q, p: C * kl(q, mixed(C, q, p)) + (1 - C) * kl(p, mixed(C, q, p)),
    # DistiLLM, Eq. 4 and 5: the skew mixes the second argument with a share alpha of the first.
    "skew_forward_kl": lambda q, p: kl(q, mixed(C, q, p)),
    "skew_reverse_kl": lambda q, p: kl(p, mixed(C, p, q)),
    "total_variation": lambda q, p: sum(abs(x - y) for x, y in zip(q, p, strict=True)) / 2,
}


def softmax(logits: Sequence[float]) -> list[float]:
    shares = [math.exp(x) for x in logits]
    return [share / sum(shares) for share in shares]


def by_hand(divergence: str, student: Sequence[Sequence[float]], scale: float) -> tuple[float, float, float]:
    """Return loss, cross-entropy and divergence at T = 2, gamma 0.7, ce_weight 0.4; `scale` is T^2 or 1."""
    ce = sum(-math.log(softmax(row)[label]) for row, label in zip(student, LABELS, strict=True)) / 2
    pairs = zip(TEACHER, student, strict=True)
    found = sum(PAPERS[divergence](q, softmax([x / 2 for x in row])) for q, row in pairs) / 2
    return 0.4 * ce + 0.7 * scale * found, ce, found


def loss_of(
    divergence: str, function: Callable[..., KDLoss], scaled: bool = True, **options: Any
) -> tuple[KDLoss, Tensor]:
    """Return the loss of the two tokens and of an ignored third one, and the student's logits; heads are identities."""
    rows = torch.tensor([*STUDENT, (9.0, -9.0)], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([*([1.3 + 2 * math.log(x) for x in q] for q in TEACHER), [-3.0, 3.0]], dtype=torch.float64)
    head = torch.eye(2, dtype=torch.float64)
    values = {"gamma": 0.7, "ce_weight": 0.4, "temperature": 2.0, "coefficient": C, "scale_by_temperature": scaled}
    made = Options(2, **{**values, "divergence": divergence, **options})
    labels = torch.tensor([*LABELS, -100])
    return function(rows, head, teacher, head, labels, num_valid=torch.tensor(2), options=made), rows


def derivative(divergence: str, row: int, column: int) -> float:
    """Return the loss's derivative by one of the student's logits, by a central difference of 2e-5."""
    losses = []
    for step in (1e-5, -1e-5):
        moved = [list(values) for values in STUDENT]
        moved[row][column] += step
        losses.append(by_hand(divergence, moved, 4.0)[0])
    return (losses[0] - losses[1]) / 2e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_is_its_papers(divergence: str) -> None:
    expected = by_hand(divergence, STUDENT, 4.0)
    functions: list[tuple[Callable[..., KDLoss], dict[str, Any]]] = [
        (reference_kd_loss, {}),
        *((linear_kd_loss, {"engine": engine}) for engine in ("eager", "native", "auto")),
    ]
    for function, options in functions:
        found, rows = loss_of(divergence, function, **options)
        assert [found.loss.item(), found.ce.item(), found.kl.item()] == pytest.approx(expected, rel=1e-12)
        (grad,) = torch.autograd.grad(found.loss, rows)
        assert grad[2].tolist() == [0.0, 0.0]
        by_difference = [[derivative(divergence, row, column) for column in range(2)] for row in range(2)]
        assert grad[:2].tolist() == [pytest.approx(row, abs=1e-8) for row in by_difference]
        unscaled, _ = loss_of(divergence, function, scaled=False, **options)
        assert unscaled.loss.item() == pytest.approx(by_hand(divergence, STUDENT, 1.0)[0], rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_of_each_token(divergence: str) -> None:
    for function in (reference_kd_loss, lambda *args, **kw: linear_kd_loss(*args, per_token=True, **kw)):
        found, _ = loss_of(divergence, function)
        assert found.token_ce is not None and found.token_kl is not None
        ce = [-math.log(softmax(row)[label]) / 2 for row, label in zip(STUDENT, LABELS, strict=True)]
        pairs = zip(TEACHER, STUDENT, strict=True)
        divergences = [PAPERS[divergence](q, softmax([x / 2 for x in row])) / 2 for q, row in pairs]
        assert found.token_ce.tolist() == pytest.approx([*ce, 0.0])
        assert found.token_kl.tolist() == pytest.approx([*divergences, 0.0])


def test_no_token_counts_as_one() -> None:
    head = torch.eye(2, dtype=torch.float64)
    rows = torch.tensor(STUDENT, dtype=torch.float64)
    ce = sum(-math.log(softmax(row)[label]) for row, label in zip(STUDENT, LABELS, strict=True))
    for function in (reference_kd_loss, linear_kd_loss):
        for count, divisor in ((0, 1.0), (0.25, 0.25), (1, 1.0), (-3, 1.0)):
            found = function(
                *(rows, head, None, None, torch.tensor(LABELS)), num_valid=torch.tensor(count), options=Options(2, 0.5)
            )
            assert found.loss.item() == pytest.approx(ce / divisor)


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_forms_bend_the_logits(engine: Any) -> None:
    """Gemma: cap * tanh(x / cap); Cohere: scale * x; here both in one, and a bias before them."""
    hidden, weight = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 1.0], [2.0, 0.25], [9.0, 9.0]]).double()
    bias = torch.tensor([0.5, -0.25, 9.0]).double()
    products = [0.5 - 2.0 + 0.5, 2.0 - 0.5 - 0.25]  # the third row is padding
    for form, logits in (
        (LogitForm(), products),
        (LogitForm(0.6), [0.6 * x for x in products]),
        (LogitForm(0.6, 1.5), [1.5 * math.tanh(0.6 * x / 1.5) for x in products]),
    ):
        found = reference_logits(hidden, weight, bias, 2, form)
        assert found.tolist() == [pytest.approx(logits, rel=1e-12)]
        label = torch.tensor([1])
        loss = linear_kd_loss(
            *(hidden, weight, None, None, label),
            num_valid=torch.tensor(1),
            options=Options(2, 0.0, student_form=form, engine=engine),
            student_bias=bias,
        ).loss
        assert loss.item() == pytest.approx(-math.log(softmax(logits)[1]), rel=1e-12)
    nll = reference_nll(hidden, weight, torch.tensor([1]), vocab_size=2, bias=bias)
    assert nll.tolist() == pytest.approx([-math.log(softmax(products)[1])])


def test_a_forms_slope_is_in_the_gradient() -> None:
    logits = torch.tensor([[0.8, -0.4]], dtype=torch.float64, requires_grad=True)
    head = torch.eye(2, dtype=torch.float64)
    for form in (LogitForm(0.6), LogitForm(0.6, 1.5)):

        def value(x: float, form: LogitForm = form) -> float:
            bent = [
                form.softcap * math.tanh(form.scale * y / form.softcap) if form.softcap else form.scale * y
                for y in (x, -0.4)
            ]
            return -math.log(softmax(bent)[0])

        for engine in ("eager", "native"):
            options = Options(2, 0.0, student_form=form, engine=engine)
            loss = linear_kd_loss(
                *(logits, head, None, None, torch.tensor([0])), num_valid=torch.tensor(1), options=options
            ).loss
            (grad,) = torch.autograd.grad(loss, logits)
            assert float(grad[0, 0]) == pytest.approx((value(0.8 + 1e-5) - value(0.8 - 1e-5)) / 2e-5, abs=1e-8)


def test_options_that_are_not_given() -> None:
    assert Options(7, 0.5) == Options(
        vocab_size=7,
        gamma=0.5,
        temperature=1.0,
        divergence="forward_kl",
        coefficient=0.5,
        ce_weight=1.0,
        scale_by_temperature=True,
        ignore_index=-100,
        chunk_tokens=0,
        logits_dtype="float32",
        student_form=LogitForm(1.0, 0.0),
        teacher_form=LogitForm(1.0, 0.0),
        engine="auto",
    )
    assert Options(7, 0.5, temperature=3.0).kd_weight == 4.5
    assert Options(7, 0.5, temperature=3.0, scale_by_temperature=False).kd_weight == 0.5


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("gamma", (0.0, 0.5, 1e6), (-0.5, math.inf, math.nan)),
        ("ce_weight", (0.0, 0.5), (-0.5, math.inf, math.nan)),
        ("temperature", (0.25, 1.0, 9.0), (0.0, -0.25, math.inf, math.nan)),
        ("coefficient", (0.01, 0.99), (0.0, 1.0, -0.5, 1.5, math.nan)),
        ("chunk_tokens", (0, 1, 9), (-1,)),
        ("logits_dtype", ("float32", "model"), ("bfloat16",)),
        *(
            (
                form,
                (LogitForm(0.0, 0.0), LogitForm(-2.0, 0.5)),
                (LogitForm(math.nan), LogitForm(1.0, math.inf), LogitForm(1.0, -0.5), LogitForm(math.inf, 3.0)),
            )
            for form in ("student_form", "teacher_form")
        ),
    ],
)
def test_an_options_range(key: str, good: Sequence[Any], bad: Sequence[Any]) -> None:
    plain = Options(7, 0.5, divergence="skew_forward_kl")
    for value in good:
        replace(plain, **{key: value}).check()
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{key} is "):
            replace(plain, **{key: value}).check()
    Options(7, 0.5, coefficient=5.0).check()  # the forward KL has none


def test_tokens_of_a_chunk() -> None:
    """128 MiB for 8 bytes a logit on a CPU, 1.25e9 bytes for 16 on a GPU; multiples of 128 from 512 to 8,192."""
    for vocab_size, device, tokens in (
        (1_000, "cpu", 8192),  # 16,777 fit
        (14_589, "cpu", 1024),  # 1,150: 1,152 would be the next multiple
        (16_384, "cpu", 1024),  # exactly
        (16_385, "cpu", 896),
        (40_000, "cpu", 512),  # 419
        (8_192, "cuda", 8192),  # 9,536
        (20_000, "cuda", 3840),  # 3,906
        (32_000, "cuda", 2432),  # 2,441
        (50_257, "cuda", 1536),  # 1,554
        (262_144, "cuda", 512),  # 298
        (32_000, "xpu", 2432),  # as a GPU of any other kind
    ):
        assert default_chunk_tokens(vocab_size, device) == tokens, vocab_size


def test_a_top_k_by_hand() -> None:
    """Of three tokens the teacher's likeliest is known; the other two are one bucket of the rest."""
    rows = torch.tensor([[0.2, -0.1, 0.4]], dtype=torch.float64)
    topk = TeacherTopK(torch.tensor([[2]]), torch.tensor([[math.log(0.6)]]), torch.tensor([math.log(0.4)]))
    p = softmax(rows[0].tolist())
    expected = kl([0.6, 0.4], [p[2], p[0] + p[1]])
    head = torch.eye(3, dtype=torch.float64)
    for function in (reference_kd_loss, linear_kd_loss):
        found = function(
            *(rows, head, None, None, torch.tensor([0])),
            num_valid=torch.tensor(1),
            options=Options(3, 1.0),
            teacher_topk=topk,
        )
        assert found.kl.item() == pytest.approx(expected, rel=1e-6)  # the teacher's are float32
