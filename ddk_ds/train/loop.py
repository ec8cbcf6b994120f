"""The run: intervals of steps until a stop, with a checkpoint every so often."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_ds.comm import Comm, raise_together
from ddk_ds.config.run_config import interval_steps
from ddk_ds.data.loader import MicroBatch, interval_loader
from ddk_ds.engine.export import export_student
from ddk_ds.errors import UserError
from ddk_ds.mixture.ddk import one_hot_warning
from ddk_ds.mixture.decide import Decision
from ddk_ds.mixture.exhaustion import Plan
from ddk_ds.train.checkpoint.checkpoint_files import newest_checkpoint
from ddk_ds.train.checkpoint.restore import roll_back
from ddk_ds.train.checkpoint.saver import SaveFailed
from ddk_ds.train.guard import NumbersGoneWrong, check_interval, check_step
from ddk_ds.train.interruption import Interrupted, Interruption, raise_for
from ddk_ds.train.interval import Measurement, interval_record, stop_reason
from ddk_ds.train.run import Run
from ddk_ds.train.run_end import companions, make_summary, summary_table, write_summary
from ddk_ds.train.step import StepMetrics, learning_rate, seed_step, step_clock, step_numbers, train_step
from ddk_ds.version import versions


def train(run: Run) -> dict[str, Any]:
    """Train from the run's state to its end, export the student, and return the summary. Collective."""
    run.progress.start(run.state.step)
    try:
        while True:
            try:
                return _train_to_the_end(run)
            except NumbersGoneWrong as wrong:
                _finish_checkpoint(run)
                if not roll_back(run, str(wrong)):
                    _stopped(run, str(wrong))
                    raise
    except Interrupted as interrupted:
        _interrupted(run, str(interrupted))
        raise
    finally:
        run.progress.stop()
        run.ahead.close()
        run.watchdog.close()
        run.monitor.close()


def _train_to_the_end(run: Run) -> dict[str, Any]:
    while True:
        if not run.state.data.done:
            ids = run.mixer.ids(run.state)
        else:
            measured, measure_s = _measure(run)
            reason = stop_reason(run.config, run.state, measured)
            if reason is not None:
                return _finish(run, measured, measure_s, reason)
            started = time.perf_counter()
            run.watchdog.watch("controller", run.state.step)
            decision, plan = _plan_interval(run, measured)
            if plan.end is not None:
                return _finish(run, measured, measure_s, plan.end)
            ids = run.mixer.begin(run.state, decision, plan)
            _record_interval(
                run, measured, plan, {"measure_s": measure_s, "controller_s": time.perf_counter() - started}
            )
        _train_interval(run, ids)


def _train_interval(run: Run, ids: npt.NDArray[np.int64]) -> None:
    comm, state, config = run.runtime.comm, run.state, run.config
    state.leave_out()
    method = run.make_method()
    batches = interval_loader(
        run.dataset,
        ids,
        rank=comm.rank,
        world=comm.world_size,
        micro_batch=config.train.micro_batch_samples,
        start_sample=state.data.consumed,
        num_workers=config.data.num_workers,
    )
    run.ahead.interval(ids, state.data.consumed)
    run.watchdog.watch("step", state.step)
    due = False
    while True:
        started = time.perf_counter()
        micro_batches = _read_step(batches, config.micro_batches(comm.world_size), comm, run.interruption)
        data_s = time.perf_counter() - started
        if not micro_batches:
            return
        seed_step(config.seed, state.step, comm.rank)
        rate = learning_rate(state.step, run.total_steps, config.optimizer)
        metrics = train_step(
            run.student,
            method,
            micro_batches,
            learning_rate=rate,
            progress=state.step / run.total_steps,
            per_pass=config.per_pass,
            num_domains=len(run.inputs.names),
            device=run.runtime.device,
            comm=comm,
        )
        state.method = method.state_dict()
        _record_step(run, metrics, rate, data_s, time.perf_counter() - started)
        due |= state.step % config.checkpoint.every_steps == 0
        if due and not state.spikes_in_row:  # amid a spike a checkpoint would be no good one to go back to
            due = not _begin_checkpoint(run)
        if run.saver.ready():
            _finish_checkpoint(run)
        run.watchdog.watch("step", state.step)


def _read_step(
    batches: Iterator[MicroBatch], micro_batches: int, comm: Comm, interruption: Interruption
) -> list[MicroBatch]:
    """Return the micro-batches of the next optimizer step; an empty list at the interval's end. Collective.

    Raises:
        UserError: a rank cannot read its samples. Every rank raises it, so that none waits in a forward pass.
        Interrupted: a signal came to a rank.
    """
    read: list[MicroBatch] = []
    failure: UserError | None = None
    try:
        read = list(islice(batches, micro_batches))
    except UserError as error:
        failure = error
    # Two numbers a step; an error itself travels only where a rank has one.
    failed, signal = interruption.highest(failure is not None)
    if failed:
        raise_together(comm, failure)
    raise_for(signal)
    return read


def _measure(run: Run) -> tuple[Measurement, float]:
    started = time.perf_counter()
    run.watchdog.watch("evaluation", run.state.step)
    steps = interval_steps(run.config.mixture, run.state.data.interval + 1)
    run.ahead.border(run.state.data, steps * run.config.train.global_batch_samples)
    measured = run.measure()
    if not run.state.student_before:
        run.state.student_before = measured.student.tolist()
    elapsed = time.perf_counter() - started
    run.state.train_s += elapsed
    return measured, elapsed


