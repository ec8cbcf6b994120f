"""Functions that every rank of test_host_lead.py runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddk_ds.engine import ds_config
from ddk_ds.engine.ds_config import lead_elements
from ddk_ds.engine.memory_estimate import teacher_gathered
from ddk_ds.engine.model_files import model_shape, read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from tests.dist.slow_device import SlowDevice, Weights
from tests.dist.tiny import VOCAB, save_model, tiny_config

LAYERS, SAMPLES, LENGTH = 10, 1, 8


def gathered(runtime: Runtime, folder: str) -> list[dict[str, Any]]:
    """Take two steps, with whole layers and without; return what each model held at most, and the bounds.

    All in elements. The student's layers are released at once, and gathered again for their backward pass.
    """
    root, comm = Path(folder), runtime.comm
    device = SlowDevice.install()
    ds_config.MIN_BUCKET_ELEMENTS = 1  # one layer is prefetched, as with large ones
    if comm.rank == 0:
        for seed, name in enumerate(("student", "teacher")):
            save_model(root / name, hidden=48, vocab=VOCAB, tied=False, seed=seed, num_hidden_layers=LAYERS)
    comm.barrier()
    return [_gathered(runtime, device, root, whole_layers=whole) for whole in (True, False)]


def _gathered(runtime: Runtime, device: SlowDevice, root: Path, *, whole_layers: bool) -> dict[str, Any]:
    comm = runtime.comm
    files, teacher_files = (read_model(root / name, name) for name in ("student", "teacher"))
    shape, teacher_shape = model_shape(files), model_shape(teacher_files)
    layer = shape.largest_layer
    zero = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 2 * layer,
    }
    config = tiny_config(
        root,
        student={"path": str(root / "student"), "whole_layers": whole_layers, "gradient_checkpointing": True},
        teacher={"path": str(root / "teacher"), "whole_layers": whole_layers},
        train={"global_batch_samples": 2 * comm.world_size * SAMPLES, "micro_batch_samples": SAMPLES},
        deepspeed={"zero_optimization": zero},
    )
    teacher = load_teacher(config, teacher_files, VOCAB, comm)
    for parameter in teacher.engine.module.parameters():
        parameter.ds_persist = False
    student = load_student(config, files, VOCAB, comm)
    held = {
        "teacher": Weights(device, teacher.engine.optimizer.get_param_coordinator()),
        "student": Weights(device, student.engine.optimizer.parameter_offload.get_param_coordinator()),
    }
    method = make_method(config, teacher, Options(VOCAB, gamma=0.0, chunk_tokens=16), 1, {})
    for step in range(2):  # the second with a complete trace
        ids = torch.full((SAMPLES, LENGTH), step + comm.rank)
        zeros = torch.zeros(SAMPLES, dtype=torch.int64)
        batch: Any = {"input_ids": ids, "domain": zeros, "sample_id": zeros}
        train_step(
            student,
            method,
            [batch, batch],
            learning_rate=1e-3,
            progress=0.0,
            num_domains=1,
            device=runtime.device,
            comm=comm,
        )
    matrix = (
        0 if whole_layers else max(matrix.elements for matrix in teacher_shape.matrices)
    )  # DeepSpeed prefetches up to a whole one beyond its limit
    return {
        "most": {name: weights.most for name, weights in held.items()},
        "bounds": {
            "teacher": teacher_gathered(teacher_shape, "cuda") + matrix,
            "student": matrix
            + 2 * layer
            + layer
            + lead_elements(layer),  # as in the estimate: live, prefetched, not computed
        },
        "layers": LAYERS * layer,
    }
