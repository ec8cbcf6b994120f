"""What a step minimises: small objects that the loop calls in one way."""

from __future__ import annotations

from ddk_ds.config import Config
from ddk_ds.engine.models import Teacher
from ddk_ds.methods.base import Method
from ddk_ds.methods.continued_pretraining import ContinuedPretraining
from ddk_ds.methods.distillation import Distillation

__all__ = ["ContinuedPretraining", "Distillation", "Method", "make_method"]


def make_method(config: Config, teacher: Teacher | None, vocab_size: int) -> Method:
    """The method that `config.method` names."""
    chunk = config.loss.chunk_tokens
    if config.method == "cpt" or config.loss.gamma == 0:
        return ContinuedPretraining(vocab_size, chunk)
    assert teacher is not None, f"method {config.method} runs without its teacher"
    return Distillation(teacher, vocab_size, config.loss.gamma, config.loss.temperature, chunk)
