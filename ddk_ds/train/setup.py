"""Setting up a run from its checked inputs: models, data, controller, and the state of its checkpoint."""

from __future__ import annotations

from typing import Any

from ddk_ds.comm import call_together
from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples, interval_ends, total_steps
from ddk_ds.data.cache import CachedStore
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.readers import Readers
from ddk_ds.engine.flops import step_flops
from ddk_ds.engine.layers import experts_kernel
from ddk_ds.engine.monitors import open_writers
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.student import load_student
from ddk_ds.mixture.interval_state import DomainEntry, IntervalState
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.checkpoint.restore import Start, find_start, restore
from ddk_ds.train.checkpoint.saver import Saver
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.interruption import Interruption
from ddk_ds.train.interval import Mixer
from ddk_ds.train.ledger import Ledger, MonitorFeed
from ddk_ds.train.progress import RunProgress
from ddk_ds.train.read_ahead import ReadAhead
from ddk_ds.train.run import Run
from ddk_ds.train.samples import Sampler, held_out_prompts
from ddk_ds.train.state import RunState
from ddk_ds.train.teacher_passes import settle_teacher
from ddk_ds.train.teacher_store import check_loaded, head_options, held_out, open_cache, start_teacher
from ddk_ds.train.validation import ValidationBatches, worse_than_guessing
from ddk_ds.train.watchdog import Watchdog
from ddk_ds.version import versions


def prepare_run(
    config: Config, inputs: Inputs, identity: dict[str, Any], runtime: Runtime, watchdog: Watchdog, readers: Readers
) -> Run:
    """Load models and data, restore the checkpoint that the run continues from, and return the run. Collective.

    `readers` have been started. Raises CheckpointError on every rank if there are checkpoints and none can be used.
    """
    comm = runtime.comm
    config = settle_teacher(config, inputs, runtime)
    watchdog.watch("restore")
    start = find_start(config, comm)
    watchdog.watch("models")
    vocab_size = inputs.vocabulary.size
    dataset = MixtureDataset(inputs.store, inputs.names, vocab_size=vocab_size, masked=inputs.masked)
    validation = held_out(config, inputs, comm)
    clock = StageClock(runtime.device.type, measure_memory=True)
    steps = total_steps(config, corpus_samples(config.mixture, dict(zip(dataset.names, dataset.sizes, strict=True))))
    progress = RunProgress(comm.rank, steps, interval_ends(config.mixture, steps), inputs.names)
    cached = open_cache(config, inputs, dataset, comm)
    options = head_options(config, vocab_size, runtime.device.type)
    teacher, teacher_ppl = start_teacher(
        config, inputs, identity, runtime, watchdog, validation, options, clock, progress
    )
    student = load_student(config, inputs.student, vocab_size, comm, inputs.filters, clock)
    check_loaded(student, validation[0][0].input_ids.to(runtime.device), inputs, "student", comm)
    orders = [
        DomainOrder(name, sizes, config.seed) for name, sizes in zip(inputs.names, dataset.order_sizes, strict=True)
    ]
    flops = step_flops(config, inputs.student, inputs.teacher, comm.world_size)
    student_flops = step_flops(config, inputs.student, None, comm.world_size)
    run = Run(
        config=config,
        inputs=inputs,
        runtime=runtime,
        student=student,
        teacher=teacher,
        cached=cached,
        head_options=options,
        dataset=dataset,
        readers=readers,
        validation=validation,
        teacher_ppl=teacher_ppl,
        mixer=Mixer(inputs.controller, orders, dataset.sample_offsets, comm),
        interruption=Interruption(comm, runtime.device),
        watchdog=watchdog,
        ahead=ReadAhead(
            inputs.store, dataset, orders, None if cached is None else cached.store, enabled=comm.local_rank == 0
        ),
        sampler=_sampler(config, inputs, validation, runtime),
        state=_first_state(dataset, config.seed, options.chunk_tokens),
        ledger=Ledger(config.run_dir, comm.rank),
        monitor=MonitorFeed({}, config.monitor.every_s, print),
        saver=Saver(config.run_dir, identity, comm, config.checkpoint),
        progress=progress,
        total_steps=steps,
        student_flops=student_flops,
        teacher_flops=flops - student_flops,
    )
    _begin(run, start)
    return run


