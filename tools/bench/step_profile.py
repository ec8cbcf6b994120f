"""Time the parts of a distillation step on one device, with plain torch, random weights and no ZeRO-3.

python -m tools.bench.step_profile --device cuda --out FILE
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddk_ds.engine.flops import forward_flops, utilisation
from ddk_ds.engine.process_memory import peak_bytes, reset_peak
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.kernels import Options, linear_kd_loss
from ddk_ds.planner.known_points import FULL, Setting, Shape

# Models so small that a CPU needs seconds.
QUICK = Setting(Shape("qwen2", 64, 2, 4, 2, 128, 1000), Shape("llama", 32, 2, 4, 2, 64, 1000), 2, 64, steps=3)

FLOPS_COUNTED = (
    "2 a multiplication and addition, of matmuls alone. Layer: 2 x its weights a token, and causal attention with "
    "2 x heads x head size x length a token; the student's backward pass counts twice its forward pass. "
    "Head: 2 x vocabulary x (teacher's + 3 x student's hidden size) a token. Nothing recomputed is counted."
)


def step_flops(setting: Setting) -> dict[str, float]:
    """Return the FLOPs of a step by part, counted as `FLOPS_COUNTED` describes."""
    tokens = setting.samples * setting.length
    teacher, student = (tokens * _layer_flops(shape, setting.length) for shape in (setting.teacher, setting.student))
    width = setting.teacher.hidden_size + 3 * setting.student.hidden_size
    head = 2.0 * tokens * setting.student.vocab_size * width
    return {"teacher_forward": teacher, "student_forward": student, "head": head, "backward": 2 * student}


def _layer_flops(shape: Shape, length: int) -> float:
    """Return the FLOPs of one token's forward pass through all layers, without the head."""
    head_size = shape.hidden_size // shape.num_attention_heads
    projections = 2 * shape.hidden_size * head_size * (shape.num_attention_heads + shape.num_key_value_heads)
    weights = projections + 3 * shape.hidden_size * shape.intermediate_size
    layers = shape.num_hidden_layers
    return forward_flops(layers * weights, layers, shape.hidden_size, length, causal=True)


class _Adam:
    """AdamW on float32 copies of the weights, with the memory and traffic of ZeRO-3's optimizer on one rank."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters: list[torch.Tensor] = list(parameters)
        self._masters = [parameter.detach().clone().float() for parameter in self._parameters]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-5, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights and delete their gradients."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            assert parameter.grad is not None, "a weight of the student has no gradient"
            master.grad, parameter.grad = parameter.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_copy_(self._parameters, self._masters)


class _Step:
    """Both models, a batch of random tokens, and the step on it."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.teacher = _build(setting.teacher, device, dtype).requires_grad_(False).eval()
        self.student = _build(setting.student, device, dtype).train()
        self.adam = _Adam(list(self.student.parameters()))
        self.vocab_size = setting.student.vocab_size
        self.ids = torch.randint(self.vocab_size, (setting.samples, setting.length), device=device)
        self.labels = self.ids.roll(-1, 1).flatten()
        self.num_valid = torch.tensor(self.labels.numel(), device=device)

    def run(self, clock: StageClock) -> torch.Tensor:
        """Make a step, and return the loss, a detached scalar."""
        with clock.stage("teacher_forward"), torch.inference_mode():
            teacher_hidden = self._hidden(self.teacher)
        with clock.stage("student_forward"):
            student_hidden = self._hidden(self.student)
        with clock.stage("head"):
            loss = linear_kd_loss(
                student_hidden,
                self.student.get_output_embeddings().weight,
                teacher_hidden,
                self.teacher.get_output_embeddings().weight,
                self.labels,
                num_valid=self.num_valid,
                options=Options(self.vocab_size, gamma=0.2),
            ).loss
        with clock.stage("backward"):
            loss.backward()
        with clock.stage("optimizer"):
            self.adam.step()
        return loss.detach()

    def _hidden(self, model: Any) -> torch.Tensor:
        """Return the last hidden states (tokens, H) of a model."""
        return model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    # Imported here, because the rest is useful without transformers.
    from transformers import AutoConfig, AutoModelForCausalLM

    with device:
        config = AutoConfig.for_model(**asdict(shape))
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)


def profile_step(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Measure a step's parts (median milliseconds), tokens/s, MFU and peak memory; bf16 on CUDA, float32 on a CPU.

    The head's gradients are computed in its forward pass, so they count there and not under `backward`.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    step = _Step(setting, device, dtype)
    losses, times = [], []
    for number in range(setting.warm_up_steps + setting.steps):
        if on_cuda and number == setting.warm_up_steps:
            reset_peak(device.type)
        clock = StageClock(device.type)
        losses.append(step.run(clock))
        if number >= setting.warm_up_steps:
            if on_cuda:
                torch.cuda.synchronize()
            times.append(clock.take_seconds())
    if not math.isfinite(sum(loss.item() for loss in losses)):
        raise ArithmeticError(f"the loss is not finite: {[loss.item() for loss in losses]}")
    tokens = setting.samples * setting.length
    seconds = statistics.median(sum(parts.values()) for parts in times)
    flops = step_flops(setting)
    name = torch.cuda.get_device_name() if on_cuda else "cpu"
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "parameters": {"teacher": step.teacher.num_parameters(), "student": step.student.num_parameters()},
        "ms": {part: 1e3 * statistics.median(parts[part] for parts in times) for part in times[0]},
        "step_ms": seconds * 1e3,
        "tokens_per_s": tokens / seconds,
        "flops": flops,
        "flops_counted": FLOPS_COUNTED,
        "mfu": utilisation(sum(flops.values()), seconds, name),
        "peak_memory_bytes": peak_bytes(device.type) if on_cuda else None,
        "loss": [loss.item() for loss in losses],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile a step and write the result as JSON. Returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    result = profile_step(QUICK if options.quick else FULL, torch.device(options.device))
    options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
