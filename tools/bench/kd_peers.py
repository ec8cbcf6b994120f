"""The distillation losses that `bench_kd_loss.py` compares, and the float64 result that gives their errors.

Every implementation computes the loss of a `Problem` and its gradients to the student's hidden states and head weight.
Other projects' losses are called through their public classes, with weights that make them equal to ours.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import Options, default_chunk_tokens, linear_kd_loss
from ddk_ds.kernels.options import Engine, LogitsDtype, padded
from ddk_ds.kernels.reference import reference_logits

DTYPES = ("float32", "bfloat16", "float16")
# Standard deviations of the logits: two unrelated models with CASE_STD are about 2 nats apart, as at the start of a
# distillation; trained models have NEAR_STD.
CASE_STD, NEAR_STD = 1.5, 3.0
NEAR_GAMMA = 1.0  # near the teacher the KL is alone
# Number of float64 logits in one chunk of `truth`.
_TRUTH_ELEMENTS = 1 << 25
QUACK_CHUNK = 4096  # tokens, the default of quack's functions; its layer has none


class Case(NamedTuple):
    """Sizes of a problem, and the dtype of all hidden states and weights."""

    n: int
    """Number of tokens."""
    vocab: int
    """Size V of the vocabulary."""
    student: int
    """Hidden size Hs of the student."""
    teacher: int
    """Hidden size Ht of the teacher."""
    dtype: str


CASES = {
    "cpu": [
        Case(*shape, dtype) for shape in ((2048, 32_000, 576, 1024), (512, 151_936, 256, 640)) for dtype in DTYPES[:2]
    ],
    "cuda": [
        Case(*shape, 2048, 5120, "bfloat16")
        for shape in ((8192, 151_936), (8192, 151_646), (8192, 50_257), (8192, 32_000), (4096, 262_144))
    ],
}
NEAR_CASE = Case(512, 32_000, 576, 576, "bfloat16")


def parse_case(text: str, device: str) -> Case:
    """Parse n,V,Hs,Ht[,dtype]. Raises ConfigError if `text` is not of this form."""
    sizes, dtype = text.split(",")[:4], ",".join(text.split(",")[4:]) or ("bfloat16" if device == "cuda" else "float32")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes) or dtype not in DTYPES:
        raise ConfigError(f"--case is {text!r}: give n,V,Hs,Ht[,dtype], dtype one of {', '.join(DTYPES)}")
    n, vocab, student, teacher = map(int, sizes)
    return Case(n, vocab, student, teacher, dtype)


@dataclass(frozen=True)
class Problem:
    """Inputs of the loss ce_weight * CE + gamma * T^2 * KL(teacher || student), a mean over n valid tokens.

    With gamma 0 it is the cross-entropy alone, and no implementation reads the teacher.
    """

    student_hidden: Tensor  # (n, Hs)
    student_weight: Tensor  # (V, Hs)
    teacher_hidden: Tensor  # (n, Ht)
    teacher_weight: Tensor  # (V, Ht)
    labels: Tensor  # (n,) int64
    ce_weight: float
    gamma: float
    temperature: float

    @property
    def kd_weight(self) -> float:
        """Return gamma * T^2, the factor of KL(teacher || student)."""
        return self.gamma * self.temperature**2

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return the student's hidden states and head weight as new leaf tensors that require gradients."""
        return self.student_hidden.detach().requires_grad_(), self.student_weight.detach().requires_grad_()


class Result(NamedTuple):
    """The loss, a float64 scalar, and its gradients of the shapes (n, Hs) and (V, Hs)."""

    loss: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


