"""The load-balancing loss of a mixture-of-experts student, which keeps its routers from choosing the same few experts.

The loss is transformers' own of the model's family, of the router logits of all layers (Switch Transformers, arXiv
2101.03961, Eq. 4 to 6).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ddk_ds.errors import ConfigError

_COEFFICIENTS = ("router_aux_loss_coef", "moe_loss_weight", "aux_loss_coef")
"""Attributes of transformers' models that hold the loss's weight: most families', DBRX's, JetMoE's."""

_ARGUMENTS = ["num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a model and its weight in the training loss."""

    weight: float
    num_experts: int
    experts_per_token: int
    function: Callable[[Sequence[torch.Tensor], int, int, None], torch.Tensor]
    """transformers' function of the router logits (B*L, experts) of each layer; its last argument is a mask."""

    def __call__(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the loss of a micro-batch, without its weight, from the router logits of its layers."""
        return self.function(logits, self.num_experts, self.experts_per_token, None)


def router_loss(model: Any, wanted: float | Literal["auto"]) -> RouterLoss | None:
    """Return the router loss of a transformers model, `student.router_aux_loss` being `wanted`; None if it has none.

    Raises ConfigError if a weight is given and transformers has no such loss for the model.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    own = next((getattr(model, name) for name in _COEFFICIENTS if hasattr(model, name)), None)
    num_experts, chosen = (getattr(model, name, None) or 0 for name in ("num_experts", "num_experts_per_tok"))
    known = function is not None and list(inspect.signature(function).parameters)[1:] == _ARGUMENTS
    if not known or own is None or num_experts < 2:
        if wanted not in ("auto", 0):
            raise ConfigError(
                f"student.router_aux_loss is {wanted:g}, but transformers has no load-balancing loss for "
                f"{type(model).__name__}: set student.router_aux_loss to auto"
            )
        return None
    weight = float(own if wanted == "auto" else wanted)
    assert function is not None
    return RouterLoss(weight, num_experts, chosen, function) if weight else None
