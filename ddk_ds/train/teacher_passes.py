"""The number of micro-batches that a pass of the teacher takes, if the configuration leaves it to the run."""

from __future__ import annotations

import torch

from ddk_ds.config import Config
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, estimate_memory, fewest_passes, shard_ranks
from ddk_ds.engine.model_files import ModelShape, model_shape
from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.preflight.agreement import Job
from ddk_ds.train.preflight.machine import available_bytes


def settle_passes(config: Config, inputs: Inputs, runtime: Runtime) -> Config:
    """Return the configuration with a number in place of `teacher.micro_batches_per_pass: auto`.

    Collective; called before the models are loaded. More micro-batches per pass never take longer: the teacher's
    weights are gathered less often, at the cost of memory for hidden states. So the number of passes is the smallest
    that the estimate of memory allows on every rank, and all passes take equally many micro-batches. If every rank
    holds the complete teacher, nothing is gathered and each pass takes one micro-batch.
    """
    teacher = config.teacher
    if (
        teacher is None
        or teacher.micro_batches_per_pass != "auto"
        or inputs.teacher is None
        or not config.loads_teacher
    ):
        return config
    comm = runtime.comm
    job = Job.meet(comm, runtime.device, None)
    free = torch.tensor(-float(_free_bytes(job)), dtype=torch.float64, device=runtime.device)
    usable = -float(comm.all_reduce_max(free)) * MEMORY_MARGIN
    shapes = model_shape(inputs.student), model_shape(inputs.teacher)
    vocab_size, device = inputs.vocabulary.size, runtime.device.type
    return largest_passes(config, shapes, vocab_size, comm.world_size, job.local_ranks, device, usable)


def largest_passes(
    config: Config,
    shapes: tuple[ModelShape, ModelShape],
    vocab_size: int,
    world_size: int,
    local_ranks: int,
    device_type: str,
    usable: float,
) -> Config:
    """Return the configuration with the fewest passes whose estimated memory fits into `usable` bytes. Pure.

    Args:
        shapes: those of the student and the teacher.
    """
    assert config.teacher is not None, "without a teacher there are no passes"

    def fits(candidate: Config) -> bool:
        estimate = estimate_memory(candidate, *shapes, vocab_size, world_size, device_type, local_ranks)
        return (estimate.total if device_type == "cpu" else estimate.device_bytes) <= usable

    gathers = shard_ranks(config.teacher, world_size, local_ranks) > 1
    return fewest_passes(config, config.micro_batches(world_size) if gathers else 1, fits)


def _free_bytes(job: Job) -> int:
    """Return the free bytes of this rank's GPU, or its share of the host's memory if it computes on the CPU."""
    if job.device.type == "cuda":
        return int(torch.cuda.mem_get_info(job.device)[0])
    return available_bytes() // job.local_ranks
