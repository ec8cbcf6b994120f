"""Functions that every rank of test_teacher.py runs: the same steps with several options of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters

from ddk_ds.engine.filters import filter_shape
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import Teacher, load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from tests.dist.tiny import VOCAB, save_model, tiny_config

MICRO_BATCHES, SAMPLES, LENGTH = 4, 2, 16
# Matrices have more than the 10^5 elements below which ZeRO-3 keeps tensors on every rank: each use gathers them.
TEACHER = {"hidden": 384, "vocab": VOCAB + 200, "intermediate_size": 400, "num_key_value_heads": 4}


def steps(runtime: Runtime, folder: str, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Run three steps of each case, which is a method and sections of its configuration.

    Returns for each case the losses and the gradient norm of every step ("losses"), the bytes gathered ("bytes") and
    the number of large weights of the teacher that are still gathered at the end ("left").
    """
    root = Path(folder)
    if runtime.comm.rank == 0:
        save_model(root / "student", vocab=VOCAB + 6, tied=True, seed=1)
        save_model(root / "teacher", tied=False, seed=2, **TEACHER)  # type: ignore[arg-type]
    runtime.comm.barrier()
    return [_steps(runtime, root, *case) for case in cases]


def _steps(runtime: Runtime, root: Path, method: str, sections: dict[str, Any]) -> dict[str, Any]:
    comm = runtime.comm
    samples = MICRO_BATCHES * SAMPLES * comm.world_size
    train = {"global_batch_samples": samples, "micro_batch_samples": SAMPLES, **sections.get("train", {})}
    config = tiny_config(root, **{**sections, "method": method, "train": train})
    assert config.teacher is not None
    files, teacher_files = (read_model(root / name, name) for name in ("student", "teacher"))
    shape = filter_shape(config, files, teacher_files) if method == "ted_filters" else None
    teacher = load_teacher(config, teacher_files, VOCAB, comm, shape)
    for parameter in teacher.engine.parameters():
        parameter.ds_persist = False  # tiny matrices would stay gathered
    gathers = Gathers(teacher)
    student = load_student(config, files, VOCAB, comm, shape)
    method_object = make_method(config, teacher, Options(VOCAB, gamma=0.0, chunk_tokens=16), 1, {})
    rows = torch.randint(0, VOCAB, (3, samples, LENGTH), generator=torch.Generator().manual_seed(0))
    results: dict[str, Any] = {"losses": [], "bytes": [], "left": 0}
    for step in rows:
        rank_rows = step.reshape(MICRO_BATCHES, comm.world_size, SAMPLES, LENGTH)[:, comm.rank]
        zeros = torch.zeros(SAMPLES, dtype=torch.int64)
        batches: Any = [{"input_ids": ids, "domain": zeros, "sample_id": zeros} for ids in rank_rows]
        metrics = train_step(
            student,
            method_object,
            batches,
            learning_rate=1e-3,
            progress=0.0,
            teacher_pass_size=config.teacher.pass_size,
            num_domains=1,
            device=runtime.device,
            comm=comm,
        )
        results["losses"].append([metrics.loss, metrics.ce, metrics.kl, metrics.grad_norm])
        results["bytes"].append(gathers.take())
    gathers.close()
    weights = [part for part in teacher.whole.parameters() if hasattr(part, "ds_id")]
    results["left"] = sum(p.ds_status.name != "NOT_AVAILABLE" for p in weights if p.ds_numel > 1e5)
    return results


class Gathers:
    """Counter of the bytes of the teacher's weights that this rank gathers: all, and those between nodes of two ranks.

    ZeRO-3 gathers the weights of the backbone during the teacher's pass, and the head in `head.gathered`.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.counted = {"all": 0, "between nodes": 0}
        self._on = False
        self._original = partition_parameters._dist_allgather_fn
        hidden, gathered = teacher.hidden, teacher.head.gathered

        def counted_hidden(*given: Any) -> Any:
            with self._counting():
                return hidden(*given)

        @contextmanager
        def counted_head() -> Iterator[Any]:
            with ExitStack() as stack:
                with self._counting():
                    head = stack.enter_context(gathered())
                yield head

        teacher.hidden, teacher.head.gathered = counted_hidden, counted_head  # type: ignore[method-assign]
        partition_parameters._dist_allgather_fn = self._gather

    def take(self) -> dict[str, int]:
        """Return the bytes counted since the last call."""
        taken, self.counted = self.counted, dict.fromkeys(self.counted, 0)
        return taken

    def close(self) -> None:
        partition_parameters._dist_allgather_fn = self._original

    @contextmanager
    def _counting(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _gather(self, slice_: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        if self._on:
            self.counted["all"] += whole.nbytes * (len(members) > 1)
            self.counted["between nodes"] += whole.nbytes * (len({rank // 2 for rank in members}) > 1)
        return self._original(slice_, whole, group)
