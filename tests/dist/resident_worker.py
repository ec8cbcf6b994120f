"""Functions that every rank of test_resident.py runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoModelForCausalLM

from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.split_check import check_split
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import Options
from ddk_ds.kernels.chunked import run_chunks
from ddk_ds.kernels.reference import reference_logits
from ddk_ds.methods import make_method
from ddk_ds.methods.base import Batch, next_token_labels
from tests.dist.tiny import ARCHITECTURES, VOCAB, save_model, tiny_config


def beside_sharded(runtime: Runtime, folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load each case's teacher resident and sharded; return how far apart they are, and how far from plain
    transformers, in hidden states of a pass of three micro-batches and in logits."""
    results = []
    for number, case in enumerate(cases):
        root = Path(folder) / str(number)
        if runtime.comm.rank == 0:
            kind = case["kind"]
            shape = ARCHITECTURES.get(kind, case.get("shape", {}))
            save_model(root / "teacher", model_type=kind, vocab=VOCAB + 3, tied=case["tied"], seed=3, **shape)
        runtime.comm.barrier()
        results.append(_compare(runtime, root, case["precision"], case["section"]))
    return results


def _compare(runtime: Runtime, root: Path, precision: str, section: dict[str, Any]) -> dict[str, Any]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    files = read_model(root / "teacher", "teacher.path")
    batches = list(torch.randint(0, VOCAB, (3, 2, 12), generator=torch.Generator().manual_seed(runtime.comm.rank)))
    found = {}
    for within in ("world", "gpu"):
        given = {"micro_batches_per_pass": 3, "attn_implementation": "eager", **section, "shard_within": within}
        config = tiny_config(root, teacher=given, train={"precision": precision})
        teacher = load_teacher(config, files, VOCAB, runtime.comm)
        check_split(teacher, batches[0], VOCAB, "teacher", runtime.comm)

        def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
            return reference_logits(hidden, head.weight, head.bias, len(head.weight), head.form)

        with teacher.evaluating():
            found[within] = [*teacher.hidden(batches), teacher(batches[0], logits)]
        sharded = [isinstance(teacher.engine, deepspeed.DeepSpeedEngine)]
        sharded += [hasattr(parameter, "ds_id") for parameter in teacher.whole.parameters()]
        sharded += [bool(module._forward_pre_hooks) for module in teacher.whole.modules()]
        assert any(sharded) == (within == "world")
    plain = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        exact = [plain.base_model(ids).last_hidden_state.flatten(0, 1) for ids in batches]
    pairs = zip(found["gpu"], exact, strict=False)
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(found["gpu"], found["world"], strict=True)),
        "off": max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs),
        "dtypes": [str(states.dtype) for states in found["gpu"][:3]],
    }


def way_to_the_loss(runtime: Runtime, folder: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Run a micro-batch in bf16; return dtypes, and True where the loss reads what the teacher's last norm wrote."""
    root = Path(folder)
    if runtime.comm.rank == 0:
        for seed, name in enumerate(("student", "teacher")):
            save_model(root / name, vocab=VOCAB + 3, tied=bool(seed), seed=seed, **ARCHITECTURES["llama"])
    runtime.comm.barrier()
    config = tiny_config(root, **{"method": "kd", "train": {"precision": "bf16"}, **sections})
    assert config.teacher is not None
    teacher, student = (
        load(config, read_model(root / name, name), VOCAB, runtime.comm)
        for name, load in (("teacher", load_teacher), ("student", load_student))
    )
    method = make_method(config, teacher, Options(VOCAB, gamma=0.0, chunk_tokens=16), 1, {})
    rows = torch.randint(0, VOCAB, (config.teacher.pass_size, 2, 12), generator=torch.Generator().manual_seed(0))
    valid = torch.tensor(22.0 * rows.shape[0] * runtime.comm.world_size, dtype=torch.float64)
    domain = torch.zeros(2, dtype=torch.int64)
    batches = [Batch(ids, next_token_labels(ids), domain, valid.reshape(1), valid, 0.0) for ids in rows]
    written, read = list[torch.Tensor](), list[torch.Tensor]()

    def looked_at(call: Any, options: Options) -> Any:
        read.append(call.teacher.hidden)
        return run_chunks(call, options)

    norm: Any = teacher.whole.base_model.norm
    norm.register_forward_hook(lambda _module, _given, output: written.append(output))
    with pytest.MonkeyPatch.context() as patch, method.teacher_outputs(batches) as outputs:
        patch.setattr("ddk_ds.kernels.custom_op.run_chunks", looked_at)
        for index, (batch, output) in enumerate(zip(batches, outputs, strict=True), 1):
            student.backward(method.loss(student, batch, output).loss, last=index == len(batches))
    wrote = torch.cat([states.flatten(0, 1) for states in written])
    rows_of = [states.data_ptr() for states in written for states in states.flatten(0, 1).split(24)]
    return {
        "dtypes": sorted({str(states.dtype) for states in [*written, *read]}),
        "no copy": [states.data_ptr() for states in read] == rows_of,
        "same numbers": bool(torch.equal(torch.cat(read), wrote)),
        "read": len(read),
    }
