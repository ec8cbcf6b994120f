"""The training loop: intervals of optimizer steps until a stop condition holds, with checkpoints on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ddk_ds.comm import call_together
from ddk_ds.config.run_config import interval_steps
from ddk_ds.data.loader import MicroBatch, interval_loader
from ddk_ds.engine.export import export_student
from ddk_ds.errors import TemporaryError
from ddk_ds.mixture.exhaustion import Exhausted
from ddk_ds.mixture.order import Ids
from ddk_ds.train.checkpoint.checkpoint_files import newest_checkpoint
from ddk_ds.train.checkpoint.restore import roll_back
from ddk_ds.train.checkpoint.saver import SaveFailed
from ddk_ds.train.guard import NumbersGoneWrong, check_interval, check_step
from ddk_ds.train.interruption import Interrupted
from ddk_ds.train.interval import Array, interval_record, ratio_to_teacher, stop_reason
from ddk_ds.train.learning_rate import learning_rate
from ddk_ds.train.run import Run
from ddk_ds.train.run_end import companions, make_summary, summary_table, write_summary
from ddk_ds.train.step import StepMetrics, seed_step, step_clock, step_numbers, train_step
from ddk_ds.train.step_reader import StepReader
from ddk_ds.train.teacher_store import lacking_samples
from ddk_ds.train.validation import count_micro_batches, perplexities
from ddk_ds.version import versions


def train(run: Run) -> dict[str, Any]:
    """Train from the run's state to its end, export the student, and return the summary. Collective.

    Raises:
        Interrupted: a signal came to any rank; the steps that are done have been saved.
        NumbersGoneWrong: the numbers went wrong and no roll-back is left.
    """
    run.progress.start(run.state.step)
    try:
        summary = _train_and_roll_back(run)
    except Interrupted as interrupted:
        _save_interrupted(run, str(interrupted))
        _close(run)
        raise
    except NumbersGoneWrong:
        _close(run)
        raise
    except BaseException:  # this rank's alone, perhaps: it waits for nothing before it says so and leaves
        run.progress.stop()
        raise
    _close(run)
    return summary


def _close(run: Run) -> None:
    """End what runs beside the training, at an end that all ranks have agreed on."""
    run.watchdog.watch("end", run.state.step)
    run.progress.stop()
    run.ahead.close()
    run.monitor.close()


def _train_and_roll_back(run: Run) -> dict[str, Any]:
    """Train to the end, from an earlier checkpoint again where the numbers go wrong; return the summary. Collective."""
    while True:
        try:
            return _train_to_the_end(run)
        except NumbersGoneWrong as wrong:
            _finish_checkpoint(run)
            if not roll_back(run, str(wrong)):
                _announce_wrong_numbers(run, str(wrong))
                raise


def _train_to_the_end(run: Run) -> dict[str, Any]:
    """Train interval after interval until a stop condition holds; finish the run and return its summary. Collective."""
    while True:
        complete = run.state.data.done
        if complete:
            student_ppl, measure_s = _measure(run)
            reason = stop_reason(run.config, run.state, student_ppl, run.teacher_ppl)
            if reason is not None:
                return _finish(run, student_ppl, measure_s, reason)
            try:
                ids = _begin_interval(run, student_ppl, measure_s)
            except Exhausted as exhausted:
                return _finish(run, student_ppl, measure_s, str(exhausted))
        else:  # resumed inside an interval
            ids = run.mixer.ids(run.state)
        _train_interval(run, ids)
        if complete and (news := run.compiling.news()):
            run.progress.say(news)


def _measure(run: Run) -> tuple[Array, float]:
    """Measure the student; return its perplexities (N,) and the seconds that this took. Collective."""
    started = time.perf_counter()
    run.watchdog.watch("evaluation", run.state.step)
    steps = interval_steps(run.config.mixture, run.state.data.interval + 1)
    run.ahead.border(run.state.data, steps * run.config.train.global_batch_samples)
    passes = count_micro_batches(run.validation)
    with run.progress.part("measuring the student", passes, measured_after=run.state.step) as advance:
        student_ppl = perplexities(
            run.student,
            run.validation,
            options=run.head_options,
            device=run.runtime.device,
            comm=run.runtime.comm,
            poll=run.interruption.check,
            advance=advance,
        )
    if not run.state.student_before:
        run.state.student_before = student_ppl.tolist()
    elapsed = time.perf_counter() - started
    run.state.train_s += elapsed
    return student_ppl, elapsed


def _begin_interval(run: Run, student_ppl: Array, measure_s: float) -> Ids:
    """Decide on the next interval, begin it in the state, record it, and return its sample ids. Collective.

    Raises Exhausted, and leaves the state as it was, if the domains cannot fill the interval.
    """
    started = time.perf_counter()
    run.watchdog.watch("controller", run.state.step)
    decision = run.mixer.decide(run.state, student_ppl, run.teacher_ppl)
    data = run.state.data
    draws = run.inputs.exhaustion.draws(decision.proportions, _interval_samples(run), data.drawn, data.owed)
    ids = run.mixer.begin(run.state, decision, draws)
    clock = {"measure_s": measure_s, "controller_s": time.perf_counter() - started}
    _record_interval(run, student_ppl, clock, draws.asked)
    return ids


def _interval_samples(run: Run) -> int:
    """Return the samples of the next interval; the last one of a run can be shorter."""
    steps = interval_steps(run.config.mixture, run.state.data.interval + 1)
    return min(steps, run.total_steps - run.state.step) * run.config.train.global_batch_samples


def _record_interval(run: Run, student_ppl: Array, clock: dict[str, float], asked: Sequence[int]) -> None:
    """Write the line of the interval that has just begun, and announce its alarms."""
    state, names = run.state, run.inputs.names
    ratio = ratio_to_teacher(student_ppl, run.teacher_ppl)
    alarms = check_interval(
        state,
        None if ratio is None else ratio.tolist(),
        names,
        run.config.guard,
        run.config.mixture.exclude,
        run.inputs.controller.spreading(state.data.interval),
    )
    record = interval_record("interval", state, names, student_ppl, run.teacher_ppl, clock, alarms, asked)
    if run.domain_weights is not None:
        record["loss_weights"] = dict(zip(names, run.domain_weights, strict=True))
    run.record(record)
    for alarm in alarms:
        run.announce("alarm", f"alarm: {alarm}", step=state.step, text=alarm)
    run.progress.interval(state.data.interval, state.proportions)


def _train_interval(run: Run, ids: Ids) -> None:
    """Train on the rest of an interval with the global sample ids `ids` (total,). Collective."""
    comm, state, config = run.runtime.comm, run.state, run.config
    state.leave_out()
    cached = run.cached if config.distils else None
    if cached is not None:
        missing = cached.look_for(ids[state.data.consumed :])
        if missing and run.teacher is None:
            if state.step:
                _save_now(run)
            raise lacking_samples(config, missing, dict(zip(run.inputs.names, state.data.drawn, strict=True)))
    method = run.make_method()
    batches = interval_loader(
        run.dataset,
        ids,
        **config.reader(comm.rank, comm.world_size),
        micro_batch=config.train.micro_batch_samples,
        start_sample=state.data.consumed,
        readers=run.readers,
    )
    if cached is not None:
        batches = cached.ahead(batches)
    run.ahead.interval(ids, state.data.consumed)
    run.watchdog.watch("step", state.step)
    reader = StepReader(batches, config.micro_batches(comm.world_size), run.interruption)
    save_pending = False
    started = time.perf_counter()
    micro_batches = _read(run, lambda: reader.first(comm, run.runtime.device))
    while micro_batches:
        if run.sampler.due(state.step):
            started += _sample(run)
        seed_step(config.seed, state.step, comm.rank)
        rate = learning_rate(state.step, run.total_steps, config.optimizer)
        metrics = train_step(
            run.student,
            method,
            micro_batches,
            learning_rate=rate,
            progress=state.step / run.total_steps,
            teacher_pass_size=config.teacher_pass_size if run.cached is None else len(micro_batches),
            num_domains=len(run.inputs.names),
            domain_weights=run.domain_weights,
            by_domain=config.mixture.source == "training",
            device=run.runtime.device,
            comm=comm,
            meanwhile=reader.read,
        )
        state.method = method.state_dict()
        _record_step(run, metrics, rate, reader.take_seconds(), time.perf_counter() - started)
        save_pending |= state.step % config.checkpoint.every_steps == 0
        if save_pending and state.good_step == state.step:  # amid bad steps is no place to roll back to
            save_pending = not _begin_checkpoint(run)
        if run.saver.ready():
            _finish_checkpoint(run)
        run.watchdog.watch("step", state.step)
        started = time.perf_counter()
        micro_batches = _read(run, partial(reader.agreed, comm, metrics.agreed))
    run.publish_teacher()


def _read(run: Run, read: Callable[[], list[MicroBatch]]) -> list[MicroBatch]:
    """Return the micro-batches that `read` returns; save first if a store does not answer. Collective."""
    try:
        return read()
    except TemporaryError:
        _save_now(run, in_need=True)
        raise


def _sample(run: Run) -> float:
    """Write continuations of the run's prompts to the ledger; return the seconds that this took. Collective.

    A checkpoint of this step has been begun before, or follows only after the next step: so a run that resumes from
    one writes each step's continuations once.
    """
    started = time.perf_counter()
    run.watchdog.watch("evaluation", run.state.step)
    samples = run.sampler.samples(run.student, run.teacher, run.interruption.check)
    elapsed = time.perf_counter() - started
    run.state.train_s += elapsed
    clock = {"samples_s": round(elapsed, 4)}
    run.record({"kind": "samples", "step": run.state.step, "samples": samples, "clock": clock})
    run.watchdog.watch("step", run.state.step)
    return elapsed


def _record_step(run: Run, metrics: StepMetrics, rate: float, data_s: float, step_s: float) -> None:
    """Advance the state by the step that was taken, record it, and check its numbers.

    Raises NumbersGoneWrong on every rank, as `check_step` does.
    """
    state = run.state
    state.step += 1
    state.data = state.data.consume(run.config.train.global_batch_samples)
    run.ahead.advance(state.data.consumed)
    state.domain_tokens = [a + b for a, b in zip(state.domain_tokens, metrics.domain_tokens, strict=True)]
    state.add_losses(metrics.domain_tokens, metrics.domain_losses)
    state.train_s += step_s
    taught = run.take_taught()
    share = 1.0 if taught is None else taught / run.config.train.global_batch_samples
    seconds = {"step": step_s, "data": data_s, "monitor": run.monitor.take_seconds()}
    clock = step_clock(metrics, seconds, run.student_flops + share * run.teacher_flops)
    if taught is not None:
        clock["teacher_samples"] = taught
    record = {"kind": "step", "step": state.step, "interval": state.data.interval}
    run.record({**record, **step_numbers(metrics), "learning_rate": rate, "clock": clock})
    run.progress.step(state.step, metrics, clock["tokens_per_s"], step_s)
    check_step(state, metrics.loss, metrics.grad_norm, run.config.guard)
    if state.skipped_in_row:
        message = f"warning: step {state.step} has no finite gradient: skipped, the weights are as before"
        run.announce("skipped", message, step=state.step)


def _begin_checkpoint(run: Run, *, in_need: bool = False) -> bool:
    """Begin to save this step and return True; warn and return False if that is not possible. Collective.

    Args:
        in_need: do not wait until a store takes what the teacher has said; another run computes that again.
    """
    _finish_checkpoint(run)
    run.watchdog.watch("checkpoint", run.state.step)
    run.publish_teacher(wait=not in_need)
    try:
        run.saver.begin(run.student, run.state, run.ledger.position())
    except SaveFailed as failure:
        _warn_not_saved(run, failure)
        return False
    return True


def _finish_checkpoint(run: Run) -> bool:
    """Complete the checkpoint that was begun, if any; warn and return False if that fails. Collective."""
    run.watchdog.watch("checkpoint", run.state.step)
    try:
        saved = run.saver.finish()
    except SaveFailed as failure:
        _warn_not_saved(run, failure)
        return False
    if saved is not None:
        clock = {"pause_s": round(saved.pause_s, 4), "seconds": round(saved.seconds, 4)}
        run.ledger.event("checkpoint", step=saved.step, path=str(saved.path), **clock)
        run.progress.remaining.checkpoint_took(saved.seconds)
    return True


def _warn_not_saved(run: Run, failure: SaveFailed) -> None:
    message = f"warning: no checkpoint at step {run.state.step}: {failure}"
    run.announce("checkpoint_failed", message, step=run.state.step, reason=str(failure))


def _save_now(run: Run, *, in_need: bool = False) -> bool:
    """Save a checkpoint of this step and wait for it; return False, after a warning, if that fails. Collective."""
    return _begin_checkpoint(run, in_need=in_need) and _finish_checkpoint(run)


def _save_interrupted(run: Run, signal: str) -> None:
    """Save the steps that are done and say how to continue. The step that the signal cut short changed nothing."""
    saved = "saved" if _save_now(run, in_need=True) else "NOT saved"
    run.progress.stop()
    step = run.state.step
    message = f"interrupted by {signal} and {saved} at step {step}: start the same command again to continue"
    run.announce("interrupted", message, step=step, signal=signal)


def _announce_wrong_numbers(run: Run, reason: str) -> None:
    """Say why the run stops and which checkpoint is the last. Nothing is saved."""
    run.progress.stop()
    step, last = run.state.step, newest_checkpoint(run.config.run_dir) if run.runtime.comm.rank == 0 else None
    message = (
        f"stopped at step {step}: {reason}. The last checkpoint is {last[0] if last else 'none'}. Look at "
        "the steps before in ledger.jsonl and at their data; a new run with a lower optimizer.learning_rate may hold"
    )
    run.announce("stopped", message, step=step, reason=reason)


def _finish(run: Run, student_ppl: Array, measure_s: float, reason: str) -> dict[str, Any]:
    """Save, export the student, and write and return the summary. Collective."""
    _save_now(run)
    config, comm, state, names = run.config, run.runtime.comm, run.state, run.inputs.names
    run.record(interval_record("end", state, names, student_ppl, run.teacher_ppl, {"measure_s": measure_s}))
    if config.monitor.samples_every:
        _sample(run)
    run.watchdog.watch("export", state.step)
    with run.progress.part("exporting the student", len(run.student.stored.parameters)) as advance:

        def poll() -> None:
            run.interruption.check()
            advance()

        kept = export_student(
            run.student,
            config.run_dir / "export",
            comm,
            lambda: companions(config.run_dir, config, run.inputs.student, state, versions()),
            poll,
            also=lambda directory: run.make_method().export(run.student, directory, names, comm),
        )
    if kept is not None:
        message = f"warning: {config.run_dir / 'export'} held files that are not ours: it is now {kept}"
        run.announce("kept", message, step=state.step, path=str(kept))
    summary = make_summary(config, state, names, student_ppl, run.teacher_ppl, reason)
    call_together(comm, lambda: write_summary(config.run_dir, summary) if comm.rank == 0 else None)
    run.progress.stop()
    message = f"finished: {reason}; student exported to {config.run_dir / 'export'}"
    run.announce("end", message, step=state.step, reason=reason)
    run.progress.console.print(summary_table(summary))
    return summary