def _plan_interval(run: Run, measured: Measurement) -> tuple[Decision, Plan]:
    steps = interval_steps(run.config.mixture, run.state.data.interval + 1)
    steps = min(steps, run.total_steps - run.state.step)
    total_samples = steps * run.config.train.global_batch_samples
    return run.mixer.plan(run.state, measured, total_samples, run.inputs.exhaustion)


def _record_interval(run: Run, measured: Measurement, plan: Plan, clock: dict[str, float]) -> None:
    state = run.state
    ratio = None if measured.ratio is None else measured.ratio.tolist()
    alarms = check_interval(state, ratio, run.inputs.names, run.config.guard, run.config.mixture.exclude)
    run.record(interval_record(state, measured, run.inputs.names, plan, clock, alarms))
    for alarm in alarms:
        run.progress.say(f"alarm: {alarm}")
        run.ledger.event("alarm", step=state.step, text=alarm)
    warning = one_hot_warning(state.proportions, run.inputs.names)
    if warning is not None and state.data.interval == 0 and run.inputs.controller.name.startswith("ddk"):
        run.progress.say(f"warning: {warning}")
        run.ledger.event("warning", step=state.step, text=warning)
    run.progress.interval(state.data.interval, state.proportions)


def _record_step(run: Run, metrics: StepMetrics, rate: float, data_s: float, step_s: float) -> None:
    state = run.state
    state.step += 1
    state.data = state.data.consume(run.config.train.global_batch_samples)
    run.ahead.advance(state.data.consumed)
    state.domain_tokens = [a + b for a, b in zip(state.domain_tokens, metrics.domain_tokens, strict=True)]
    state.train_s += step_s
    clock = step_clock(metrics, {"step": step_s, "data": data_s, "monitor": run.monitor.take_seconds()}, run.step_flops)
    record = {"kind": "step", "step": state.step, "interval": state.data.interval}
    run.record({**record, **step_numbers(metrics), "learning_rate": rate, "clock": clock})
    run.progress.step(state.step, metrics, clock["tokens_per_s"])
    check_step(state, metrics.loss, metrics.grad_norm, run.config.guard)
    if state.skipped_in_row:
        run.progress.say(f"warning: step {state.step} has no finite gradient: skipped, the weights are as before")
        run.ledger.event("skipped", step=state.step)


def _begin_checkpoint(run: Run) -> bool:
    """Begin to save, or say why that is not possible: the run goes on all the same. Whether it is."""
    _finish_checkpoint(run)
    run.watchdog.watch("checkpoint", run.state.step)
    try:
        run.saver.begin(run.student, run.state, run.ledger.position())
    except SaveFailed as failure:
        return _not_saved(run, failure)
    return True


def _finish_checkpoint(run: Run) -> bool:
    """Complete the checkpoint that was begun, waiting for it where need be. Whether that was possible."""
    run.watchdog.watch("checkpoint", run.state.step)
    try:
        saved = run.saver.finish()
    except SaveFailed as failure:
        return _not_saved(run, failure)
    if saved is not None:
        clock = {"pause_s": round(saved.pause_s, 4), "seconds": round(saved.seconds, 4)}
        run.ledger.event("checkpoint", step=saved.step, path=str(saved.path), **clock)
    return True


def _not_saved(run: Run, failure: SaveFailed) -> bool:
    run.progress.say(f"warning: no checkpoint at step {run.state.step}: {failure}")
    run.ledger.event("checkpoint_failed", step=run.state.step, reason=str(failure))
    return False


def _save_now(run: Run) -> bool:
    """Save and wait for it. Whether the checkpoint of this step is there."""
    return _begin_checkpoint(run) and _finish_checkpoint(run)


def _interrupted(run: Run, signal: str) -> None:
    """Save what is done. The step that a signal cut short has changed nothing."""
    saved = "saved" if _save_now(run) else "NOT saved"
    run.ledger.event("interrupted", step=run.state.step, signal=signal)
    run.progress.stop()
    run.progress.say(
        f"interrupted by {signal} and {saved} at step {run.state.step}: start the same command again to go on"
    )


def _stopped(run: Run, reason: str) -> None:
    """Say what was seen and where one can go on from. Nothing is saved."""
    run.ledger.event("stopped", step=run.state.step, reason=reason)
    run.progress.stop()
    last = newest_checkpoint(run.config.run_dir) if run.runtime.comm.rank == 0 else None
    run.progress.say(
        f"stopped at step {run.state.step}: {reason}. The last checkpoint is {last[0] if last else 'none'}. Look at "
        "the steps before in ledger.jsonl and at their data; a new run with a lower optimizer.learning_rate may hold"
    )


def _finish(run: Run, measured: Measurement, measure_s: float, reason: str) -> dict[str, Any]:
    _save_now(run)
    run.record(interval_record(run.state, measured, run.inputs.names, None, {"measure_s": measure_s}))
    config, comm = run.config, run.runtime.comm
    run.watchdog.watch("export", run.state.step)
    export_student(
        run.student,
        config.run_dir / "export",
        comm,
        lambda: companions(config.run_dir, config, run.inputs.student, run.state, versions()),
        run.interruption.check,
    )
    run.make_method().export(run.student, config.run_dir / "export", run.inputs.names, comm)
    summary = make_summary(
        run.inputs.names,
        run.state,
        measured,
        run=config.name,
        controller=config.mixture.controller,
        reason=reason,
    )
    if comm.rank == 0:
        write_summary(config.run_dir, summary)
    run.ledger.event("end", step=run.state.step, reason=reason)
    run.progress.stop()
    run.progress.say(f"finished: {reason}; student exported to {config.run_dir / 'export'}")
    run.progress.console.print(summary_table(summary))
    return summary
