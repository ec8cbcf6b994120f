"""One rank of tools/bench/bench_step.py in TRL's environment: it times the steps of TRL's trainers with ZeRO-3.

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

from ddk_ds.engine.runtime import Runtime, memory_figures, start_runtime, synchronize

# The same settings as this project's engines have (engine/ds_config.py); TRL derives the teacher's from the student's.
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
"""A trainer's class, its arguments, its data, and further keyword arguments."""


class StepTimer(TrainerCallback):
    """A callback that times each optimizer step, from the first micro-batch's forward to the update."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the time when all ranks are ready, as in tools/bench/step_cases.py."""
        synchronize(self._runtime)
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the time after the optimizer's step."""
        synchronize(self._runtime)
        self.seconds.append(time.perf_counter() - self._started)


def train(case: dict[str, Any], runtime: Runtime, output: str) -> list[float]:
    """Train with TRL and return the seconds of each step; `case` is a `Case` as JSON, `output` a directory."""
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
        # Things that cost time or memory but are not part of a step.
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    # The options register a DeepSpeed configuration, with which from_pretrained partitions weights as it loads them.
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
    """Return TRL's GKD trainer, which computes all logits of both models; with lmbda 0 it generates no text."""
    gkd = importlib.import_module("trl.experimental.gkd")
    arguments = gkd.GKDConfig(**options, lmbda=0.0, max_length=case["length"])

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    return gkd.GKDTrainer, arguments, _dataset(case, "input_ids"), {"data_collator": collate}


def _distillation(options: dict[str, Any], case: dict[str, Any], runtime: Runtime) -> Parts:
    """Return TRL's DistillationTrainer with its arguments and data set; it computes the loss in chunks.

    It trains only on text that the student generates. Random text replaces that here, so generation takes no time.
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
    """Return a data set of random tokens, enough for all steps of all ranks."""
    rows = case["samples"] * case["accumulation"] * (case["warm_up"] + case["steps"]) * case["ranks"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(case["vocab_size"], (rows, case["length"]), generator=generator)
    return importlib.import_module("datasets").Dataset.from_dict({column: ids.tolist()})


def main() -> None:
    """Run the case as the rank that the environment names; rank 0 writes the result."""
    case = json.loads(sys.argv[1])
    # DeepSpeed's compiled extensions depend on this environment's versions.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    runtime = start_runtime()
    with tempfile.TemporaryDirectory() as output:
        seconds = train(case, runtime, output)
    figures = memory_figures(runtime)
    if runtime.comm.rank == 0:
        result = {"steps_s": seconds[case["warm_up"] :], "parts_s": [], **figures}
        Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
