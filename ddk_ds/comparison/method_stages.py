"""The stages of each method, and how they are run: each stage is a run of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddk_ds.config import Config, load_config, load_run_config
from ddk_ds.config.keys import flatten, value_at
from ddk_ds.config.methods import METHODS as SINGLE_STAGE
from ddk_ds.config.paths import path_keys
from ddk_ds.config.run_config import CACHE_CONDITIONS
from ddk_ds.errors import CheckpointError, ConfigError, TemporaryError, UserError
from ddk_ds.exit_codes import EXIT_ENDED_AT_ONCE, EXIT_INTERRUPTED, EXIT_TEMPORARY
from ddk_ds.files import read_object
from ddk_ds.launcher import launcher_command, run_launcher
from ddk_ds.run_files import is_finished

FILTERS, REFERENCE, PROXY = "filters", "reference", "proxy"
SUFFIXES = (FILTERS, REFERENCE, PROXY)
"""Endings of the names of runs that come before a method's last stage."""
_CPT = ("method=cpt", "teacher=null")
_PROXY = ("method=doremi_proxy", "mixture.loss_weights=null")  # its loss has the weights that it looks for
_FREE: dict[str, Any] = {
    **dict.fromkeys(("output_dir", "checkpoint", "limits"), True),
    "teacher": {"cache": {"path": True, "mode": True}},
}
"""Sections and keys that change no number of a run: where it lies and how it saves."""
_OF_CACHE = ("teacher.path", "teacher.attn_implementation", *CACHE_CONDITIONS.values())
"""Keys on which it depends what a teacher says."""
_NO_CACHE = "teacher.cache=null"

RunDir = Callable[[str], Path]
"""Gives the directory of a method's stage by the stage's suffix."""


def _filters(run_dir: RunDir) -> list[str]:
    return [f"ted.filters={run_dir(FILTERS) / 'export/filters.safetensors'}"]


def _reference(run_dir: RunDir) -> list[str]:
    return [f"teacher.path={run_dir(REFERENCE) / 'export'}"]


def _proportions(run_dir: RunDir) -> list[str]:
    path = run_dir(PROXY) / "export/proportions.yaml"
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; did the proxy model's run finish?")
    try:
        proportions = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}; export it again") from error
    return [f"mixture.proportions={json.dumps(proportions, separators=(',', ':'))}"]


@dataclass(frozen=True)
class Stage:
    """One run of a method of one or several stages."""

    suffix: str
    """Ending of the run's name; empty for the last stage, whose student is the method's result."""
    overrides: tuple[str, ...]
    from_earlier: Callable[[RunDir], list[str]] | None = None
    """Makes the overrides that name an earlier stage's results. Raises CheckpointError where these are missing."""


STAGES: dict[str, tuple[Stage, ...]] = {
    name: (Stage("", (f"method={name}", *(() if preset.teacher else ("teacher=null",)))),)
    for name, preset in SINGLE_STAGE.items()
    if name not in ("ted_filters", "doremi_proxy")
} | {
    # TED (arXiv 2210.01351): first the filters, with both models frozen; then the student and its filters.
    "ted": (Stage(FILTERS, ("method=ted_filters",)), Stage("", ("method=ted",), _filters)),
    # DoReMi (arXiv 2305.10429): first a reference model; then a proxy model by group DRO, with the reference as its
    # teacher; then continued pre-training with the proxy's mean proportions.
    "doremi": (
        Stage(REFERENCE, _CPT),
        Stage(PROXY, _PROXY, _reference),
        Stage("", (*_CPT, "mixture.controller=static"), _proportions),
    ),
    # The same proportions for the method that the configuration has, such as distillation from its teacher.
    "doremi_static": (
        Stage(REFERENCE, _CPT),
        Stage(PROXY, _PROXY, _reference),
        Stage("", ("mixture.controller=static",), _proportions),
    ),
}


class StageFailed(UserError):
    """A stage's run failed before its end."""


class RunInterrupted(Exception):
    """A signal ended a stage's run; the same command continues it."""