class Truth(NamedTuple):
    """The result in float64; kl and the teacher's entropy, at temperature T, are means over tokens in nats."""

    loss: float
    kl: float
    entropy: float
    hidden_grad: Tensor
    weight_grad: Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute the loss and its gradients."""

    run: Callable[[Problem], Result]
    note: str = ""
    half_only: bool = False  # in float32 it equals another implementation
    with_entropy: bool = False  # the loss contains kd_weight * the teacher's entropy
    gpu_only: bool = False  # its kernels run on a GPU alone (or, slowly, under Triton's interpreter)
    teacher: Literal["needed", "never", "either"] = "needed"
    """For problems with a teacher, for those of cross-entropy alone (gamma 0), or for both."""

    def computes(self, case: Case, gamma: float) -> bool:
        """Return True if it computes the problems of a case with this gamma, and differs there from all others."""
        return self.teacher != ("never" if gamma else "needed") and not (self.half_only and case.dtype == "float32")


def make_problem(case: Case, device: str, gamma: float, temperature: float) -> Problem:
    """Draw a problem in which student and teacher are random and independent of each other."""
    draw = _Draw(case, device)
    student, teacher = draw.model(case.student, CASE_STD), draw.model(case.teacher, CASE_STD)
    return Problem(*student, *teacher, draw.labels(), 1.0, gamma, temperature)


def make_near_problem(case: Case, device: str, kl: float) -> Problem:
    """Return a problem of the KL alone, with one head and a student about `kl` nats from its teacher.

    The student's hidden states are the teacher's plus a random step.
    """
    draw = _Draw(case, device)
    teacher, weight = draw.model(case.teacher, NEAR_STD)
    # Logits that differ by a normal of variance s^2 are s^2 / 2 nats apart.
    step = draw.normal(case.n, case.student, std=math.sqrt(2 * kl) / NEAR_STD)
    return Problem(teacher + step, weight, teacher, weight, draw.labels(), 0.0, NEAR_GAMMA, 1.0)


class _Draw:
    """A generator of a case's random tensors, which are the same for each new instance on a kind of device."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, device=self.device).mul_(std)
        return numbers.to(getattr(torch, self.case.dtype))

    def model(self, size: int, logits_std: float) -> tuple[Tensor, Tensor]:
        """Return hidden states (n, size) and a head weight (V, size)."""
        return self.normal(self.case.n, size), self.normal(self.case.vocab, size, std=logits_std / math.sqrt(size))

    def labels(self) -> Tensor:
        return torch.randint(self.case.vocab, (self.case.n,), generator=self.generator, device=self.device)


