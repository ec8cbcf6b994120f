"""Options that make the simulated step faster, at a price in numbers: compiled layers, and a teacher in 8 bits. Pure.

None of them has been measured on a GPU (layer_time.py says what is assumed), so a plan says so beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddk_ds.config import Config
from ddk_ds.planner.gpu_memory import changed
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.plan_inputs import Models
from ddk_ds.planner.simulations import advised, forms_of, layouts_on
from ddk_ds.planner.step_time import Step


@dataclass(frozen=True)
class Faster:
    """A change of several options, which fits into memory, and the simulated step with it."""

    change: str
    """The options as they are written on the command line."""
    step_s: float
    tokens_per_s: float
    times: float
    """Its speed, in that of the configured step."""
    device_bytes: int
    numbers: str
    """How the run's numbers differ, in words."""


def faster_steps(
    config: Config, models: Models, cluster: Cluster, now: Step, *, domains: int, storage_bytes_per_s: float
) -> list[Faster]:
    """Simulate compiled layers in both models, and with them each other `teacher.quantize` that a run would accept.

    The teacher lies where `advised` says for each. `now` is the configured step. The list is empty without a teacher
    that computes layer by layer, and where ranks share samples, which cannot be compiled.
    """
    teacher = config.teacher
    if teacher is None or not teacher.whole_layers or config.train.sequence_parallel > 1:
        return []
    compiled = changed(config, student={"compile_layers": True}, teacher={"compile_layers": True})
    own = teacher.quantize
    forms = [own, *(form for form in forms_of(config, models, cluster.gpu) if form != own)]
    found = []
    for form in forms:
        layouts = layouts_on(
            compiled, models, cluster, domains=domains, storage_bytes_per_s=storage_bytes_per_s, forms=[form]
        )
        best = advised(layouts)
        if best is None:
            continue
        words = ["student.compile_layers=true teacher.compile_layers=true"]
        words += [f"teacher.quantize={form}"] if form != own else []
        words.append(f"teacher.shard_within={best.shard_within}")
        if best.micro_batches_per_pass > 1:
            words.append(f"teacher.micro_batches_per_pass={best.micro_batches_per_pass}")
        speed = best.tokens_per_s_per_gpu * cluster.ranks
        found.append(
            Faster(
                change=" ".join(words),
                step_s=now.tokens / speed,
                tokens_per_s=speed,
                times=speed / now.tokens_per_s,
                device_bytes=best.device_bytes,
                numbers="rounded otherwise" if form == own else "another teacher",
            )
        )
    return found
