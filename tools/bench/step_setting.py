"""Common parts of the benchmarks of a step: a case and its configuration, random models, and the machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ddk_ds.config import Config, make_config
from ddk_ds.engine.flops import step_flops
from ddk_ds.engine.model_files import read_model
from ddk_ds.version import commit

PACKAGES = ("torch", "triton", "deepspeed", "transformers")
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": True}
# Layers, width, heads, heads of keys and values, MLP of teacher and student. cpu: 21 M and 5 M parameters without
# embeddings; cuda: 7 B and 1 B; pair: the layers of Qwen2.5's 7 B and 1.5 B; host: so small that only the host's work
# takes time; quick: for tests.
SIZES = {
    "cpu": {"teacher": (12, 384, 6, 6, 1024), "student": (6, 256, 4, 4, 704)},
    "cuda": {"teacher": (32, 4096, 32, 32, 11008), "student": (22, 2048, 32, 32, 5632)},
    "pair": {"teacher": (28, 3584, 28, 4, 18944), "student": (28, 1536, 12, 2, 8960)},
    "host": {"teacher": (24, 64, 4, 4, 128), "student": (24, 64, 4, 4, 128)},
    "quick": {"teacher": (2, 64, 4, 4, 128), "student": (2, 32, 4, 4, 64)},
}
# Changes of the configuration, each of which bench_step --each-option times beside what it changes.
EACH_OPTION = (
    "student.whole_layers=false,teacher.whole_layers=false",
    "optimizer.fused=false",
    "student.compile_layers=true,teacher.compile_layers=true",
    "student.gradient_checkpointing=true",
    "student.gradient_checkpointing=selective",
    "teacher.micro_batches_per_pass=2",
    "teacher.quantize=int8",
    "teacher.quantize=int8_dynamic",
    "teacher.quantize=fp8",
    "teacher.shard_within=gpu",
    "teacher.shard_within=gpu,teacher.quantize=fp8",
    "teacher.shard_within=gpu,teacher.quantize=fp8,teacher.compile_layers=true",
    "data.documents=masked",
    "loss.logits_dtype=model",
    "loss.chunk_tokens=2048",
)
DOCUMENTS = 4  # of a sample where documents do not see each other
GAMMA = 0.2


@dataclass(frozen=True)
class Case:
    """One measurement, made by one process group."""

    impl: str
    """Implementation of the step.

    kd and cpt are this project's, floor is bare passes of both models, full_logits is a plain loop with two engines,
    trl and trl_gkd are TRL's trainers.
    """
    folder: str
    """Directory that holds the models teacher/ and student/."""
    ranks: int
    accumulation: int
    """Number of micro-batches of a step on one rank."""
    samples: int
    """Number of samples of a micro-batch."""
    length: int
    """Number of tokens of a sample."""
    vocab_size: int
    precision: str
    steps: int
    """Number of timed steps."""
    warm_up: int = 2
    """Number of untimed steps before them."""
    options: tuple[str, ...] = ()
    """Changes of the configuration, as key=value."""

    @property
    def tokens(self) -> int:
        """Return the number of tokens of a step over all ranks."""
        return self.ranks * self.accumulation * self.samples * self.length


def case_config(case: Case) -> Config:
    """Return the configuration of the run whose step the case measures."""
    root = Path(case.folder)
    values: dict[str, Any] = {
        "name": "bench",
        "method": "cpt" if case.impl == "cpt" else "kd",
        "student": {"path": str(root / "student")},
        "data": {"path": "none", "sequence_length": case.length},
        "loss": {"gamma": GAMMA},
        "optimizer": {"warmup_steps": 1},
        "train": {
            "global_batch_samples": case.ranks * case.accumulation * case.samples,
            "micro_batch_samples": case.samples,
            "precision": case.precision,
        },
        "stop": {"steps": 1000},
    }
    if case.impl != "cpt":
        values["teacher"] = {"path": str(root / "teacher")}
    return make_config(values, "bench_step", case.options)


def case_flops(case: Case) -> float:
    """Return the FLOPs of a step on one rank, counted as the ledger's MFU counts them."""
    student, teacher = (read_model(Path(case.folder) / name, name) for name in ("student", "teacher"))
    return step_flops(case_config(case), student, teacher, case.ranks)


def describe(device: str) -> dict[str, Any]:
    """Return the device, versions and commit of a result."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": sys.version.split()[0],
        **{name: version(name) if find_spec(name) else None for name in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": commit(),
    }


def make_models(folder: Path, size: str, vocab_size: int, precision: str, device: str) -> None:
    """Write random models teacher/ and student/ of one of SIZES, with a tokenizer, to `folder`."""
    # Imported here, because the parent process of the benchmark needs neither DeepSpeed nor transformers.
    from ddk_ds.engine.whole_models import make_random_model

    save_byte_tokenizer(vocab_size, folder / "tokenizer")
    for name, (layers, width, heads, kv_heads, mlp) in SIZES[size].items():
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": mlp,
            "dtype": "bfloat16" if precision == "bf16" else "float32",
        }
        config = folder / f"{name}.json"
        config.write_text(json.dumps(LLAMA | shape))
        make_random_model(config, folder / "tokenizer", folder / name, 0, device)


def save_byte_tokenizer(vocab_size: int, directory: Path) -> None:
    """Write a tokenizer of bytes; unused tokens fill its vocabulary up to `vocab_size`, so it needs no training."""
    # Imported here, because the other parts do not need these libraries.
    from tokenizers import Tokenizer, models, pre_tokenizers

    from ddk_ds.data.tokenizer import EOS_TOKEN, PAD_TOKEN, save_tokenizer

    tokens = [EOS_TOKEN, PAD_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<|unused-{number}|>" for number in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([EOS_TOKEN, PAD_TOKEN])
    save_tokenizer(tokenizer, directory)
