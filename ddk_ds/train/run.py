"""The parts of a run that the loop works with, and the ways in which it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ddk_ds.config import Config
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.readers import Readers
from ddk_ds.engine.compiling import CompileWatch
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import CachedTeacher, Method, make_method
from ddk_ds.mixture.loss_weights import sample_weights
from ddk_ds.train.checkpoint.saver import Saver
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.interruption import Interruption
from ddk_ds.train.interval import Array, Mixer
from ddk_ds.train.ledger import Ledger, MonitorFeed
from ddk_ds.train.progress import RunProgress
from ddk_ds.train.read_ahead import ReadAhead
from ddk_ds.train.samples import Sampler
from ddk_ds.train.state import RunState
from ddk_ds.train.validation import ValidationBatches
from ddk_ds.train.watchdog import Watchdog


@dataclass
class Run:
    """Everything that the loop works with."""

    config: Config
    inputs: Inputs
    runtime: Runtime
    student: Student
    teacher: Teacher | None
    cached: CachedTeacher | None
    head_options: Options
    dataset: MixtureDataset
    readers: Readers
    validation: ValidationBatches
    teacher_ppl: Array | None
    """Perplexities (N,) of the teacher, which never change; None in a run without one."""
    mixer: Mixer
    ahead: ReadAhead
    sampler: Sampler
    interruption: Interruption
    watchdog: Watchdog
    state: RunState
    ledger: Ledger
    monitor: MonitorFeed
    saver: Saver
    progress: RunProgress
    total_steps: int
    student_flops: float
    """Floating-point operations of the student in a step on one rank."""
    teacher_flops: float
    """Those of the teacher, if all samples of the step go through it."""
    compiling: CompileWatch = field(default_factory=CompileWatch)

    def record(self, record: dict[str, Any]) -> None:
        """Append `record` as a line to ledger.jsonl (on rank 0 only), and queue its numbers for the monitors."""
        self.ledger.write(record)
        self.monitor.add(record)

    def announce(self, kind: str, message: str, **values: Any) -> None:
        """Show `message` on the terminal and append the event `kind` with its values to events.jsonl."""
        self.progress.say(message)
        self.ledger.event(kind, **values)

    def publish_teacher(self, *, wait: bool = True) -> None:
        """Write what this rank's teacher has said since the last time to the cache, if there is one.

        If a store does not take it, for all its patience or at once unless `wait` is True, say so: the next step's
        samples are not read then. Raises CheckpointError if it cannot be written.
        """
        if self.cached is not None:
            if not wait:
                self.cached.store.place.give_up_when(lambda: True)
            if failure := self.cached.store.offer():
                self.progress.say(f"warning: the teacher's cache lacks what this run computed last: {failure}")

    def take_taught(self) -> int | None:
        """Return the samples that went through the teacher since the last call; None in a run without a cache of it."""
        if self.cached is None:
            return None
        taught, self.cached.taught = self.cached.taught, 0
        return taught

    @property
    def domain_weights(self) -> list[float] | None:
        """Return the factors (N,) of the losses of domains in this interval; None without `mixture.loss_weights`.

        They follow from the interval's counts, so a resumed run has the same. Raises ConfigError as `sample_weights`.
        """
        weights = self.inputs.loss_weights
        return None if weights is None else sample_weights(weights, self.state.data.counts, self.inputs.names)

    def make_method(self) -> Method:
        """Make the method of the configuration from its state; it serves one interval."""
        return make_method(
            self.config, self.teacher, self.head_options, len(self.inputs.names), self.state.method, self.cached
        )
