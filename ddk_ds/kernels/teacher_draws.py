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
from ddk_ds.kernels.chunked import HeadInput
from ddk_ds.kernels.linear_kd import teacher_logits
from ddk_ds.kernels.options import ALIGN, LabelLogProbs, Options, TeacherTopK

# A row kernel holds as many numbers of a row in registers.
MAX_DRAWS = 4_096
_LOWEST = -1e30  # 0 times it is 0
_BLOCK_NUMBERS = 1 << 22  # probabilities of chosen blocks that are held at a time


class TeacherDraws(NamedTuple):
    """Tokens drawn from a teacher's softmax at the loss's temperature."""

    ids: Tensor
    """(n, draws) int64, ascending in each row, a token as often as it was drawn."""
    entropy: Tensor
    """(n,) float32, of the whole softmax in nats: what turns the cross-entropy with the shares into a KL."""

    def known(self) -> TeacherTopK:
        """Return the distinct tokens and their shares, to be the teacher of `linear_kd_loss`."""
        ids, draws = self.ids, self.ids.shape[1]
        counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
        again = torch.zeros_like(ids, dtype=torch.bool)
        again[:, 1:] = ids[:, 1:] == ids[:, :-1]
        log_shares = (counts / draws).log().masked_fill(again, -torch.inf)
        return TeacherTopK(ids.masked_fill(again, -1), log_shares, torch.full_like(self.entropy, -torch.inf))

    def kl_offset(self, known: TeacherTopK) -> Tensor:
        """Return (n,) float32 to add to a token's divergence to get an estimate of its KL that is right on average.

        `known` is what `known()` returns.
        """
        shares = known.log_probs.exp()
        return -self.entropy - torch.where(known.ids < 0, 0, shares * known.log_probs).sum(1)


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
        ConfigError: a shape, dtype or option is wrong, or `draws` is not in 1..4,096.
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
    for logits in teacher_logits(HeadInput(hidden, weight, bias), options, of_labels):
        key = keys[done : done + len(logits)]
        done += len(logits)
        logits[:, options.vocab_size :] = _LOWEST
        logits.sub_(logits.amax(-1, keepdim=True))
        q = logits.softmax(-1)
        ids.append(_inverse(q, _uniforms(key, draws)))
        entropies.append(-q.amax(-1).log() - q.mul_(logits).sum(-1))
    return TeacherDraws(torch.cat(ids), torch.cat(entropies).float())


def _inverse(q: Tensor, uniforms: Tensor) -> Tensor:
    """Return for each of `uniforms` (m, n) in [0, 1) the first token whose cumulated probability is above it.

    q (m, W) are probabilities. A block of them is found first, and the token in it: a cumulated sum of a row of a large
    vocabulary in float64 would cost more than its softmax.
    """
    blocks = q.unflatten(-1, (-1, ALIGN))
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    total = ends[:, -1:]
    place = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(ends, place, right=True)
    place -= ends.gather(1, block) - sums.gather(1, block)
    found = torch.empty_like(block)
    for row in torch.arange(len(q)).split(max(1, _BLOCK_NUMBERS // (uniforms.shape[1] * ALIGN))):
        rows = slice(int(row[0]), int(row[-1]) + 1)
        inside = blocks[rows].gather(1, block[rows, :, None].expand(-1, -1, ALIGN)).double().cumsum(-1)
        found[rows] = torch.searchsorted(inside, place[rows, :, None], right=True).squeeze(-1).clamp_max(ALIGN - 1)
    return block * ALIGN + found


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