def _begin(run: Run, start: Start | None) -> None:
    """Take up the checkpoint if there is one, open the monitors, and then record the start: nothing can refuse it now.

    Collective.
    """
    run.watchdog.watch("restore")
    if start is None:
        run.ledger.rewind(0)
    else:
        restore(run, start)
    run.readers.give_up = lambda: run.interruption.signal != 0  # a signal is answered while the store fails
    if isinstance(run.inputs.store, CachedStore):
        run.inputs.store.fetcher.give_up = run.readers.give_up
    if run.cached is not None:
        run.cached.store.place.give_up_when(run.readers.give_up)
    call_together(run.runtime.comm, lambda: _open_monitors(run) if run.runtime.comm.rank == 0 else None)
    _announce_start(run, start)
    ppl = run.teacher_ppl
    warning = "" if ppl is None else worse_than_guessing(ppl, run.inputs.names, run.inputs.vocabulary.size)
    if warning:
        run.announce("alarm", f"alarm: {warning}", step=run.state.step, text=warning)


def _sampler(config: Config, inputs: Inputs, validation: ValidationBatches, runtime: Runtime) -> Sampler:
    prompts = inputs.prompts
    if config.monitor.samples_every and not prompts:
        prompts = held_out_prompts(inputs.names, validation, config, runtime.comm)
    return Sampler(config, prompts, inputs.tokenizer, inputs.vocabulary.size, runtime.device)


def _open_monitors(run: Run) -> None:
    config = run.config
    writers = open_writers(config.monitor, config.run_dir, config.name, run.state.step)
    run.monitor = MonitorFeed(writers, config.monitor.every_s, run.progress.say)


def _announce_start(run: Run, start: Start | None) -> None:
    """Say what the run continues from, and record its start. A start that was refused is none."""
    world_size = run.runtime.comm.world_size
    setting: dict[str, Any] = {"world_size": world_size, "mixture": run.inputs.mixture}
    if run.inputs.vocabulary.left_out:
        setting["left_out"] = run.inputs.vocabulary.left_out
    if run.config.teacher is not None:
        setting["micro_batches_per_pass"] = run.config.teacher.pass_size
        setting["shard_within"] = run.config.teacher.place
    setting |= _experts(run)
    if start is None:
        run.ledger.event("start", **setting, versions=versions())
        return
    done = {"fork": "forked", "phase": "new phase", "resume": "resumed"}[start.kind]
    step, changed, wrote = run.state.step, start.changed_versions, start.manifest.world_size
    ranks = "" if wrote == world_size else f"; {wrote} ranks wrote it, {world_size} go on"
    message = f"{done} from {start.directory}, step {step}{ranks}"
    run.announce(start.kind, message, step=step, **setting, path=str(start.directory), changed_versions=changed)
    if changed:
        shown = ", ".join(f"{name} {change}" for name, change in changed.items())
        run.progress.say(f"warning: other versions than before, so the last digits may differ: {shown}")


def _experts(run: Run) -> dict[str, Any]:
    """Say how the experts of the run's models are computed, and return that and the weight of the routers' loss."""
    setting: dict[str, Any] = {}
    for key, model in (("student", run.student), ("teacher", run.teacher)):
        if model is not None and (kernel := experts_kernel(model.whole)):
            setting.setdefault("experts", {})[key] = kernel
            run.progress.say(f"{key}: its experts are computed by transformers' {kernel}")
    if "student" in setting.get("experts", {}) and not run.config.preset.freezes_student:
        router = run.student.router
        setting["router_aux_loss"] = 0.0 if router is None else router.weight
        family = type(run.student.whole).__name__
        weight = (
            f"weight {router.weight:g} in the loss" if router else f"none for {family}: see student.router_aux_loss"
        )
        run.progress.say(f"student: load-balancing loss of its routers: {weight}")
    return setting


def _first_state(dataset: MixtureDataset, seed: int, chunk_tokens: int) -> RunState:
    domains: list[DomainEntry] = [
        {"name": name, "num_samples": int(size), "sha": sha}
        for name, size, sha in zip(dataset.names, dataset.sizes, dataset.shas, strict=True)
    ]
    return RunState(IntervalState.new(domains, seed=seed), domain_tokens=[0] * len(domains), chunk_tokens=chunk_tokens)
