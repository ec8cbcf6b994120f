"""Functions that every rank of test_moe.py runs: teachers in 8 bits beside plain models that are rounded here."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ddk_ds.engine.layers import layers_of
from ddk_ds.engine.model_files import ModelFiles, model_shape, read_model
from ddk_ds.engine.quantized import quantize_layers
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.teacher import load_teacher
from tests.dist.tiny import VOCAB, save_model, tiny_config

ROUTERS = ("router", "gate")


def _files(runtime: Runtime, root: Path, kind: str, shape: dict[str, Any]) -> ModelFiles:
    """Write a teacher of this kind below `root`, and return its files. Collective."""
    if runtime.comm.rank == 0:
        save_model(root / "teacher", model_type=kind, vocab=VOCAB, tied=False, seed=2, **shape)
    runtime.comm.barrier()
    return read_model(root / "teacher", "teacher.path")


def int8_teachers(runtime: Runtime, folder: str, kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Load a teacher of each kind in 8 bits; return by kind how far it is off, and its elements beside the estimate's.

    The right values are those of the plain model with its weights rounded here.
    """
    results = {}
    for kind, shape in kinds.items():
        root = Path(folder) / kind
        files = _files(runtime, root, kind, shape)
        config = tiny_config(root, teacher={"quantize": "int8"})
        assert config.teacher is not None
        teacher = load_teacher(config, files, VOCAB, runtime.comm)
        ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
        [hidden] = teacher.hidden([ids])
        plain = AutoModelForCausalLM.from_pretrained(root / "teacher", attn_implementation="eager")
        exact = plain.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        rows = _round(plain)
        rounded = plain.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        elements = sum(parameter.ds_numel for parameter in teacher.whole.parameters())
        results[kind] = {
            "off": float((hidden - rounded).abs().max() / rounded.abs().max()),
            "rounding": float((hidden - exact).abs().max() / exact.abs().max()),
            "scales": elements - model_shape(files).as_sharded(config.teacher, "fp32").parameters,
            "rows": rows,
        }
    return results


def rounded_inputs(
    runtime: Runtime, folder: str, kinds: dict[str, dict[str, Any]], skipped: dict[str, list[int]], formats: list[str]
) -> dict[str, dict[str, Any]]:
    """Load a teacher of each kind in each of these formats, which round inputs; return as `int8_teachers`, and "same".

    That is True if its hidden states are, to the bit, those of a model that no ZeRO-3 has sharded. `skipped` has the
    layers of a kind that stay in bf16. The results are by format and kind.
    """
    results = {}
    for form, (kind, shape) in product(formats, kinds.items()):
        root = Path(folder) / form / kind
        files = _files(runtime, root, kind, shape)
        left = skipped.get(kind, [])
        section = {"quantize": form, "quantize_skip_layers": left, "attn_implementation": "eager"}
        config = tiny_config(root, teacher=section, train={"precision": "bf16"})
        assert config.teacher is not None
        teacher = load_teacher(config, files, VOCAB, runtime.comm)
        assert teacher.unquantized == [f"layer {number}" for number in left]
        ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
        [hidden] = teacher.hidden([ids])
        alone, plain = (
            AutoModelForCausalLM.from_pretrained(
                root / "teacher", dtype=torch.bfloat16, attn_implementation="eager"
            ).eval()
            for _ in range(2)
        )
        of_one = layers_of(alone.base_model, files.num_layers)
        quantize_layers(of_one, config.teacher, files.config, lambda _: None)
        exact = _hidden(plain, ids)
        rows = _round_both(plain, left, form)
        rounded = _hidden(plain, ids)
        elements = sum(parameter.ds_numel for parameter in teacher.whole.parameters())
        results[f"{form}, {kind}"] = {
            "same": torch.equal(hidden.float(), _hidden(alone, ids)),
            "off": float((hidden.float() - rounded).norm() / rounded.norm()),
            "rounding": float((hidden.float() - exact).norm() / exact.norm()),
            "scales": elements - model_shape(files).as_sharded(config.teacher, "bf16").parameters,
            "rows": rows,
        }
    return results


def _hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's hidden states (B * L, H) in float32."""
    with torch.inference_mode():
        states: torch.Tensor = model.base_model(ids, use_cache=False).last_hidden_state
        return states.flatten(0, 1).float()


@torch.no_grad()
def _round(model: Any) -> int:
    """Round the matrices of a model's layers to 8 bits, but no router's; return their rows."""
    rows = 0
    for name, weight in model.base_model.layers.named_parameters():
        if weight.dim() > 1 and not name.endswith(("bias", "router.weight", "gate.weight")):
            scale = weight.abs().amax(-1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
            rows += scale.numel()
    return rows


@torch.no_grad()
def _round_both(model: Any, left: list[int], form: str) -> int:
    """Round a model's layers to 8 bits: inputs and matrices of linear modules, and fused experts; return their rows.

    Routers and the layers `left` stay. Products are summed in float64.
    """
    rows = 0
    for name, module in model.base_model.layers.named_modules():
        if name.endswith(ROUTERS) or int(name.partition(".")[0] or -1) in left:
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or own.endswith("bias"):
                continue
            values, scale = _to_8_bits(weight, torch.bfloat16, form)
            rows += scale.numel()
            if isinstance(module, nn.Linear):
                module.forward = _product(values * scale, module.bias, form)
            else:
                weight.copy_(values.bfloat16() * scale.bfloat16())
    return rows


def _product(weight: torch.Tensor, bias: torch.Tensor | None, form: str) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        values, scale = _to_8_bits(x, torch.float32, form)
        exact = (values * scale) @ weight.T
        return (exact if bias is None else exact + bias.double()).bfloat16()

    return forward


def _to_8_bits(values: torch.Tensor, scale_dtype: torch.dtype, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of `values` in a format and their scales, both as float64."""
    scale = (values.abs().amax(-1, keepdim=True).float() / (448 if form == "fp8" else 127)).to(scale_dtype)
    exact = values.float() / scale.float()
    small = exact.to(torch.float8_e4m3fn) if form == "fp8" else exact.round().clamp(-127, 127)
    return small.double(), scale.double()
