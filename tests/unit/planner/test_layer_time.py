"""The small kernels between a layer's matmuls: torch's count of what transformers' own layers move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from ddk_ds.planner.known_points import Shape, dense_model, profiled_model
from ddk_ds.planner.layer_time import SMALL_BACKWARD, unfused_bytes

TOKENS, HIDDEN, KEY_VALUE, INTERMEDIATE = 256, 128, 64, 192
MATMULS = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product")


class Moved(TorchDispatchMode):
    """Counter of the bytes that the operators in its block read and write, by operator; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        if not any(tensor.untyped_storage().data_ptr() in known for tensor in made):
            self.by[func.overloadpacket._qualified_op_name] += sum(t.numel() * t.itemsize for t in (*given, *made))
        return result


def moved(kind: str, layers: int, *, backward: bool) -> int:
    """Return the bytes of everything but matmuls and attention in a pass of a model of this kind."""
    values = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 4, "head_dim": 32}
    config = AutoConfig.for_model(
        kind, vocab_size=8, num_hidden_layers=layers, num_key_value_heads=2, use_cache=False, **values
    )
    model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    with Moved() as count, torch.set_grad_enabled(backward):
        states = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64)).last_hidden_state
        if backward:
            states.backward(torch.ones_like(states))
    return sum(size for name, size in count.by.items() if not name.startswith(MATMULS))


def of_a_layer(kind: str, *, backward: bool) -> float:
    return (moved(kind, 3, backward=backward) - moved(kind, 1, backward=backward)) / 2 / TOKENS


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_bytes_are_torchs(kind: str) -> None:
    """Beyond one kernel for each norm with its residual (8 bytes), rotary positions (4) and gate (6; backward 10)."""
    shape = profiled_model(Shape(kind, HIDDEN, 1, 4, 2, INTERMEDIATE, 8), 64).shape
    ours = unfused_bytes(replace(shape, normed_heads=kind == "qwen3"))
    fused = 2 * 8 * HIDDEN + 4 * (HIDDEN + KEY_VALUE) + 6 * INTERMEDIATE
    forward = of_a_layer(kind, backward=False)
    assert ours == pytest.approx(forward - fused, rel=0.03)
    if kind != "qwen3":
        again = of_a_layer(kind, backward=True) - forward - fused - 4 * INTERMEDIATE
        assert again == pytest.approx(SMALL_BACKWARD * ours, rel=0.03)


def test_the_bytes_by_hand() -> None:
    """Qwen1.5-14B's: 68 x 5,120 + 16 x 2 x 5,120 + 4 x 13,696. With a GPT's layers the peak was measured."""
    shape = profiled_model(Shape("qwen2", 5120, 40, 40, 40, 13696, 152064), 2048).shape
    assert unfused_bytes(shape) == 348_160 + 163_840 + 54_784
    assert unfused_bytes(dense_model(24, 2048, vocab_size=50368, length=2048).shape) == 0
