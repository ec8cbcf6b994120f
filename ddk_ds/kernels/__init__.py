"""The distillation head: linear layer, cross-entropy and divergence in one, on plain tensors."""

from __future__ import annotations

from ddk_ds.kernels.divergences import DIVERGENCES, Divergence
from ddk_ds.kernels.linear_kd import linear_kd_loss, linear_nll, top_k_of
from ddk_ds.kernels.options import (
    KDLoss,
    LabelLogProbs,
    LogitForm,
    LogitsDtype,
    Options,
    TeacherTopK,
    default_chunk_tokens,
)
from ddk_ds.kernels.teacher_draws import TeacherDraws, counted_draws, draws_of

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "KDLoss",
    "LabelLogProbs",
    "LogitForm",
    "LogitsDtype",
    "Options",
    "TeacherDraws",
    "TeacherTopK",
    "counted_draws",
    "default_chunk_tokens",
    "draws_of",
    "linear_kd_loss",
    "linear_nll",
    "top_k_of",
]
