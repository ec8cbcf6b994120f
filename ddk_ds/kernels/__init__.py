"""Torch kernels of the distillation head: linear layer, CE and KL in one; plain tensors in and out."""

from __future__ import annotations

from ddk_ds.kernels.linear_kd import linear_kd_loss, linear_nll
from ddk_ds.kernels.reference import KDLoss

__all__ = ["KDLoss", "linear_kd_loss", "linear_nll"]
