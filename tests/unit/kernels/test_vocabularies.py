"""Vocabularies that users have: the tokenizer's largest id + 1 is no multiple of 16, and heads may have further rows.

Matmuls are cut as on a GPU. Right values are float64 from all logits; padding rows of both heads hold NaN.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddk_ds.kernels import DIVERGENCES, Divergence, LogitForm, Options, chunked, top_k_of
from ddk_ds.kernels.options import Engine, padded
from tests.unit.kernels.kd_case import Case, assert_agrees, make

# Vocabulary and padding: Qwen's tokenizer, whose heads have 151,936 rows, and GPT-2's.
VOCABULARIES = [(151_646, 290), (50_257, 0)]
CASES = [(*VOCABULARIES[0], "forward_kl"), (*VOCABULARIES[1], "reverse_kl")]
# A float32 sum over so many tokens costs the hidden states' gradient digits. Leaving 30 tokens out would be 1e-2.
LOSS_BOUND, GRAD_BOUND = 1e-5, 1e-4
FORMS = [LogitForm(), LogitForm(0.6), LogitForm(1.3, 20.0)]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "wants_multiples", lambda weight: True)


def poisoned(vocab_size: int, rows: int, **options: object) -> Case:
    """Make 5 tokens of which one is ignored; `rows` of padding in each head hold NaN."""
    case = make(5, vocab_size, (16, 24), std=3.0, bias=True, padded=(rows, rows), ignored=0.0, **options)  # type: ignore[arg-type]
    assert case.teacher_weight is not None
    case.labels[1], case.labels[3] = -100, vocab_size - 1
    with torch.no_grad():
        for weight in (case.student_weight, case.teacher_weight):
            weight[vocab_size:] = float("nan")
    return replace(case, num_valid=torch.tensor(4))


@pytest.mark.parametrize("engine", ["eager", "triton"])
@pytest.mark.parametrize(("vocab_size", "rows", "divergence"), CASES)
def test_float32_is_exact(vocab_size: int, rows: int, divergence: Divergence, engine: Engine) -> None:
    case = poisoned(vocab_size, rows, divergence=divergence)
    assert_agrees(case, LOSS_BOUND, GRAD_BOUND, engine=engine, chunk_tokens=2)


@pytest.mark.parametrize(("vocab_size", "rows"), VOCABULARIES)
def test_gradients_beside_the_logits(monkeypatch: pytest.MonkeyPatch, vocab_size: int, rows: int) -> None:
    """The way of a GPU: float32 logits of a bf16 model, gradients of several chunks in bf16."""
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: weight.dtype == torch.bfloat16)
    case = poisoned(vocab_size, rows, dtype=torch.bfloat16, temperature=2.0)
    assert_agrees(case, LOSS_BOUND, 5e-3, engine="triton", chunk_tokens=2)


@pytest.mark.parametrize(("vocab_size", "rows", "divergence"), CASES)
def test_a_teacher_known_by_its_top_k(vocab_size: int, rows: int, divergence: Divergence) -> None:
    case = poisoned(vocab_size, rows, divergence=divergence)
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    head = (case.teacher_hidden, case.teacher_weight)
    topk = top_k_of(*head, 20, options=Options(vocab_size, gamma=0.0), bias=case.teacher_bias)
    logits = case.teacher_hidden.double() @ case.teacher_weight[:vocab_size].double().T
    assert case.teacher_bias is not None
    expected = (logits + case.teacher_bias[:vocab_size]).log_softmax(-1).topk(20, -1)
    assert torch.equal(topk.ids, expected.indices)
    torch.testing.assert_close(topk.log_probs.double(), expected.values, rtol=1e-6, atol=1e-6)
    known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_topk=topk)
    assert_agrees(known, LOSS_BOUND, GRAD_BOUND, chunk_tokens=2)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's: LOW in float16
@pytest.mark.parametrize(
    ("divergence", "form", "dtype"),
    [(divergence, FORMS[2], torch.float16) for divergence in DIVERGENCES]
    + [("forward_kl", form, dtype) for form in FORMS for dtype in (torch.float32, torch.bfloat16)],
)
def test_padding_takes_no_part_in_triton(divergence: Divergence, form: LogitForm, dtype: torch.dtype) -> None:
    """Every form and dtype of the logits: LOW is -inf in float16, and a softcap would lift it."""
    case = poisoned(83, 45, divergence=divergence, dtype=dtype, temperature=2.0)
    case = replace(case, student_form=form, teacher_form=form)
    half = dtype != torch.float32
    assert_agrees(case, 5e-2 if half else 5e-7, 5e-2 if half else 2e-6, engine="triton", logits_dtype="model")


@pytest.mark.parametrize(("vocab_size", "rows"), [*VOCABULARIES, (50_304, 0), (30, 0)])
def test_matmuls_take_a_multiple_of_64_and_the_rest(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, rows: int
) -> None:
    """The padded width is one matmul where the head has it; the hidden states' gradient reads no padding."""
    sizes: list[int] = []

    def spy(total: Tensor, a: Tensor, b: Tensor, **options: object) -> Tensor:
        sizes.append(max(*a.shape, *b.shape))
        assert all(max(tensor.stride()) % 8 == 0 for tensor in (total, a, b)), "a leading dimension is not aligned"
        return addmm(total, a, b, **options)

    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", spy)
    head = chunked.Head(torch.randn(vocab_size + rows, 16), None, vocab_size, torch.float32)
    hidden, logits = torch.randn(8, 16), torch.zeros(8, padded(vocab_size))
    head.logits(hidden, logits)
    head.add_weight_grad(logits, hidden, torch.zeros(vocab_size + rows, 16), keep=False)
    whole, rest = vocab_size // 64 * 64, vocab_size % 64
    apart = [max(part, 16) for part in (whole, rest) if part]
    assert sizes == 2 * ([padded(vocab_size)] if rows else apart)
    sizes.clear()
    head.hidden_grad(logits, torch.empty(8, 16))
    assert sizes == apart
