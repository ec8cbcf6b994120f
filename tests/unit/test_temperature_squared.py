"""The factor T^2 of the divergence and the switch that leaves it out, against plain torch in float64."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from ddk_ds.config import Loss
from ddk_ds.engine.head import OutputHead
from ddk_ds.kernels import Options
from ddk_ds.methods.base import Batch
from ddk_ds.methods.distillation import Distillation


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("squared", [True, False])
def test_the_divergence_is_multiplied_by_t_squared_unless_told(temperature: float, squared: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, teacher_hidden, teacher_weight = normal(6, 4), normal(9, 4), normal(6, 5), normal(9, 5)
    weight.requires_grad_()
    labels = torch.randint(0, 9, (1, 6), generator=generator)
    count = torch.tensor([6.0], dtype=torch.float64)
    batch = Batch(labels, labels, torch.zeros(1, dtype=torch.int64), count, count.sum(), 0.0)
    teacher: Any = SimpleNamespace(head=SimpleNamespace(gathered=lambda: nullcontext(OutputHead(teacher_weight, None))))
    given = {"gamma": 0.5, "temperature": temperature} | ({} if squared else {"temperature_squared": False})
    method = Distillation(teacher, Loss(**given), Options(9, gamma=0.0))  # type: ignore[arg-type]
    loss = method.distil(hidden, OutputHead(weight, None), teacher_hidden, batch).loss

    logits = hidden @ weight.T
    log_p, log_q = (x.div(temperature).log_softmax(-1) for x in (logits, teacher_hidden @ teacher_weight.T))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = functional.cross_entropy(logits, labels[0]) + 0.5 * kl * (temperature**2 if squared else 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, weight)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
