"""A teacher known by tokens that are drawn from it (RS-KD, arXiv 2503.16870).

With w_i the share of token i among the draws, sum w_i (log w_i - log p_i) has the gradient p - w, whose expectation is
p - q: that of the forward KL to the whole teacher. Draws are stratified: the j-th of n is uniform in the j-th n-th part
of the distribution. Each share has still q_i for its expectation, and no function of the tokens has a larger variance
than with independent draws.

The numbers behind the draws of a token are a hash of seed, sample and position: whoever computes them gets the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.chunked import HeadInput, row_buffer
from ddk_ds.kernels.linear_kd import teacher_logits
from ddk_ds.kernels.options import ALIGN, LabelLogProbs, Options, TeacherTopK

MAX_DRAWS = 65_535


class TeacherDraws(NamedTuple):
    """Tokens drawn from a teacher's softmax at the loss's temperature."""

    ids: Tensor
    """(n, draws) int64, ascending in each row, a token as often as it was drawn."""
    entropy: Tensor
    """(n,) float32, of the whole softmax in nats: what turns the cross-entropy with the shares into a KL."""


def counted_draws(ids: Tensor, counts: Tensor, entropy: Tensor, draws: int) -> tuple[TeacherTopK, Tensor]:
    """Return the teacher for `linear_kd_loss` that has drawn these tokens, and what is added to a row's divergence.

    With that, (n,) float32, it is an estimate of the KL to the whole teacher that is right on average.

    Args:
        ids: (n, w) int64, each token of a row once, or -1.
        counts: (n, w) int64, how often it was drawn; 0 where the id is -1.
        entropy: (n,) float32, the whole softmax's.
        draws: number of draws of a row.
    """
    log_shares = (counts / draws).log()
    offset = -entropy - torch.where(ids < 0, 0, log_shares.exp() * log_shares).sum(1)
    return TeacherTopK(ids, log_shares, torch.full_like(entropy, -torch.inf)), offset


@torch.no_grad()
def draws_of(
    hidden: Tensor,
    weight: Tensor,
    sample_ids: Tensor,
    draws: int,
    *,
    seed: int,
    options: Options,
    bias: Tensor | None = None,
    of_labels: LabelLogProbs | None = None,
) -> TeacherDraws:
    """Draw tokens from the teacher's softmax at each position of some samples.

    Args: hidden (B * L, H), weight (V, H) and bias (V,) are the teacher's, sample_ids (B,) int64 those of the samples.
        Only the options vocab_size, temperature, chunk_tokens, logits_dtype and teacher_form have an effect.
        `of_labels` (B * L,) is filled.

    Raises:
        ConfigError: a shape, dtype or option is wrong, or `draws` is not in 1..65,535.
    """
    if not 1 <= draws <= MAX_DRAWS:
        raise ConfigError(f"draws is {draws}: give 1 to {MAX_DRAWS:,}")
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1 or len(hidden) % max(1, len(sample_ids)):
        raise ConfigError(
            f"sample_ids are {sample_ids.dtype} {tuple(sample_ids.shape)} for {len(hidden)} rows of teacher_hidden: "
            "give int64 (B,), and B * L rows"
        )
    keys = _token_keys(seed, sample_ids.to(hidden.device), len(hidden) // max(1, len(sample_ids)))
    ids, entropies = [], []
    done = 0
    for logits, log_norm in teacher_logits(HeadInput(hidden, weight, bias), options, of_labels):
        key = keys[done : done + len(logits)]
        done += len(logits)
        top = logits.amax(-1, keepdim=True)
        buffer = row_buffer("shares", len(logits), options.vocab_size, logits.dtype, hidden)
        parts = torch.exp(logits.sub_(top), out=buffer)
        sums = parts.unflatten(-1, (-1, ALIGN)).sum(-1).double()
        ids.append(_inverse(parts, sums, _uniforms(key, draws)))
        total = sums.sum(-1)
        log_norm.copy_(top.squeeze(1) + total.log())
        entropies.append(total.log() - parts.mul_(logits).sum(-1) / total)
    return TeacherDraws(torch.cat(ids), torch.cat(entropies).float())


def _inverse(parts: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """Return for each of `uniforms` (m, n) in [0, 1) the first token whose cumulated share is above it.

    parts (m, W) are proportional to probabilities, and sums (m, W / ALIGN) float64 those of their blocks. For few draws
    a block is found first, and the token in it: a cumulated sum of all of a row in float64 costs more than its softmax.
    """
    in_blocks = uniforms.shape[1] * ALIGN < parts.shape[1]
    ends = (sums if in_blocks else parts.double()).cumsum(-1)
    total = ends[:, -1:]
    place = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(ends, place, right=True)
    if not in_blocks:
        return found
    place -= ends.gather(1, found) - sums.gather(1, found)
    blocks = parts.unflatten(-1, (-1, ALIGN)).gather(1, found[..., None].expand(-1, -1, ALIGN))
    inside = torch.searchsorted(blocks.double().cumsum(-1), place[..., None], right=True).squeeze(-1)
    return found * ALIGN + inside.clamp_max(ALIGN - 1)


def _uniforms(keys: Tensor, draws: int) -> Tensor:
    """Return (m, draws) float64, ascending: one number in each of `draws` equal parts of [0, 1)."""
    place = torch.arange(draws, device=keys.device)
    numbers = _mixed(keys[:, None] + place) >> 11 & (1 << 53) - 1
    return (place + numbers.double() * 2.0**-53) / draws


def _token_keys(seed: int, sample_ids: Tensor, length: int) -> Tensor:
    """Return (B * L,) int64: a key for each position of each sample."""
    by_sample = _mixed(sample_ids + _mixed(torch.tensor(seed, device=sample_ids.device)))
    positions = torch.arange(length, device=sample_ids.device)
    return _mixed(by_sample[:, None] + positions).flatten()


def _mixed(x: Tensor) -> Tensor:
    """Return 64 bits in which every bit depends on every bit of `x` (SplitMix64's finaliser); int64, wrapping."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31 & (1 << 33) - 1)
