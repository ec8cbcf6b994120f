"""The loss head on a GPU: Triton rows and mixed-precision matmuls against float64, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from ddk_ds.kernels import (
    DIVERGENCES,
    Divergence,
    KDLoss,
    LogitForm,
    Options,
    TeacherTopK,
    linear_kd_loss,
    linear_nll,
    top_k_of,
)
from ddk_ds.kernels.chunked import row_kernel
from ddk_ds.kernels.reference import reference_nll
from tests.unit.kernels.kd_case import PLAIN, Case, error, make, near, parts, truth

GPU = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative error of a gradient in norm. Half precision rounds it twice: to enter the matmuls, and at the end.
GRAD_BOUND = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5}
LOSS_BOUND = 1e-5
# Three blocks of the row kernel, the last one ragged, and rows that end within an aligned column.
VOCAB = 9001
CAPPED = LogitForm(0.8, 5.0)
MEMORY_BOUND = 1.35e9  # bytes: both models' logits of a chunk, gradients of four, the hidden states' float32 gradient


def on_gpu(case: Case) -> Case:
    """The case with its tensors on the GPU, leaves as leaves."""
    moved = {
        field.name: value.detach().to(GPU).requires_grad_(value.requires_grad)
        for field in fields(case)
        if isinstance(value := getattr(case, field.name), Tensor)
    }
    topk = case.teacher_topk
    return replace(case, **moved, teacher_topk=topk and TeacherTopK(*(tensor.to(GPU) for tensor in topk)))


def grads_of(found: KDLoss, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found.loss, case.leaves())


def assert_gpu_agrees(
    case: Case, loss_bound: float, grad_bound: float, change: Callable[[Case], None] = lambda _: None
) -> None:
    """The GPU's loss and gradients are those of the float64 truth; `change` alters the GPU's inputs beforehand."""
    expected, expected_grads = truth(case)
    moved = on_gpu(case)
    with torch.no_grad():
        change(moved)
    found = moved.run()
    for name, value, want in zip(KDLoss._fields, parts(found), parts(expected), strict=False):
        assert value.device.type == GPU
        assert abs(value.item() - want.item()) <= loss_bound * max(abs(want.item()), 1e-30), name
    for leaf, grad, want in zip(moved.leaves(), grads_of(found, moved), expected_grads, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
        assert error(grad.cpu(), want) <= grad_bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_is_what_runs(dtype: torch.dtype) -> None:
    kernel = row_kernel(torch.device(GPU), torch.float32, Options(vocab_size=1, gamma=1.0))
    assert kernel.__name__ == "triton_rows"
    plain, eager = (on_gpu(make(dtype=dtype)).run(engine=engine).loss for engine in ("auto", "eager"))
    assert error(plain, eager.double()) < 1e-6


@pytest.mark.parametrize("form", [PLAIN, CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_against_float64(divergence: Divergence, dtype: torch.dtype, temperature: float, form: LogitForm) -> None:
    case = make(150, VOCAB, (64, 96), std=3.0, dtype=dtype, bias=True, divergence=divergence, temperature=temperature)
    case = replace(case, student_form=form, teacher_form=form)
    assert_gpu_agrees(case, LOSS_BOUND, GRAD_BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "hidden"), [(2, (8, 8)), (257, (7, 9)), (4096, (64, 64)), (12288, (64, 128))])
def test_ragged_and_aligned_shapes(dtype: torch.dtype, vocab_size: int, hidden: tuple[int, int]) -> None:
    assert_gpu_agrees(make(33, vocab_size, hidden, dtype=dtype), LOSS_BOUND, GRAD_BOUND[dtype])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float64_stays_float64(temperature: float) -> None:
    assert_gpu_agrees(make(dtype=torch.float64, bias=True, temperature=temperature), 1e-12, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_join(dtype: torch.dtype) -> None:
    case = on_gpu(make(150, 1003, dtype=dtype, bias=True))
    whole, chunks = case.run(), case.run(chunk_tokens=32)
    for a, b in zip((*parts(whole), *grads_of(whole, case)), (*parts(chunks), *grads_of(chunks, case)), strict=True):
        assert error(b, a.double()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_ignored_rows_may_hold_nan(dtype: torch.dtype, gamma: float) -> None:
    def poison(case: Case) -> None:
        ignored = case.labels == -100
        case.student_hidden[ignored] = float("nan")
        assert case.teacher_hidden is not None
        case.teacher_hidden[ignored] = float("inf")

    assert_gpu_agrees(make(dtype=dtype, gamma=gamma, bias=True), LOSS_BOUND, GRAD_BOUND[dtype], poison)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [(0, 45), (45, 0), (13, 45)])
def test_padded_rows_take_no_part(dtype: torch.dtype, padded: tuple[int, int]) -> None:
    def poison(case: Case) -> None:
        assert case.teacher_weight is not None
        case.student_weight[211:] = float("nan")
        case.teacher_weight[211:] = float("nan")

    assert_gpu_agrees(make(padded=padded, dtype=dtype, bias=True), LOSS_BOUND, GRAD_BOUND[dtype], poison)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_nothing_valid_is_a_loss_of_zero(dtype: torch.dtype, gamma: float) -> None:
    case = on_gpu(make(ignored=1.1, dtype=dtype, gamma=gamma, bias=True))
    found = case.run()
    assert [value.item() for value in parts(found)] == [0.0, 0.0, 0.0]
    assert not any(grad.any() for grad in grads_of(found, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_large_logits(dtype: torch.dtype, temperature: float) -> None:
    assert_gpu_agrees(make(std=1e4, dtype=dtype, temperature=temperature), 1e-5, 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.02, 0.006])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "total_variation"])  # its slope jumps
def test_near_the_teacher(divergence: Divergence, step: float, dtype: torch.dtype) -> None:
    assert_gpu_agrees(replace(near(200, step, dtype), divergence=divergence), 1e-4, 5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_teacher_known_by_its_top_k(divergence: Divergence, dtype: torch.dtype) -> None:
    case = make(dtype=dtype, std=3.0, temperature=2.0, divergence=divergence)
    assert case.teacher_hidden is not None
    assert case.teacher_weight is not None
    head = (case.teacher_hidden, case.teacher_weight)
    options = Options(211, gamma=0.0, temperature=2.0)
    topk = top_k_of(*head, 20, options=options)
    found = top_k_of(*(tensor.to(GPU) for tensor in head), 20, options=options)
    torch.testing.assert_close(found.log_probs.cpu(), topk.log_probs, rtol=1e-5, atol=1e-5)
    known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=topk)
    assert_gpu_agrees(known, LOSS_BOUND, GRAD_BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_nll(dtype: torch.dtype) -> None:
    case = make(dtype=dtype, std=3.0)
    expected = reference_nll(case.student_hidden, case.student_weight, case.labels, vocab_size=211)
    moved = on_gpu(case)
    found = linear_nll(moved.student_hidden, moved.student_weight, moved.labels, options=Options(211, gamma=0.0))
    torch.testing.assert_close(found.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_device_memory_is_a_chunk() -> None:
    num_tokens, vocab_size, hidden = 8192, 151936, (2048, 5120)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)

    student, teacher = ((normal(num_tokens, width), normal(vocab_size, width) / width**0.5) for width in hidden)
    labels = torch.randint(vocab_size, (num_tokens,), device=GPU)
    case = Case(*(t.requires_grad_() for t in student), *teacher, labels, (labels >= 0).sum(), vocab_size)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run().loss.backward()
    torch.cuda.synchronize()
    weight_grad = 4 * vocab_size * hidden[0]
    assert torch.cuda.max_memory_allocated() - before - weight_grad <= MEMORY_BOUND


@contextmanager
def no_host_sync() -> Iterator[None]:
    """An error for every call that waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_never_waits(dtype: torch.dtype, temperature: float) -> None:
    case = on_gpu(make(dtype=dtype, bias=True, temperature=temperature))
    valid_rows = (case.labels != -100).nonzero().flatten()
    buffer = torch.zeros_like(case.student_weight, dtype=torch.float32)
    for options in ({}, {"valid_rows": valid_rows, "per_token": True}, {"weight_grad_buffer": buffer}):
        case.run(**options).loss.backward()  # the first call compiles
        with no_host_sync():
            case.run(**options).loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_captures_call_and_backward(dtype: torch.dtype) -> None:
    case, other = (on_gpu(make(dtype=dtype, bias=True, seed=seed)) for seed in (0, 1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and the libraries' workspaces come before the capture
        grads_of(case.run(), case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
        grads = grads_of(found, case)
    with torch.no_grad():
        for field in fields(case):
            if isinstance(value := getattr(case, field.name), Tensor):
                value.copy_(getattr(other, field.name))
    graph.replay()
    expected = other.run()
    for a, b in zip((*parts(found), *grads), (*parts(expected), *grads_of(expected, other)), strict=True):
        assert error(a, b.double()) < 1e-6


class Small(nn.Module):
    """A layer and a head whose loss is the project's."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body = nn.Linear(case.student_hidden.shape[1], case.student_hidden.shape[1])
        self.head = nn.Parameter(case.student_weight.detach().clone())

    def forward(self, case: Case) -> Tensor:
        teacher = (case.teacher_hidden, case.teacher_weight)
        hidden = torch.tanh(self.body(case.student_hidden))
        options = Options(case.vocab_size, gamma=0.5, temperature=2.0)
        return linear_kd_loss(hidden, self.head, *teacher, case.labels, num_valid=case.num_valid, options=options).loss


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_compile_takes_it_whole(dtype: torch.dtype) -> None:
    case = on_gpu(make(dtype=dtype))
    module = Small(case).to(GPU, dtype)
    plain = module(case)
    expected = torch.autograd.grad(plain, tuple(module.parameters()))
    loss = torch.compile(module, fullgraph=True)(case)
    assert error(loss.detach(), plain.detach().double()) < (1e-5 if dtype == torch.float32 else 5e-3)
    for grad, want in zip(torch.autograd.grad(loss, tuple(module.parameters())), expected, strict=True):
        assert error(grad, want.double()) < (1e-5 if dtype == torch.float32 else 1e-2)