@dataclass(frozen=True)
class Job:
    """One method from its starting student to its result: all its stages, one after the other."""

    config: Path
    method: str
    name: str
    output_dir: Path
    overrides: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    """Those of `overrides` that only this one of several jobs has: all share the cache of the teacher."""

    def __post_init__(self) -> None:
        if self.method not in STAGES:
            raise ConfigError(f"method {self.method!r} is unknown: give one of {', '.join(STAGES)}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the method's stages in the order of running; the last stage's run is named like the job."""
        return STAGES[self.method]

    def run_name(self, suffix: str) -> str:
        """Return the name of the run of the stage with this suffix."""
        return f"{self.name}-{suffix}" if suffix else self.name

    def run_dir(self, suffix: str) -> Path:
        """Return the directory of the run of the stage with this suffix."""
        return self.output_dir / self.run_name(suffix)

    def arguments(self, stage: Stage) -> list[str]:
        """Return the overrides of a stage's run: the job's, then the stage's, since later ones win.

        They leave the teacher's cache out where the run needs more than it has, or other draws. Raises ConfigError if
        the teacher may not be loaded then.
        """
        named = self._arguments(stage)
        return [*named, _NO_CACHE] if self.off_cache(stage) else named

    def _arguments(self, stage: Stage) -> list[str]:
        results = stage.from_earlier(self.run_dir) if stage.from_earlier else []
        place = [f"name={self.run_name(stage.suffix)}", f"output_dir={self.output_dir}"]
        return [*self.overrides, *stage.overrides, *results, *place]

    def off_cache(self, stage: Stage) -> str:
        """Return why a stage's run computes its teacher although the configuration has a cache of it, or ""."""
        named = self._arguments(stage)
        cache = self._named_cache(named)
        if cache is None:
            return ""
        keep = value_at(cache, "keep") or "sampled"
        reason = ", ".join(load_config(self.config, [*named, _NO_CACHE]).beyond_cache(keep))
        if not reason:
            reason = self._other_draws(named)
        if reason and value_at(cache, "mode") == "read_only":
            raise ConfigError(
                f"{self.run_name(stage.suffix)} cannot be read from the teacher's cache ({reason}), and "
                "teacher.cache.mode is read_only: leave it out, or set write_through, which runs it with the teacher"
            )
        return reason

    def _named_cache(self, arguments: list[str]) -> Any:
        """Return the section teacher.cache as it is given, or None."""
        try:
            values = OmegaConf.merge(OmegaConf.load(self.config), OmegaConf.from_dotlist(arguments))
            return value_at(OmegaConf.to_container(values), "teacher.cache")
        except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError):
            return None  # `load_config` says what is wrong

    def _other_draws(self, arguments: list[str]) -> str:
        """Return this job's own keys with which the teacher says something else than in the jobs beside it, or ""."""
        keys = {item.partition("=")[0] for item in self.own}
        if "teacher.cache.path" in keys:
            return ""
        others = [item for item in arguments if item not in self.own or item.partition("=")[0] not in _OF_CACHE]
        return changed_says(load_config(self.config, arguments), load_config(self.config, others))

    def check(self) -> None:
        """Raise ConfigError if a stage's configuration is wrong, or differs from that of its finished run.

        Stages after the first unfinished one are not checked, since they can need its results.
        """
        for stage in self.stages:
            if not self.is_done(stage):
                return

    def is_done(self, stage: Stage) -> bool:
        """Return True if the stage's run is finished. Raises ConfigError if it finished with another configuration."""
        wanted, run_dir = load_config(self.config, self.arguments(stage)), self.run_dir(stage.suffix)
        if not is_finished(run_dir):
            return False
        finished = load_run_config(run_dir)
        changed = [f"{key} was {old!r}, is {new!r}" for key, old, new in differences(finished, wanted)]
        if changed:
            raise ConfigError(
                f"{run_dir} holds a finished run of another configuration: {'; '.join(changed[:4])}. Give another "
                "directory, or the values of that run"
            )
        if replaced := _replaced_content(run_dir, wanted):
            raise ConfigError(
                f"{run_dir} holds a finished run, and since then {', '.join(replaced)} got other content at the same "
                "place: give another directory"
            )
        return True


