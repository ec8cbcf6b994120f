"""What a step minimises: small objects that the loop calls in one way."""

from __future__ import annotations

from ddk_ds.config import Config
from ddk_ds.engine.models import Teacher
from ddk_ds.methods.base import HeadOptions, Method
from ddk_ds.methods.continued_pretraining import ContinuedPretraining
from ddk_ds.methods.distillation import Distillation

__all__ = ["ContinuedPretraining", "Distillation", "HeadOptions", "Method", "make_method"]


def make_method(config: Config, teacher: Teacher | None, options: HeadOptions) -> Method:
    """The method that `config.method` names."""
    if config.method == "cpt" or config.loss.gamma == 0:
        return ContinuedPretraining(options)
    assert teacher is not None, f"method {config.method} runs without its teacher"
    return Distillation(teacher, config.loss, options)
