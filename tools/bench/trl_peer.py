"""One rank of tools/bench/bench_step.py in TRL's own environment: its trainers' steps with DeepSpeed ZeRO-3, timed.

RANK=0 WORLD_SIZE=1 ... python -m tools.bench.trl_peer SPECIFICATION RESULT
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ddk_ds.engine.runtime import Runtime, max_peak_bytes, start_runtime, synchronize

# What the student's and the teacher's engine of this project have too (engine/ds_config.py); TRL makes the teacher's.
ZERO = {"stage": 3, "contiguous_gradients": True, "overlap_comm": True}
ENGINE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "steps_per_print": 2**31,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": ZERO,
}

Parts = tuple[Any, Any, Any, dict[str, Any]]
"""A trainer's class, its arguments, its data, and what else it takes."""


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step, from its first micro-batch's forward to the update; fetching data is left out."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """All ranks begin together, as in tools/bench/step_cases.py."""
        synchronize(self._runtime)
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has made its step."""
        synchronize(self._runtime)
        self.seconds.append(time.perf_counter() - self._started)


def train(case: dict[str, Any], runtime: Runtime, output: str) -> list[float]:
    """Train with TRL and return the seconds of each step; `case` is step_cases.py's, `output` a directory."""
    make = {"trl": _distillation, "trl_gkd": _gkd}[case["impl"]]
    on_gpu = runtime.device.type == "cuda"
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    options = {
        "output_dir": output,
        "use_cpu": not on_gpu,
        "bf16": case["precision"] == "bf16",
        "deepspeed": ENGINE,
        "per_device_train_batch_size": case["samples"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": case["warm_up"] + case["steps"],
        "learning_rate": 1e-4,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "beta": 0.0,  # the forward KL
        "disable_dropout": False,
        # What costs time or memory and is no part of a step.
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    # Under this configuration, which the options register, from_pretrained partitions weights while it loads them.
    trainer_class, arguments, dataset, more = make(options, case, runtime)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(f"{case['folder']}/{name}", dtype=dtype) for name in ("student", "teacher")
    )
    timer = StepTimer(runtime)
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(f"{case['folder']}/student"),
        callbacks=[timer],
        **more,
    )
    trainer.train()
    return timer.seconds


def _gkd(options: dict[str, Any], case: dict[str, Any], _: Runtime) -> Parts:
    """TRL's trainer that takes given text (lmbda 0: none is generated); whole logits of both models."""
    gkd = importlib.import_module("trl.experimental.gkd")
    arguments = gkd.GKDConfig(**options, lmbda=0.0, max_length=case["length"])

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    return gkd.GKDTrainer, arguments, _dataset(case, "input_ids"), {"data_collator": collate}


def _distillation(options: dict[str, Any], case: dict[str, Any], runtime: Runtime) -> Parts:
    """TRL's maintained trainer, whose loss goes chunk by chunk.

    It learns only from what the student generates: given text takes that text's place here, and generation no time.
    """
    trl = importlib.import_module("trl")

    class GivenText(trl.DistillationTrainer):  # type: ignore[name-defined]
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            ids = torch.tensor([row["prompt"] for row in inputs], device=runtime.device)
            prompt, completion = ids[:, :1], ids[:, 1:]
            return {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": completion,
                "completion_mask": torch.ones_like(completion),
                "num_items_in_batch": torch.tensor(completion.numel() * runtime.comm.world_size, device=ids.device),
            }

    arguments = trl.DistillationConfig(**options, max_completion_length=case["length"] - 1)
    return GivenText, arguments, _dataset(case, "prompt"), {}


def _dataset(case: dict[str, Any], column: str) -> Any:
    """Random tokens, enough of them for all ranks."""
    rows = case["samples"] * case["accumulation"] * (case["warm_up"] + case["steps"]) * case["ranks"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(case["vocab_size"], (rows, case["length"]), generator=generator)
    return importlib.import_module("datasets").Dataset.from_dict({column: ids.tolist()})


def main() -> None:
    """Run the case of the environment's rank; rank 0 writes the result."""
    case = json.loads(sys.argv[1])
    # What DeepSpeed compiles is of this environment's versions alone.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    runtime = start_runtime()
    with tempfile.TemporaryDirectory() as output:
        seconds = train(case, runtime, output)
    most = max_peak_bytes(runtime)
    if runtime.comm.rank == 0:
        result = {"steps_s": seconds[case["warm_up"] :], "parts_s": [], "peak_bytes": most}
        Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
