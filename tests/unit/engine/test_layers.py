"""How layers are computed: the same gradients, with less kept or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ddk_ds.config.sections import Student, Teacher
from ddk_ds.engine.layers import checkpoint_layers, layers_of, prepare_layers
from ddk_ds.engine.teacher import Int8Linear, quantize
from ddk_ds.errors import ConfigError

IDS = torch.arange(2 * 48).reshape(2, 48) % 50


def make() -> Any:
    torch.manual_seed(0)
    values = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, num_hidden_layers=3, **values)).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.base_model(input_ids=IDS, use_cache=False).last_hidden_state.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("how", [True, "selective"])
def test_what_is_computed_again_is_the_same_to_the_bit(how: bool | str) -> None:
    expected, model = gradients(make()), make()
    checkpoint_layers(model, how)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_selective_checkpointing_multiplies_no_matrix_twice() -> None:
    counts = {}
    for how in (False, "selective", True):
        model = make()
        checkpoint_layers(model, how)
        with FlopCounterMode(display=False) as counter:
            gradients(model)
        counts[how] = counter.get_total_flops()
    assert counts["selective"] == counts[False] < counts[True]


def test_a_compiled_layer_computes_the_same() -> None:
    expected, model = gradients(make()), make()
    prepare_layers(model.base_model, 3, Student(path="s", compile_layers=True))
    assert all(hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in model.base_model.layers)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm()


def test_layers_are_gathered_whole_unless_told_otherwise() -> None:
    for whole in (True, False):
        model = make()
        prepare_layers(model.base_model, 3, Teacher(path="t", whole_layers=whole))
        marked = [getattr(layer, "_z3_leaf", False) for layer in layers_of(model.base_model, 3)]
        assert marked == [whole] * 3


def test_a_backbone_without_layers() -> None:
    with pytest.raises(ConfigError, match="whole_layers to false"):
        prepare_layers(nn.Linear(2, 2), 3, Student(path="s"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"compile_layers": True, "whole_layers": False}, "whole_layers to true"),
        ({"micro_batches_per_pass": 2, "whole_layers": False}, "layer by layer"),
    ],
)
def test_options_that_do_not_go_together(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Teacher(path="t", **values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_near(dtype: torch.dtype) -> None:
    """Half a level at the most; the integers come back out of the dtype that carries them."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 64).to(dtype), torch.randn(24).to(dtype), torch.randn(5, 64).to(dtype)
    weight[3] = 0
    integers, scale = quantize(weight)
    error = (integers.float() * scale.float()[:, None] - weight.float()).abs()
    rounding = 0.0 if dtype == torch.float32 else 2**-8 * 127  # of the scale itself
    assert (error <= scale.float()[:, None] * (0.5 + rounding) + 1e-7).all() and integers.abs().max() <= 127
    layer = Int8Linear(weight, bias)
    assert torch.equal(layer.packed.view(torch.int8), integers) and layer.packed.dtype == dtype
    assert layer.packed.numel() * layer.packed.itemsize == weight.numel()
    exact = nn.functional.linear(x.float(), integers.float() * scale.float()[:, None], bias.float())
    torch.testing.assert_close(layer(x).float(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=5e-2)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
