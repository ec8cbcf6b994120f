"""What the configuration leaves to the run: the place of the teacher's weights, and the micro-batches of its passes."""

from __future__ import annotations

import torch

from ddk_ds.config import Config
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, fewest_passes, fits_into, settled_place, shard_ranks
from ddk_ds.engine.model_files import ModelShape, model_shape
from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.preflight.agreement import Job
from ddk_ds.train.preflight.machine import free_bytes


def settle_teacher(config: Config, inputs: Inputs, runtime: Runtime) -> Config:
    """Return the configuration with what it leaves to the run in section `teacher`: `auto` is replaced.

    Collective; called before the models are loaded. `shard_within` becomes the first of gpu, node and world that the
    estimate of memory allows on every rank. More micro-batches per pass never take longer: a sharded teacher's weights
    are gathered less often, at the cost of memory for hidden states. So the number of passes is then the smallest that
    the estimate allows, and all passes take equally many micro-batches. If nothing is gathered, because every rank
    holds the complete teacher, each pass takes one micro-batch.
    """
    teacher = config.teacher
    if (
        teacher is None
        or "auto" not in (teacher.shard_within, teacher.micro_batches_per_pass)
        or inputs.teacher is None
        or not config.loads_teacher
    ):
        return config
    comm = runtime.comm
    job = Job.meet(comm, runtime.device, None)
    free = torch.tensor(-float(free_bytes(job.device, job.local_ranks)), dtype=torch.float64, device=runtime.device)
    usable = -float(comm.all_reduce_max(free)) * MEMORY_MARGIN
    shapes = model_shape(inputs.student), model_shape(inputs.teacher)
    vocab_size, device = inputs.vocabulary.size, runtime.device.type
    return settled_teacher(config, shapes, vocab_size, comm.world_size, job.local_ranks, device, usable)


def settled_teacher(
    config: Config,
    shapes: tuple[ModelShape, ModelShape | None],
    vocab_size: int,
    world_size: int,
    local_ranks: int,
    device_type: str,
    usable: float,
) -> Config:
    """Return the configuration whose teacher is settled so that the estimated memory fits into `usable` bytes. Pure.

    Args:
        shapes: those of the student and the teacher.
    """
    fits = fits_into(usable, shapes, vocab_size, world_size, local_ranks, device_type)
    placed = settled_place(config, fits)
    if placed.teacher is None or placed.teacher.micro_batches_per_pass != "auto":
        return placed
    gathers = shard_ranks(placed.teacher, world_size, local_ranks) > 1
    return fewest_passes(placed, config.micro_batches(world_size) if gathers else 1, fits)