@torch.no_grad()
def truth(problem: Problem) -> Truth:
    """Compute loss and gradients in float64 by their definition, from the rounded inputs, in chunks of tokens."""
    hidden, vocab, t = problem.student_hidden, len(problem.student_weight), problem.temperature
    weight, teacher_weight = problem.student_weight.double(), problem.teacher_weight.double()
    ce, kl, entropy = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(3))
    hidden_grad, weight_grad = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(weight)
    for rows in torch.arange(len(hidden), device=hidden.device).split(max(16, _TRUTH_ELEMENTS // vocab)):
        student = reference_logits(hidden[rows], weight, None, vocab)
        labels = problem.labels[rows, None]
        log_h = student.log_softmax(-1)
        ce -= log_h.gather(1, labels).sum()
        grad = log_h.exp_().scatter_add_(1, labels, -torch.ones_like(log_h[:, :1])).mul_(problem.ce_weight)
        log_p = student.div_(t).log_softmax(-1)
        log_q = reference_logits(problem.teacher_hidden[rows], teacher_weight, None, vocab).div_(t).log_softmax(-1)
        q = log_q.exp()
        entropy -= (q * log_q).sum()
        kl += (q * log_q.sub_(log_p)).sum()
        grad.add_(log_p.exp_().sub_(q), alpha=problem.kd_weight / t)
        hidden_grad[rows] = grad @ weight
        weight_grad.addmm_(grad.t(), hidden[rows].double())
    loss = problem.ce_weight * ce + problem.kd_weight * kl
    loss, kl, entropy, *_ = (part.div_(len(hidden)) for part in (loss, kl, entropy, hidden_grad, weight_grad))
    return Truth(loss.item(), kl.item(), entropy.item(), hidden_grad, weight_grad)


def errors(result: Result, target: Truth, implementation: Implementation, kd_weight: float) -> tuple[float, float]:
    """Return the relative errors of the loss and of the gradients: the larger of the two gradients', by norms."""
    loss = result.loss.item() - (kd_weight * target.entropy if implementation.with_entropy else 0.0)
    pairs = zip(result[1:], target[3:], strict=True)
    worst = max(((grad.double() - true).norm() / true.norm()).item() for grad, true in pairs)
    return abs(loss - target.loss) / abs(target.loss), worst


def _differentiated(loss: Tensor, leaves: tuple[Tensor, Tensor]) -> Result:
    return Result(loss.detach().double(), *torch.autograd.grad(loss, leaves))


@lru_cache(maxsize=4)
def _kept(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor whose memory is reused by the next call, since page faults are not part of a matmul's time."""
    return torch.empty(shape, dtype=dtype)


@torch.no_grad()
def _floor(problem: Problem, *, chunked: bool) -> Result:
    """Compute only the four matmuls (without a teacher three), in the model's dtype; their result is no gradient."""
    hidden, weight = problem.student_hidden, problem.student_weight
    num_tokens, vocab = len(hidden), len(weight)
    chunk = min(num_tokens, default_chunk_tokens(vocab, hidden.device.type)) if chunked else num_tokens
    # Tensor cores can return float32 sums of half-precision products, which a loss on CUDA needs.
    mixed = hidden.is_cuda and hidden.dtype.itemsize == 2 and "dtype_out" in torch.ops.aten.addmm.overloads()
    sums = torch.float32 if mixed else weight.dtype
    out: dict[str, Any] = {"out_dtype": torch.float32} if mixed else {}
    new = hidden.new_empty if hidden.is_cuda else _kept
    models = 2 if problem.gamma else 1
    logits = new((models, chunk, padded(vocab)), dtype=sums)  # a matmul's rows are aligned for any vocabulary
    hidden_grad, weight_grad = new(hidden.shape, dtype=hidden.dtype), new(weight.shape, dtype=sums)
    for start in range(0, num_tokens, chunk):
        part, teacher = hidden[start : start + chunk], problem.teacher_hidden[start : start + chunk]
        rows = logits[:, : len(part)]
        torch.mm(part, weight.t(), out=rows[0, :, :vocab], **out)
        if problem.gamma:
            torch.mm(teacher, problem.teacher_weight.t(), out=rows[1, :, :vocab], **out)
        # A gradient in the model's dtype would replace the logits; here the memory's content stands for it.
        grad = rows[0].view(weight.dtype)[:, :vocab]
        torch.mm(grad, weight, out=hidden_grad[start : start + chunk])
        if start == 0:
            torch.mm(grad.t(), part, out=weight_grad, **out)
        else:
            torch.addmm(weight_grad, grad.t(), part, out=weight_grad, **out)
    return Result(torch.zeros((), dtype=torch.float64), hidden_grad, weight_grad)


def _naive(problem: Problem) -> Result:
    """Compute full logits and torch's two losses of them in float32."""
    leaves, t = problem.leaves(), problem.temperature
    student = (leaves[0] @ leaves[1].t()).float()
    if not problem.gamma:
        return _differentiated(problem.ce_weight * functional.cross_entropy(student, problem.labels), leaves)
    teacher = (problem.teacher_hidden @ problem.teacher_weight.t()).float()
    log_p, log_q = (functional.log_softmax(logits if t == 1 else logits / t, -1) for logits in (student, teacher))
    loss = problem.kd_weight * functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    if problem.ce_weight:
        loss = loss + problem.ce_weight * functional.cross_entropy(student, problem.labels)
    return _differentiated(loss, leaves)


def _ours(problem: Problem, *, logits_dtype: LogitsDtype = "float32", engine: Engine = "auto") -> Result:
    leaves = problem.leaves()
    options = Options(
        len(problem.student_weight),
        problem.gamma,
        problem.temperature,
        ce_weight=problem.ce_weight,
        logits_dtype=logits_dtype,
        engine=engine,
    )
    loss = linear_kd_loss(
        *leaves,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
        num_valid=torch.full((), len(problem.labels), device=problem.labels.device),
        options=options,
    ).loss
    return _differentiated(loss, leaves)


def _liger(problem: Problem, *, compiled: bool) -> Result:
    """Compute Liger's loss: its beta = 0 is KL(teacher || student), a mean over tokens without the factor T^2."""
    leaves = problem.leaves()
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=problem.ce_weight,
        weight_soft_loss=problem.kd_weight,
        beta=0.0,
        temperature=problem.temperature,
        compiled=compiled,
    )
    return _differentiated(loss(*leaves, problem.teacher_hidden, problem.teacher_weight, problem.labels), leaves)


def _liger_ops(problem: Problem) -> Result:
    """Compute Liger's operators: their JSD with beta 0 is KL(teacher || student) without T^2; CE is another call.

    The weight's gradients are added up in float32, as here, and not in the model's dtype, which is their default.
    """
    ops, leaves, sums = importlib.import_module("liger_kernel.ops"), problem.leaves(), torch.float32
    teacher = (problem.teacher_hidden, problem.teacher_weight)
    apply = ops.LigerFusedLinearJSDFunction.apply  # an autograd function takes its arguments by place
    beta, ignored = 0.0, -100
    loss = problem.kd_weight * apply(*leaves, *teacher, problem.labels, beta, ignored, problem.temperature, sums)
    return _differentiated(loss + problem.ce_weight * _liger_ce_of(problem, leaves), leaves)


def _liger_ce_of(problem: Problem, leaves: tuple[Tensor, Tensor]) -> Tensor:
    """Return Liger's fused linear cross-entropy of `leaves`, a mean over tokens; 0 where its weight is 0."""
    if not problem.ce_weight:
        return torch.zeros((), device=problem.labels.device)
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    bias = class_weight = softcap = None
    ignored, z_loss, smoothing, return_z_loss = -100, 0.0, 0.0, False
    options = (bias, class_weight, ignored, z_loss, smoothing, "mean", softcap, return_z_loss, torch.float32)
    loss: Tensor = function.apply(*leaves, problem.labels, *options)[0]
    return loss


def _liger_ce(problem: Problem) -> Result:
    leaves = problem.leaves()
    return _differentiated(problem.ce_weight * _liger_ce_of(problem, leaves), leaves)


def _liger_scaled_ce(problem: Problem) -> Result:
    """Compute Liger's newest fused cross-entropy, by token: a kernel of CUTLASS's on Hopper, plain torch elsewhere."""
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    leaves = problem.leaves()
    return _differentiated(problem.ce_weight * function.apply(*leaves, problem.labels).mean(), leaves)


def _quack(problem: Problem) -> Result:
    """Compute quack's layer, which keeps full logits where a size is no multiple of 8."""
    layer_class = importlib.import_module("quack.linear_cross_entropy").LinearCrossEntropy
    leaves = problem.leaves()
    vocab, size = leaves[1].shape
    layer = layer_class(size, vocab, chunk_size=QUACK_CHUNK, device="meta")
    loss = torch.func.functional_call(layer, {"weight": leaves[1]}, (leaves[0], problem.labels))
    return _differentiated(problem.ce_weight * loss, leaves)


def _trl(problem: Problem) -> Result:
    """Compute TRL's loss: its beta = 0 is KL(teacher || student) per token; CE comes from its log-probabilities."""
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    log_prob = importlib.import_module("trl.kernels.chunked_logprob")
    leaves, teacher = problem.leaves(), (problem.teacher_hidden, problem.teacher_weight)
    kl, _ = divergence.ChunkedDivergenceFunction.apply(*leaves, None, *teacher, None, 0.0, problem.temperature)
    loss = problem.kd_weight * kl.mean()
    if problem.ce_weight:
        arguments = (*leaves, None, problem.labels, 1.0, divergence.VOCAB_CHUNK_SIZE, None, 1.0, ())
        loss = loss - problem.ce_weight * log_prob.ChunkedLogProbFunction.apply(*arguments)[0].mean()
    return _differentiated(loss, leaves)


def _torchtune(problem: Problem) -> Result:
    """Compute torchtune's loss: its KL lacks the teacher's entropy, has no T, and takes logits in 8 chunks."""
    losses = importlib.import_module("torchtune.modules.loss")
    kl, ce = losses.ForwardKLWithChunkedOutputLoss(), losses.CEWithChunkedOutputLoss()
    leaves, t = problem.leaves(), problem.temperature
    student = [part @ leaves[1].t() for part in leaves[0][None].chunk(kl.num_output_chunks, 1)]
    teacher = [part @ problem.teacher_weight.t() for part in problem.teacher_hidden[None].chunk(len(student), 1)]
    pair = (student, teacher) if t == 1 else ([part / t for part in parts] for parts in (student, teacher))
    loss = problem.kd_weight * kl(*pair, problem.labels[None])
    if problem.ce_weight:
        loss = loss + problem.ce_weight * ce(student, problem.labels[None])
    return _differentiated(loss, leaves)


IMPLEMENTATIONS = {
    "floor_whole": Implementation(partial(_floor, chunked=False), "matmuls alone, whole", teacher="either"),
    "floor_chunked": Implementation(partial(_floor, chunked=True), "matmuls alone, in chunks", teacher="either"),
    "naive": Implementation(_naive, "full logits", teacher="either"),
    "ours": Implementation(_ours, "float32 logits", teacher="either"),
    "ours_model_dtype": Implementation(
        partial(_ours, logits_dtype="model"), "logits rounded", half_only=True, teacher="either"
    ),
    "ours_eager": Implementation(partial(_ours, engine="eager"), "float32 logits, plain torch", teacher="either"),
    "liger": Implementation(partial(_liger, compiled=False), "1024 tokens at a time"),
    "liger_compiled": Implementation(partial(_liger, compiled=True), "1024 tokens at a time"),
    "liger_ops": Implementation(_liger_ops, "two calls: JSD with beta 0, CE", gpu_only=True),
    "liger_ce": Implementation(_liger_ce, "logits rounded", gpu_only=True, teacher="never"),
    "liger_scaled_ce": Implementation(
        _liger_scaled_ce, "logits twice; elsewhere than on Hopper plain", teacher="never"
    ),
    "quack": Implementation(_quack, f"{QUACK_CHUNK} tokens at a time", gpu_only=True, teacher="never"),
    "trl": Implementation(_trl, "two calls: KL, CE"),
    "torchtune": Implementation(_torchtune, "8 chunks of logits, all kept", with_entropy=True),
}
PACKAGES = (
    *("ddk-ds", "torch", "triton", "numpy", "liger-kernel", "trl", "torchtune", "torchao", "transformers"),
    *("quack-kernels", "nvidia-cutlass-dsl"),
)