def changed_says(own: Config, other: Config) -> str:
    """Return the keys and values with which the teacher says something else than in another configuration, or "".

    Those of the cache's draws count where both have a cache.
    """
    values, others = (config.model_dump(mode="json") for config in (own, other))
    pairs = {key: (value_at(values, key), value_at(others, key)) for key in _OF_CACHE}
    changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and None not in pair}
    return ", ".join(f"{key}: {first}, not {second}" for key, (first, second) in changed.items())


def differences(finished: Config, wanted: Config) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) of each value that differs, except a run's place and the options of saving.

    A path is also the same if it lies in the same place as seen from the run's directory: all may have been moved.
    """
    old, new = (flatten(config.model_dump(mode="json", exclude=_FREE)) for config in (finished, wanted))
    moved = {
        key
        for key in path_keys(Config)
        if isinstance(old.get(key), str)
        and isinstance(new.get(key), str)
        and os.path.relpath(old[key], finished.run_dir) == os.path.relpath(new[key], wanted.run_dir)
    }
    keys = sorted({*old, *new} - moved)
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _replaced_content(run_dir: Path, config: Config) -> list[str]:
    """Return the keys of models and data whose content is no more that of the finished run; nothing remote is read.

    Raises UserError if they cannot be read.
    """
    # They import torch and transformers, which takes seconds that a comparison without a finished run should not take.
    from ddk_ds.data.manifest import load_manifest
    from ddk_ds.engine.model_files import read_model

    path = run_dir / "run.json"
    known = read_object(path, "put it back from a copy") if path.is_file() else {}
    replaced = []
    for key, model in (("student", config.student), ("teacher", config.teacher)):
        recorded = known.get(f"content.{key}")
        if model is None or recorded is None or not Path(model.path).is_dir():
            continue
        if read_model(Path(model.path), f"{key}.path").fingerprint != recorded:
            replaced.append(f"{key}.path {model.path}")
    data = Path(config.data.path)
    domains = load_manifest(data).domains if config.data.cache_dir is None and data.is_dir() else {}
    for name, domain in domains.items():
        if known.get(f"content.domains.{name}", domain.fingerprint) != domain.fingerprint:
            replaced.append(f"data.path {data} ({name})")
    return replaced


def run_job(job: Job, ranks: int | None) -> Iterator[str]:
    """Run the stages that are not finished, and yield a line of text for each stage.

    `ranks` is the number of processes; None starts one for each accelerator of the machine. Raises StageFailed (or
    TemporaryError) that names the log, RunInterrupted after a signal, and UserError if a stage cannot begin.
    """
    for stage in job.stages:
        run = job.run_name(stage.suffix)
        if job.is_done(stage):
            yield f"{run}: finished before, skipped"
            continue
        if reason := job.off_cache(stage):
            yield f"{run}: with the teacher itself, not its cache: {reason}"
        log, began = job.output_dir / f"{run}.log", time.monotonic()
        code = launch(job.config, job.arguments(stage), ranks, log)
        if code in (EXIT_INTERRUPTED, EXIT_ENDED_AT_ONCE):
            raise RunInterrupted(f"{run} was interrupted by a signal")
        # The launcher exits with 0 when a signal ends its ranks: only the summary proves that the run is done.
        if code != 0 or not is_finished(job.run_dir(stage.suffix)):
            kind = TemporaryError if code == EXIT_TEMPORARY else StageFailed
            raise kind(f"{run} failed with exit code {code}: see {log}")
        yield f"{run}: finished in {time.monotonic() - began:.0f} s"


def launch(config: Path, overrides: Sequence[str], ranks: int | None, log: Path) -> int:
    """Start a run by the `deepspeed` launcher, append its output to `log`, wait, and return the exit code.

    With `ranks` None there is a rank for each accelerator of the machine. Signals of this process go to the ranks.
    """
    options = [] if ranks is None else [f"--num_gpus={ranks}"]
    command = launcher_command(options, ["--config", str(config), *overrides])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        return run_launcher(command, stdout=output, stderr=subprocess.STDOUT)
