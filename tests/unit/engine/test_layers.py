"""Recomputed and compiled layers give the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ddk_ds.config.sections import Student, Teacher
from ddk_ds.engine import layers
from ddk_ds.engine.layers import checkpoint_layers, layers_of, prepare_layers
from ddk_ds.errors import ConfigError

IDS = torch.arange(2 * 48).reshape(2, 48) % 50


def make() -> Any:
    torch.manual_seed(0)
    values = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, num_hidden_layers=3, **values)).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.base_model(input_ids=IDS, use_cache=False).last_hidden_state.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("mode", "place"), [(True, "none"), ("selective", "none"), (True, "cpu")])
def test_recomputed_activations_give_the_same_gradients_to_the_bit(mode: Any, place: Any) -> None:
    expected, model = gradients(make()), make()
    checkpoint_layers(model, Student(path="s", gradient_checkpointing=mode, offload_activations=place))
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_goes_to_the_host_is_the_input_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved = make(), []

    def hooks(pin_memory: bool) -> Any:
        assert pin_memory is torch.cuda.is_available()

        def pack(saved: torch.Tensor) -> int:
            moved.append(saved)
            return len(moved) - 1

        return torch.autograd.graph.saved_tensors_hooks(pack, moved.__getitem__)

    monkeypatch.setattr(layers, "save_on_cpu", hooks)
    checkpoint_layers(model, Student(path="s", gradient_checkpointing=True, offload_activations="cpu"))
    states = model.base_model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert len(moved) == 3 and all(torch.equal(*pair) for pair in zip(moved, states[:3], strict=True))


def test_selective_checkpointing_multiplies_no_matrix_twice() -> None:
    counts = {}
    modes: list[Any] = [False, "selective", True]
    for mode in modes:
        model = make()
        checkpoint_layers(model, Student(path="s", gradient_checkpointing=mode))
        with FlopCounterMode(display=False) as counter:
            gradients(model)
        counts[mode] = counter.get_total_flops()
    assert counts["selective"] == counts[False] < counts[True]


@pytest.mark.long("torch's compiler is imported and run, 15 s of CPU")
def test_a_compiled_layer_computes_the_same() -> None:
    expected, model = gradients(make()), make()
    prepare_layers(model.base_model, 3, Student(path="s", compile_layers=True))
    assert all(hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in model.base_model.layers)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm()


def test_each_layer_is_gathered_as_a_unit_unless_switched_off() -> None:
    for whole in (True, False):
        model = make()
        prepare_layers(model.base_model, 3, Teacher(path="t", whole_layers=whole))
        marked = [getattr(layer, "_z3_leaf", False) for layer in layers_of(model.base_model, 3)]
        assert marked == [whole] * 3


def test_a_backbone_without_layers() -> None:
    with pytest.raises(ConfigError, match="whole_layers to false"):
        prepare_layers(nn.Linear(2, 2), 3, Student(path="s"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compile_layers": True, "whole_layers": False}, "whole_layers to true"),
        ({"micro_batches_per_pass": 2, "whole_layers": False}, "layer by layer"),
        ({"shard_within": "gpu", "offload_params": "cpu"}, "set shard_within to node or world"),
        ({"shard_within": "auto", "offload_params": "nvme"}, "set shard_within to node or world"),
        ({"shard_within": "auto", "compile_layers": True}, "name one of the three"),
    ],
)
def test_options_that_cannot_be_combined(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(path="t", **values)


@pytest.mark.parametrize(("mode", "kept"), [(False, "all activations"), ("selective", "results of matrix products")])
def test_only_the_inputs_of_recomputed_layers_go_to_the_host(mode: Any, kept: str) -> None:
    with pytest.raises(ValueError, match=f"keeps (the )?{kept} on the device: set gradient_checkpointing to true"):
        Student(path="s", gradient_checkpointing=mode, offload_activations="cpu")
