"""The methods: objects that compute the loss of a step, all called through the protocol `Method`."""

from __future__ import annotations

from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.teacher import Teacher
from ddk_ds.kernels import Options
from ddk_ds.methods.base import IGNORE_INDEX, Batch, Method, next_token_labels, own_labels, token_losses
from ddk_ds.methods.cached_distillation import CachedDistillation, CachedTeacher
from ddk_ds.methods.distillation import ContinuedPretraining, Distillation
from ddk_ds.methods.doremi import DoremiProxy
from ddk_ds.methods.ted import Ted, TedFilters

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "CachedTeacher",
    "Method",
    "make_method",
    "next_token_labels",
    "own_labels",
    "token_losses",
]


def make_method(
    config: Config,
    teacher: Teacher | None,
    options: Options,
    num_domains: int,
    state: dict[str, Any],
    cached: CachedTeacher | None = None,
) -> Method:
    """Make the method that `config.method` names.

    Args:
        teacher: the frozen model (DoReMi's reference model); None for continued pre-training, and with a cache that is
            only read.
        options: options of the kernel; the section `loss` replaces divergence, coefficient, gamma and temperature.
        num_domains: number of the run's domains, for DoReMi's weights.
        state: result of an earlier object's `state_dict`; {} in a new run.
        cached: the section teacher.cache; None without it.
    """
    if cached is not None:
        return CachedDistillation(cached, teacher, config.loss, options)
    if teacher is None:
        return ContinuedPretraining(options)
    if config.method == "doremi_proxy":
        return DoremiProxy(teacher, options, config.doremi, num_domains, state)
    if config.method == "ted_filters":
        return TedFilters(teacher, options)
    distillation = Distillation(teacher, config.loss, options)
    return Ted(distillation, teacher, config.ted.weight) if config.method == "ted" else distillation
