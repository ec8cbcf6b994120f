"""A run's configuration: the rules between its sections, and the lengths of its batches, intervals and run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from ddk_ds.config.data_section import Data
from ddk_ds.config.keys import value_at
from ddk_ds.config.methods import MethodSections
from ddk_ds.config.mixture_options import Mixture
from ddk_ds.config.optimizer import Optimizer, check_schedule
from ddk_ds.config.paths import LocalPath, NamedPaths, is_address
from ddk_ds.config.sections import (
    Checkpoint,
    FileName,
    Guard,
    Limits,
    Loss,
    Monitor,
    Natural,
    Stop,
    Student,
    Teacher,
    Train,
)
from ddk_ds.errors import ConfigError

CACHE_CONDITIONS = {
    "quantize": "teacher.quantize",
    "quantize_skip_layers": "teacher.quantize_skip_layers",
    "precision": "train.precision",
    "logits_dtype": "loss.logits_dtype",
    "sequence_length": "data.sequence_length",
    "temperature": "loss.temperature",
    "keep": "teacher.cache.keep",
    "draws": "teacher.cache.draws",
    "seed": "teacher.cache.seed",
    "top_k": "teacher.cache.top_k",
}
"""Keys on which the content of a teacher's cache depends, by the names that teacher.json gives them. Beside them it
depends on the teacher itself and on its attention kernel, which a configuration does not know."""

# The stores on which mosaicml-streaming both puts files and lists them.
_UPLOADABLE = ("s3://", "gs://", "oci://")


class Config(MethodSections):
    """The configuration of one run."""

    name: FileName
    """Name of the run and of its directory."""
    output_dir: LocalPath = "runs"
    """Directory that holds the runs' directories; the default lies in the directory where the run is started."""
    init_from: LocalPath | None = None  # once the run has a checkpoint of its own, this one may be gone
    """Checkpoint, or a run's directory, whose weights and optimizer this run begins with."""
    init_as: Literal["fork", "phase"] = "fork"
    """fork: the run goes on at the checkpoint's step and place in the data. phase: it begins at step 0 with data,
    sequence length, batch, mixture and schedule of its own, such as a last phase on long samples."""
    seed: Natural = 0
    """Seed of the data order and of dropout."""
    student: Student
    """The model in training."""
    teacher: Teacher | None = None
    """The frozen model that the student is compared with; for doremi_proxy the reference model. cpt has no teacher."""
    data: Data
    mixture: Mixture = Mixture()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    stop: Stop
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    limits: Limits = Limits()
    monitor: Monitor = Monitor()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own keys, merged into the dictionary made from the other sections; contradictions are errors."""

    _named: NamedPaths = PrivateAttr(default_factory=NamedPaths)

    def with_names(self, named: NamedPaths) -> Config:
        """Return this configuration, which from now on knows how the user wrote its paths."""
        self._named = named
        return self

    def path_note(self, key: str) -> str:
        """Return the words that say where the path at `key` begins, for a message's end; "" for an absolute path."""
        return self._named.note(key)

    def check_paths(self, *keys: str) -> None:
        """Raise ConfigError if a file or directory that the run reads is not there; nothing is opened.

        A model that can be one of the hub is not looked for there. `keys` limits the check to the paths at them.
        """
        if (message := self._named.missing(keys)) is not None:
            raise ConfigError(message)

    @property
    def run_dir(self) -> Path:
        """Directory of the run, <output_dir>/<name>."""
        return Path(self.output_dir) / self.name

    @property
    def teacher_pass_size(self) -> int:
        """Number of micro-batches that the teacher computes in one pass; 1 if the run has no teacher."""
        return 1 if self.teacher is None else self.teacher.pass_size

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        self._check_teacher()
        if self.mixture.loss_weights is not None and not self.preset.takes_loss_weights:
            raise ValueError(
                f"mixture.loss_weights: the loss of method: {self.method} takes no weights of domains: remove it"
            )
        self._check_source()
        if self.init_as == "phase" and self.init_from is None:
            raise ValueError("init_as is phase: set init_from to the checkpoint, or the run, that it begins from")
        if self.stop.steps is not None or self.stop.intervals is not None:
            check_schedule(self.optimizer, total_steps_without_data(self))
        self._check_sequence_parallel()
        if self.monitor.samples_every and self.monitor.sample_tokens >= self.data.sequence_length:
            raise ValueError(
                f"monitor.sample_tokens is {self.monitor.sample_tokens}, data.sequence_length "
                f"{self.data.sequence_length}: lower sample_tokens, so that there is room for a prompt"
            )
        self._check_patience()
        uses_nvme = "nvme" in (self.optimizer.offload, self.student.offload_params) or (
            self.teacher is not None and self.teacher.offload_params == "nvme"
        )
        if uses_nvme and self.train.nvme_path is None:
            raise ValueError("something is offloaded to nvme: set train.nvme_path to a directory on a local disk")
        if self.data.domains is not None and len(set(self.data.domains)) != len(self.data.domains):
            raise ValueError(f"data.domains names a domain twice: {', '.join(self.data.domains)}")
        return self

    def _check_source(self) -> None:
        """Raise ValueError if the training loss does not measure what the mixture's controller uses."""
        mixture, loss = self.mixture, self.loss
        if mixture.source == "training" and not self.preset.takes_loss_weights:
            raise ValueError(
                f"mixture.source: training: method: {self.method} has no loss of the student's own by domain: set "
                "mixture.source to held_out"
            )
        if mixture.measure != "kl":
            return
        gammas = (loss.gamma, loss.gamma if loss.gamma_end is None else loss.gamma_end)
        if self.teacher is None or not all(gammas) or loss.divergence != "forward_kl":
            raise ValueError(
                "mixture.measure: kl is the divergence in the loss: it needs a teacher, loss.divergence: forward_kl, "
                "and loss.gamma and loss.gamma_end above 0"
            )

    def _check_patience(self) -> None:
        """Raise ValueError if a limit of time would end a rank that waits for a store while it may."""
        longest = self.data.download_patience_s + self.data.download_timeout_s
        for name in ("start_s", "step_s", "evaluation_s"):
            limit = getattr(self.limits, name)
            if self.data.cache_dir is not None and 0 < limit <= longest:
                raise ValueError(
                    f"limits.{name} is {limit:g}, and data.download_patience_s with data.download_timeout_s is "
                    f"{longest:g}: a rank that waits for the store would be ended as one that hangs; raise the limit, "
                    "or lower data.download_patience_s"
                )

    def _check_teacher(self) -> None:
        """Raise ValueError if the method or a section needs a teacher and the run has none.

        Also raise it if the run has a teacher that the method does not use, or if `method: ted` has no `ted.filters`.
        """
        needed = self.preset.teacher
        if needed and self.teacher is None:
            raise ValueError(f"method: {self.method} needs a teacher: set teacher.path, or method: cpt")
        if not needed and self.teacher is not None:
            raise ValueError(f"method: {self.method} takes no teacher: remove teacher, or set method: ddk")
        if self.preset.filters == "loaded" and self.ted.filters is None:
            raise ValueError(
                "method: ted needs ted.filters: run the same configuration with method: ted_filters first, or start "
                "both runs by `ddk stages`"
            )
        if self.teacher is not None and self.teacher.by_domain and self.loads_teacher:
            raise ValueError(
                "teacher.by_domain: a run loads one teacher at most: set teacher.cache.path and teacher.cache.mode: "
                "read_only, and fill that cache by `ddk teach`"
            )
        if self.teacher is not None and not self.teacher.multiplies_in(self.train.precision):
            raise ValueError(
                f"teacher.quantize: fp8 has results in bf16, and train.precision is {self.train.precision}: set "
                "train.precision to bf16, or teacher.quantize to int8"
            )
        if self.teacher is not None and self.teacher.cache is not None:
            self._check_cache()
        if needed:
            return
        mixture = self.mixture
        excess_loss = mixture.controller in ("sheared_llama", "doremi_online")
        if mixture.controller.startswith(("ddk", "kl_gap")) or (excess_loss and mixture.reference_losses is None):
            raise ValueError(
                f"mixture.controller: {mixture.controller} compares with a teacher, which method: {self.method} "
                "does not have: set mixture.controller to by_size, equal or static"
            )
        if self.stop.discrepancy is not None:
            raise ValueError(
                f"stop.discrepancy compares with a teacher, which method: {self.method} does not have: remove it"
            )

    def _check_cache(self) -> None:
        """Raise ValueError if the loss needs more of the teacher than a cache has."""
        assert self.teacher is not None and self.teacher.cache is not None
        keep, path = self.teacher.cache.keep, self.teacher.cache.path
        holds = {
            "sampled": "tokens drawn at one temperature, which give the forward KL alone (keep: topk gives every "
            "divergence, biased)",
            "topk": "the likeliest tokens at one temperature and the sum of the others, which has no other temperature",
        }
        if found := self.beyond_cache(keep):
            raise ValueError(
                f"teacher.cache holds {holds[keep]}, and the run has {', '.join(found)}: remove "
                "teacher.cache, or change that"
            )
        if is_address(path) and not path.startswith(_UPLOADABLE):
            raise ValueError(
                f"teacher.cache.path {path}: give a directory, or an address of {', '.join(_UPLOADABLE)}, where files "
                "can be put and listed"
            )
        if is_address(path) and self.data.cache_dir is None:
            raise ValueError(
                f"teacher.cache.path {path} is remote: set data.cache_dir to a directory on each node's own disk, "
                "which then holds shards of the data too"
            )

    def beyond_cache(self, keep: str) -> list[str]:
        """Return each key and value that needs more of the teacher than a cache that keeps `keep` has."""
        wrong = {
            f"method: {self.method}, which needs the teacher itself": self.preset.always_runs_teacher,
            f"loss.divergence: {self.loss.divergence}": keep == "sampled" and self.loss.divergence != "forward_kl",
            f"loss.temperature_end: {self.loss.temperature_end}": self.loss.temperature_end is not None,
        }
        return [what for what, is_so in wrong.items() if is_so]

    def cache_conditions(self) -> dict[str, Any]:
        """Return the values on which the content of the teacher's cache depends, by their names in CACHE_CONDITIONS."""
        values = self.model_dump(mode="json")
        found = {name: value_at(values, key) for name, key in CACHE_CONDITIONS.items()}
        unused = ("draws", "seed") if found["keep"] == "topk" else ("top_k",)
        return {name: value for name, value in found.items() if name not in unused}

    @property
    def distils(self) -> bool:
        """Return True if the loss has a divergence from a teacher in any step."""
        return self.teacher is not None and (self.loss.gamma > 0 or bool(self.loss.gamma_end))

    @property
    def loads_teacher(self) -> bool:
        """Return True if the run computes its teacher, and does not only read what it has said."""
        return self.teacher is not None and (self.teacher.cache is None or self.teacher.cache.mode != "read_only")

    def check_teaching(self) -> None:
        """Raise ConfigError if there is no cache of the teacher that can be filled."""
        if self.teacher is None or self.teacher.cache is None:
            raise ConfigError("ddk teach fills a cache of the teacher: set teacher.cache.path, a directory for it")
        if not self.loads_teacher and not self.teacher.by_domain:
            raise ConfigError("teacher.cache.mode is read_only: ddk teach needs write_through, the default")

    def teachings(self, names: Sequence[str]) -> list[list[str]]:
        """Return the overrides of each fill of the cache, one for each teacher of the domains `names`."""
        others = None if self.teacher is None else self.teacher.by_domain
        if self.teacher is None or not others:
            return [[]]
        by_path: dict[str, list[str]] = {}
        for name in names:
            by_path.setdefault(others.get(name, self.teacher.path), []).append(name)
        common = ["teacher.by_domain=null", "teacher.cache.mode=write_through"]
        return [
            [f"teacher.path={json.dumps(path)}", f"data.domains=[{','.join(of_path)}]", *common]
            for path, of_path in by_path.items()
        ]

    def _check_sequence_parallel(self) -> None:
        ranks = self.train.sequence_parallel
        if self.data.sequence_length % ranks:
            raise ValueError(
                f"train.sequence_parallel is {ranks}, which does not divide data.sequence_length "
                f"{self.data.sequence_length}: choose a number that does"
            )
        if ranks > 1 and (name := self.needs_whole_samples):
            raise ValueError(f"train.sequence_parallel is {ranks}, but {name} needs whole samples: set it to 1")

    @property
    def needs_whole_samples(self) -> str:
        """Return what does not allow that several ranks share a sample (`train.sequence_parallel`); "" if nothing."""
        uses = {"teacher.cache": self.teacher is not None and self.teacher.cache is not None}
        uses |= {f"method {self.method}": self.preset.filters is not None}
        models = {"student": self.student, "teacher": self.teacher}
        uses |= {f"{key}.compile_layers": m is not None and m.compile_layers for key, m in models.items()}
        return next((name for name, used in uses.items() if used), "")

    @property
    def micro_batch_tokens(self) -> int:
        """Return the tokens of a micro-batch that one rank computes, of samples that ranks share its part."""
        samples = self.train.micro_batch_samples
        return samples * self.data.sequence_length // self.train.sequence_parallel

    def reader(self, rank: int, world_size: int) -> dict[str, int]:
        """Return whose samples a rank reads: "rank" of "world". Ranks that share each sample are one reader."""
        sharing = self.train.sequence_parallel
        return {"rank": rank // sharing, "world": world_size // sharing}

    def micro_batches(self, world_size: int) -> int:
        """Return the number of micro-batches that each of `world_size` ranks computes in one optimizer step.

        Raises:
            ConfigError: `global_batch_samples` is not a multiple of `micro_batch_samples` x `world_size`.
        """
        world_size, alone = divmod(world_size, self.train.sequence_parallel)
        if alone or not world_size:
            raise ConfigError(
                f"train.sequence_parallel is {self.train.sequence_parallel}, which does not divide the number of "
                "ranks: change one of the two"
            )
        samples_at_once = self.train.micro_batch_samples * world_size
        count, rest = divmod(self.train.global_batch_samples, samples_at_once)
        if rest or not count:
            raise ConfigError(
                f"train.global_batch_samples {self.train.global_batch_samples} is not a multiple of "
                f"train.micro_batch_samples {self.train.micro_batch_samples} x {world_size} ranks = {samples_at_once}: "
                f"change one of the three: {_fitting_batches(self.train, world_size)}"
            )
        return count


def _fitting_batches(train: Train, world_size: int) -> str:
    """Return the values next to the configured ones with which global batch, micro-batch and ranks fit."""
    total, micro = train.global_batch_samples, train.micro_batch_samples
    below = total // (micro * world_size) * micro * world_size
    fitting = {
        "train.global_batch_samples={}": _neighbours([below, below + micro * world_size], total),
        "train.micro_batch_samples={}": _neighbours(_divisors(total, world_size), micro),
        "{} ranks": _neighbours(_divisors(total, micro), world_size),
    }
    return "; ".join(words.format(values) for words, values in fitting.items() if values)


def _divisors(total: int, factor: int) -> list[int]:
    """Return the numbers whose product with `factor` divides `total`, in rising order; [] if `factor` does not."""
    quotient, rest = divmod(total, factor)
    return [] if rest else [number for number in range(1, quotient + 1) if quotient % number == 0]


def _neighbours(numbers: Sequence[int], value: int) -> str:
    """Return the last positive number below `value` and the first above it, joined by "or"; "" if there is neither."""
    below = [number for number in numbers if 0 < number < value][-1:]
    return " or ".join(map(str, below + [number for number in numbers if number > value][:1]))


_MAX_INTERVAL_STEPS = 2**40


def interval_steps(mixture: Mixture, interval: int) -> int:
    """Return K_t, the number of optimizer steps in interval t (from 0).

    K_t = max(1, round(interval_steps * interval_growth^t)), and at most 2^40.
    """
    try:
        exact = mixture.interval_steps * mixture.interval_growth**interval
    except OverflowError:
        exact = math.inf
    return max(1, round(min(exact, _MAX_INTERVAL_STEPS)))


def interval_ends(mixture: Mixture, total_steps: int) -> list[int]:
    """Return the steps after which a run of `total_steps` steps measures its student, in ascending order."""
    ends = [min(interval_steps(mixture, 0), total_steps)]
    while ends[-1] < total_steps:
        ends.append(min(ends[-1] + interval_steps(mixture, len(ends)), total_steps))
    return ends


def corpus_samples(mixture: Mixture, sizes: Mapping[str, int]) -> int:
    """Return the number of training samples in all domains that `mixture.exclude` does not name.

    `sizes` holds the number of training samples of every domain, excluded ones too.
    """
    return sum(int(size) for name, size in sizes.items() if name not in mixture.exclude)


def total_steps(config: Config, corpus_samples: int) -> int:
    """Return the largest number of optimizer steps that the run can have.

    The learning rate reaches its minimum at that step. `stop.discrepancy`, a domain at its limit or a guard can end the
    run earlier. `corpus_samples` is the number of training samples in the data, which `stop.data_once` needs.
    """
    ends = []
    if config.stop.steps is not None:
        ends.append(config.stop.steps)
    if config.stop.intervals is not None:
        ends.append(sum(interval_steps(config.mixture, t) for t in range(config.stop.intervals)))
    if config.stop.data_once:
        steps = interval = 0
        while steps * config.train.global_batch_samples < corpus_samples:
            steps += interval_steps(config.mixture, interval)
            interval += 1
        ends.append(steps)
    return min(ends)


def total_steps_without_data(config: Config) -> int:
    """Return the largest number of steps by `stop.steps` and `stop.intervals`, one of which is set."""
    return total_steps(config.model_copy(update={"stop": config.stop.model_copy(update={"data_once": False})}), 0)
