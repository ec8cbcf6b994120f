"""DeepSpeed's dictionaries: the defaults that a run rests on, and the precision in which ranks add gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from ddk_ds.config import Config, make_config
from ddk_ds.engine.ds_config import RELIED_ON, student_ds_config, teacher_ds_config
from ddk_ds.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_of(**sections: Any) -> Config:
    base = {"name": "run", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "d"}}
    return make_config({**base, "stop": {"steps": 4000}, **sections}, "test")


def value_at(parsed: DeepSpeedConfig, path: str) -> Any:
    """Return the value that DeepSpeed has for a dotted key of its dictionary."""
    section, _, key = path.rpartition(".")
    if section in ("zero_optimization", "bf16"):
        model = parsed.zero_config if section == "zero_optimization" else parsed.bfloat16_config
        names = {field.alias or name: name for name, field in type(model).model_fields.items()}
        return getattr(model, names[key])
    return getattr(parsed, key)


@pytest.mark.parametrize("path", RELIED_ON)
def test_deepspeed_has_the_defaults_that_a_run_rests_on(path: str) -> None:
    """If this fails, a new version has another default: look at what changed, then set the value in RELIED_ON."""
    assert value_at(DeepSpeedConfig({"train_batch_size": 1}), path) == RELIED_ON[path]


def test_they_are_passed_all_the_same() -> None:
    """So another version computes the same. What the configuration decides is not among them."""
    zero = {"sub_group_size": 7, "max_live_parameters": 8}  # without the prefix stage3_, which is accepted too
    for whole_layers, threshold in ((True, 0), (False, 100_000)):
        config = config_of(student={"path": "s", "whole_layers": whole_layers}, deepspeed={"zero_optimization": zero})
        # DeepSpeed has its own names for some keys, and refuses those of this section that it does not know.
        student, teacher = (DeepSpeedConfig(ds) for ds in (student_ds_config(config, 1), teacher_ds_config(config)))
        changed = {
            "zero_optimization.sub_group_size": 7,
            "zero_optimization.stage3_max_live_parameters": 8,
            "zero_optimization.stage3_param_persistence_threshold": threshold,
        }
        for path, default in RELIED_ON.items():
            assert value_at(student, path) == changed.get(path, default), path
            assert value_at(teacher, path) == default, path
    assert student.gradient_clipping == config.optimizer.clip_norm
    assert student_ds_config(config_of(optimizer={"clip_norm": 0.0}), 1)["gradient_clipping"] == 0.0


def ring_errors(ranks: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return two errors of a sum over `ranks` of bf16 gradients, relative to float64's sum.

    The first is that of a ring that adds in `dtype`: each part of a gradient goes round once, and each rank adds its
    own (NCCL adds in float32 and rounds to `dtype`). The second is that of rounding the exact sum once.
    """
    generator = torch.Generator().manual_seed(ranks)
    gradients = torch.randn(ranks, 1 << 14, generator=generator).bfloat16()
    total = gradients[0].to(dtype)
    for gradient in gradients[1:]:
        total = (total.float() + gradient.float()).to(dtype)
    truth = gradients.double().sum(0)
    ring, once = (float((result.double() - truth).norm() / truth.norm()) for result in (total, truth.to(dtype)))
    return ring, once


@pytest.mark.parametrize(("ranks", "in_bf16"), [(8, 0.0037), (64, 0.0097), (256, 0.019)])
def test_ranks_add_gradients_in_float32(ranks: int, in_bf16: float) -> None:
    """By default, on any number of ranks: in bf16 the error is a multiple of one rounding's, and grows with them."""
    default, rounded = config_of(), config_of(train={"reduce_dtype": "bfloat16"})
    dtypes = [DTYPES[student_ds_config(config, ranks)["communication_data_type"]] for config in (default, rounded)]
    assert ring_errors(ranks, dtypes[0])[0] < 1e-6
    ring, once = ring_errors(ranks, dtypes[1])
    assert ring == pytest.approx(in_bf16, rel=0.1) and once == pytest.approx(0.0017, rel=0.1)


def test_gradients_of_fp32_are_not_rounded() -> None:
    with pytest.raises(ConfigError, match="reduce_dtype: bfloat16 rounds the gradients of precision: fp32; remove it"):
        config_of(train={"precision": "fp32", "reduce_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"communication_data_type.*follows from train\.reduce_dtype"):
        student_ds_config(config_of(deepspeed={"communication_data_type": "bf16"}), 1)
