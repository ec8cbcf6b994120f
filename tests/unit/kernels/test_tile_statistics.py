"""An emulation: a row's softmaxes and KL merged from statistics that a matmul's epilogue could keep of each tile.

Nothing in the package does so yet. docs/log.md says what it would save on a GPU and what it needs; these tests say
which numbers would be exact, near the teacher above all, and which need a second reading of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ddk_ds.kernels import Options
from ddk_ds.kernels.reference import reference_kd_loss

ROWS, VOCAB = 24, 1003  # the last tile is ragged
NEAR = (1e-2, 1e-4, 1e-6)  # nats


class Tiles(NamedTuple):
    """Statistics (n, tiles) of the logits s and t of a tile; w = exp(t - t_top)."""

    s_top: Tensor
    """Largest s."""
    s_sum: Tensor
    """Sum of exp(s - s_top)."""
    t_top: Tensor
    """Largest t."""
    t_sum: Tensor
    """Sum of w."""
    mean: Tensor
    """Mean of t - s, weighted by w."""
    bend: Tensor
    """Sum of w (exp(-d) - 1 + d) with d = t - s - mean: every summand is of second order and not negative."""


def phi(x: Tensor) -> Tensor:
    """Return exp(-x) - 1 + x without cancellation, in the precision of x."""
    series = torch.ones_like(x)
    for factor in range(16, 2, -1):
        series = 1 - x / factor * series
    return torch.where(x.abs() < 0.35, x * x / 2 * series, torch.expm1(-x) + x)


def tiles_of(student: Tensor, teacher: Tensor, width: int) -> Tiles:
    """Return the statistics of tiles of `width` columns: the teacher's epilogue reads the student's tile."""
    columns = []
    for s, t in zip(student.split(width, -1), teacher.split(width, -1), strict=True):
        s_top, t_top = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
        w, d = (t - t_top).exp(), t - s
        mean = (w * d).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
        bend = (w * phi(d - mean)).sum(-1)
        columns.append((s_top[:, 0], (s - s_top).exp().sum(-1), t_top[:, 0], w.sum(-1), mean[:, 0], bend))
    return Tiles(*(torch.stack(column, -1) for column in zip(*columns, strict=True)))


def merged(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Return by row log sum exp of s and of t, and KL(teacher || student).

    With q = softmax(t), d = t - s and its mean m under q, the KL is log sum q exp(-(d - m)). Tile j with the share o_j
    of q, the mean m_j and x_j = m_j - m adds o_j (phi(x_j) + exp(-x_j) bend_j / t_sum_j) to that sum less 1, since
    sum o_j x_j = 0: again terms of second order that are not negative.
    """
    s_top, t_top = tiles.s_top.amax(-1, keepdim=True), tiles.t_top.amax(-1, keepdim=True)
    s_sum = (tiles.s_sum * (tiles.s_top - s_top).exp()).sum(-1)
    weights = tiles.t_sum * (tiles.t_top - t_top).exp()
    t_sum = weights.sum(-1)
    share = weights / t_sum[:, None]
    # The mean of differences from one tile's mean: means themselves may be large.
    x = tiles.mean - tiles.mean[:, :1]
    x = x - (share * x).sum(-1, keepdim=True)
    rest = (share * (phi(x) + (-x).exp() * tiles.bend / tiles.t_sum)).sum(-1)
    return s_top[:, 0] + s_sum.log(), t_top[:, 0] + t_sum.log(), rest.log1p()


def pair(kl: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float64 logits of a student and a teacher about `kl` nats apart, with another constant in each row."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    step = (2 * kl) ** 0.5 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    constant = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
    return (teacher + step + constant).float().double(), teacher.float().double()  # exact in float32


def truth(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reference's KL of each row, and its gradient by the student's logits: heads that are the identity."""
    same = torch.eye(VOCAB, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    options = Options(VOCAB, gamma=1.0, ce_weight=0.0)
    one, labels = torch.tensor(1), torch.zeros(ROWS, dtype=torch.int64)
    loss = reference_kd_loss(leaf, same, teacher, same, labels, num_valid=one, options=options)
    assert loss.token_kl is not None
    return loss.token_kl, torch.autograd.grad(loss.loss, leaf)[0]


def error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("width", [64, 128, 256, VOCAB])
@pytest.mark.parametrize("kl", [3.0, *NEAR])
def test_statistics_of_tiles_give_the_row(width: int, kl: float) -> None:
    student, teacher = pair(kl)
    s_lse, t_lse, found = merged(tiles_of(student, teacher, width))
    torch.testing.assert_close(s_lse, student.logsumexp(-1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(t_lse, teacher.logsumexp(-1), rtol=1e-14, atol=1e-14)
    assert error(found, truth(student, teacher)[0]) < 1e-15 / kl + 1e-15  # the definition's own cancellation


@pytest.mark.parametrize("kl", NEAR)
def test_the_value_needs_no_second_reading(kl: float) -> None:
    """In float32 the merged KL keeps its digits; the sum of q (t - s) with a difference of two logs loses them."""
    student, teacher = pair(kl)
    true, _ = truth(student, teacher)
    s, t = student.float(), teacher.float()
    for width in (64, 128, 256, VOCAB):
        assert error(merged(tiles_of(s, t, width))[2], true) < 1e-7 / kl**0.5  # a mean is rounded, x is of this size
    plain = (t.softmax(-1) * (t - s)).sum(-1) + s.logsumexp(-1) - t.logsumexp(-1)
    assert error(plain, true) > 1e-7 / kl


@pytest.mark.parametrize("kl", NEAR)
def test_the_gradient_needs_one(kl: float) -> None:
    """p - q from merged statistics and logits that are read again is exact; from exponentials in bf16 it is not.

    Those are what quack's cross-entropy keeps in place of the logits, scaled by a power of 2 for each tile.
    """
    student, teacher = pair(kl)
    _, true = truth(student, teacher)
    s, t = student.float(), teacher.float()
    found = {}
    for width in (128, VOCAB):
        s_lse, t_lse, _ = (statistic[:, None] for statistic in merged(tiles_of(s, t, width)))
        r = (t - s) + (s_lse - t_lse)
        found[width] = error((t - t_lse).exp() * torch.expm1(-r), true)
    assert found[128] < min(1e-6 / kl**0.5, 2 * found[VOCAB])  # both logs are rounded, r is of the size sqrt(2 kl)
    p16, q16 = ((x.to(torch.bfloat16).float()) for x in ((s - s_lse).exp(), (t - t_lse).exp()))
    assert error(p16 - q16, true) > 1e-3 / kl**0.5


def test_tiles_may_come_in_any_order_and_be_padding() -> None:
    student, teacher = pair(0.3)
    whole = tiles_of(student, teacher, 64)
    order = torch.randperm(whole.mean.shape[1], generator=torch.Generator().manual_seed(1))
    for once, again in zip(merged(whole), merged(Tiles(*(part[:, order] for part in whole))), strict=True):
        torch.testing.assert_close(once, again, rtol=1e-14, atol=1e-14)
    low = torch.full((ROWS, 64), -1e30, dtype=torch.float64)
    wider = tiles_of(torch.cat([student, low], -1), torch.cat([teacher, low], -1), 64)
    for once, again in zip(merged(whole), merged(wider), strict=True):
        torch.testing.assert_close(once, again, rtol=1e-13, atol=1e-13)
