"""Checks of everything that can be checked before a model is loaded; the run uses the objects that they return."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Config, Model
from ddk_ds.config.optimizer import check_schedule
from ddk_ds.config.run_config import corpus_samples, interval_ends, interval_steps, total_steps
from ddk_ds.config.sections import Teacher
from ddk_ds.data.cache import open_store
from ddk_ds.data.manifest import Manifest, load_manifest
from ddk_ds.data.same_cuts import LARGEST_SHARE, cut_differently, prepared_with
from ddk_ds.data.shared_vocabulary import SharedVocabulary, base_fingerprint, check_use, shared_vocabulary
from ddk_ds.data.store import Store
from ddk_ds.data.tokenizer import TokenizerInfo, load_tokenizer
from ddk_ds.engine.attention import Attention, check_apart, choose_attention
from ddk_ds.engine.ds_config import student_ds_config
from ddk_ds.engine.eight_bits import skipped_layers
from ddk_ds.engine.filters import FilterShape, check_filters, filter_shape
from ddk_ds.engine.model_files import ModelFiles, check_code, model_directory, read_model
from ddk_ds.engine.sequence_parallel import check_sequence_parallel
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller
from ddk_ds.mixture.domain_vectors import check_domains
from ddk_ds.mixture.exhaustion import Exhaustion, make_exhaustion
from ddk_ds.mixture.loss_weights import make_loss_weights
from ddk_ds.train.interval import read_schedule
from ddk_ds.train.samples import Prompts, given_prompts


class TeacherOf(NamedTuple):
    """The teacher of a domain: hash of its content, and its attention kernel."""

    fingerprint: str
    attention: str


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of a run: data, tokenizer, model files, controller."""

    names: list[str]
    store: Store
    manifest: Manifest
    tokenizer: TokenizerInfo
    vocabulary: SharedVocabulary
    student: ModelFiles
    teacher: ModelFiles | None
    controller: Controller
    exhaustion: Exhaustion
    loss_weights: tuple[float, ...] | None
    """(N,) weights of the domains in the loss; None without `mixture.loss_weights`."""
    attention: dict[str, Attention]
    """The attention kernels of student and teacher, by these names."""
    filters: FilterShape | None = None
    """Matched layers of TED; None for other methods."""
    filters_hash: str | None = None
    """Hash of the file `ted.filters`; None for other methods than ted."""
    schedule: Any = None
    """Content of the file `mixture.schedule_file`; None without one."""
    masked: bool = False
    """True if the documents of a sample do not see each other (`data.documents`)."""
    cut_differently: float = 0.0
    """Share of a probe text's tokens that the teacher's tokenizer cuts differently from the student's."""
    prompts: Prompts = field(default_factory=dict)
    """Prompts of `monitor.sample_prompts`; {} if they come from held-out samples."""
    by_domain: dict[str, TeacherOf] = field(default_factory=dict)
    """The teachers of `teacher.by_domain`."""

    def teacher_of(self, name: str) -> TeacherOf:
        """Return the teacher of a domain of a run that has one."""
        assert self.teacher is not None
        return self.by_domain.get(name) or TeacherOf(self.teacher.fingerprint, self.attention["teacher"].kernel)

    @property
    def teachers(self) -> dict[str, str]:
        """Return each domain's teacher as one text, for a cache of what they say."""
        return {name: " ".join(self.teacher_of(name)) for name in self.names}

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Return hashes of models, tokenizer, shards and files, on which the run's numbers depend."""
        return {
            "student": self.student.fingerprint,
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "left_out": list(self.vocabulary.left_out) or None,
            "attention": {name: attention.kernel for name, attention in self.attention.items()},
            "domains": {name: self.manifest.domains[name].fingerprint for name in self.names},
            "filters": self.filters_hash,
            "schedule": self.controller.state_dict().get("stages"),
            "by_domain": {name: " ".join(teacher) for name, teacher in self.by_domain.items()} or None,
            "documents": "masked" if self.masked else None,  # None as in runs of before, which joined them
        }

    @property
    def mixture(self) -> dict[str, Any]:
        """Return the inputs of the controller as plain JSON, for the run's events; `ddk replay` reads them."""
        tokens = {name: self.manifest.domains[name].train.tokens for name in self.names}
        return {"train_tokens": tokens, "schedule": self.schedule}

    @property
    def notes(self) -> list[str]:
        """Return what is said once at the start: attention kernels that were chosen, tokens left out, documents."""
        apart = "data.documents: the documents of a sample do not see each other" if self.masked else ""
        notes = [*(attention.note for attention in self.attention.values()), self.vocabulary.note, apart]
        return [note for note in notes if note]


def check_inputs(config: Config, comm: Comm) -> Inputs:
    """Check configuration, batches, data, tokenizers and model files against one another; return them. Collective.

    Raises ConfigError or DataError on every rank, with the key or file, the value and the fix.
    """
    call_together(comm, config.check_paths)
    student = model_directory(config.student.path, "student.path", comm, config.path_note("student.path"))
    teacher = None
    if config.teacher is not None:
        teacher = model_directory(config.teacher.path, "teacher.path", comm, config.path_note("teacher.path"))
    others = {
        name: model_directory(path, (key := f"teacher.by_domain.{name}"), comm, config.path_note(key))
        for name, path in ((config.teacher and config.teacher.by_domain) or {}).items()
    }
    call_together(comm, lambda: _check_packages(config))
    return call_together(comm, lambda: check_files(config, student, teacher, comm.world_size, others))


def check_files(
    config: Config,
    student_path: Path,
    teacher_path: Path | None,
    world_size: int,
    by_domain: Mapping[str, Path] = {},
) -> Inputs:
    """Check what `check_inputs` checks, except this machine's packages, for models in these directories; return it.

    Not collective. Raises ConfigError or DataError, with the key or file, the value and the fix.
    """
    student_ds_config(config, world_size)
    store = open_store(config.data)
    manifest = load_manifest(store)
    names = _check_data(config, manifest)
    masked = manifest.masked(config.data.documents, "data.documents")
    exhaustion = _check_exhaustion(config, manifest, names)
    student = read_model(student_path, "student.path")
    teacher = None if teacher_path is None else read_model(teacher_path, "teacher.path")
    tokenizer = load_tokenizer(student.directory)
    theirs = None if teacher is None else load_tokenizer(teacher.directory)
    _check_data_tokenizer(config, manifest, student, tokenizer, theirs)
    attention = {}
    for key, model, files in (("student", config.student, student), ("teacher", config.teacher, teacher)):
        if model is not None and files is not None:
            attention[key] = _check_model(config, key, model, files, masked=masked)
    pair = f"student.path {student.directory}" + ("" if teacher is None else f" and teacher.path {teacher.directory}")
    vocabulary = shared_vocabulary(tokenizer, student.vocab_rows, theirs, pair)
    check_use(vocabulary, manifest, names)
    different = 0.0 if theirs is None else _check_cuts(config, tokenizer, theirs, pair)
    schedule = read_schedule(config.mixture.schedule_file)
    train_tokens = {name: manifest.domains[name].train.tokens for name in names}
    controller = make_controller(config.mixture, train_tokens, schedule)
    filters, filters_hash = None, None
    if teacher is not None and config.preset.filters is not None:
        filters = filter_shape(config, student, teacher)
        if config.preset.filters == "loaded":
            filters_hash = check_filters(Path(str(config.ted.filters)), filters)
    return Inputs(
        names=names,
        store=store,
        manifest=manifest,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        student=student,
        teacher=teacher,
        controller=controller,
        exhaustion=exhaustion,
        loss_weights=_loss_weights(config, manifest, names, controller),
        attention=attention,
        filters=filters,
        filters_hash=filters_hash,
        schedule=schedule,
        masked=masked,
        cut_differently=different,
        prompts=given_prompts(config, tokenizer, manifest.bos),
        by_domain=_check_others(config, by_domain, manifest, student, tokenizer, vocabulary, masked=masked),
    )


def _check_others(
    config: Config,
    directories: Mapping[str, Path],
    manifest: Manifest,
    student: ModelFiles,
    tokenizer: TokenizerInfo,
    vocabulary: SharedVocabulary,
    *,
    masked: bool,
) -> dict[str, TeacherOf]:
    """Check the teachers of `teacher.by_domain` as that of `teacher.path`, whose tokenizer they must have."""
    check_domains(directories, list(manifest.domains), label="teacher.by_domain")
    found = {}
    for name, directory in directories.items():
        key = f"teacher.by_domain.{name}"
        assert config.teacher is not None
        files, theirs = read_model(directory, key), load_tokenizer(directory)
        attention = _check_model(config, key, config.teacher, files, masked=masked)
        pair = f"student.path {student.directory} and {key} {directory}"
        if shared_vocabulary(tokenizer, student.vocab_rows, theirs, pair) != vocabulary:
            raise ConfigError(f"{key} {directory}: its tokenizer has other added tokens than that of teacher.path")
        _check_cuts(config, tokenizer, theirs, pair)
        found[name] = TeacherOf(files.fingerprint, attention.kernel)
    return found


def _check_packages(config: Config) -> None:
    for key, model in (("student", config.student), ("teacher", config.teacher)):
        flash = model is not None and model.attn_implementation == "flash_attention_2"
        if flash and importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                f"{key}.attn_implementation is flash_attention_2, but flash_attn is not installed: use sdpa"
            )
    missing = [name for name in config.monitor.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"section monitor needs what is not installed: {', '.join(missing)}; pip install -e '.[monitor]', or "
            "leave it out"
        )


def _check_data(config: Config, manifest: Manifest) -> list[str]:
    names = list(manifest.domains) if config.data.domains is None else list(config.data.domains)
    manifest.require(names)
    if manifest.sequence_length != config.data.sequence_length:
        raise DataError(
            f"data.sequence_length is {config.data.sequence_length}, the shards of {manifest.root} have "
            f"{manifest.sequence_length}: set it to that, or prepare the data again"
        )
    for name in names:
        held_out = manifest.domains[name].validation.samples
        if held_out < config.data.validation_samples:
            raise DataError(
                f"domain {name!r} of {manifest.root} has {held_out} validation samples, data.validation_samples asks "
                f"for {config.data.validation_samples}: lower it, or prepare the data again with more"
            )
    return names


def _loss_weights(
    config: Config, manifest: Manifest, names: list[str], controller: Controller
) -> tuple[float, ...] | None:
    """Return `Inputs.loss_weights`, checked against each interval that the run can have; the last can be shorter."""
    of_names = {name: manifest.domains[name].train for name in names}
    samples = corpus_samples(config.mixture, {name: split.samples for name, split in of_names.items()})
    ends = interval_ends(config.mixture, total_steps(config, samples))
    of_intervals = [(end - begin) * config.train.global_batch_samples for begin, end in pairwise([0, *ends])]
    tokens = {name: split.tokens for name, split in of_names.items()}
    return make_loss_weights(config.mixture, tokens, controller, of_intervals)


def _check_exhaustion(config: Config, manifest: Manifest, names: list[str]) -> Exhaustion:
    mixture = config.mixture
    sizes = {name: manifest.domains[name].train.samples for name in names}
    exhaustion = make_exhaustion(mixture, sizes)
    total = total_steps(config, corpus_samples(mixture, sizes))
    try:
        check_schedule(config.optimizer, total)
    except ValueError as error:
        raise ConfigError(f"{config.data.path}: {error}") from error
    steps = min(interval_steps(mixture, 0), total)
    exhaustion.check_first(steps * config.train.global_batch_samples, mixture.exclude)
    return exhaustion


def _check_model(config: Config, key: str, model: Model, files: ModelFiles, *, masked: bool) -> Attention:
    """Return the model's attention kernel, if the run can use the model."""
    check_code(files, key, trusted=model.trust_remote_code)
    if isinstance(model, Teacher):
        skipped_layers(model, files.num_layers)
    positions = files.config.get("max_position_embeddings") or files.config.get("n_positions")
    if positions is not None and positions < config.data.sequence_length:
        raise ConfigError(
            f"data.sequence_length is {config.data.sequence_length}, {key}.path {files.directory} has {positions} "
            "positions: prepare the data with shorter samples, or choose another model"
        )
    attention = choose_attention(files.config, files.directory, key, model)
    if masked:
        check_apart(files.config, files.directory, key, model)
    check_sequence_parallel(files.config, key, attention.kernel, config.train.sequence_parallel, masked=masked)
    return attention


def _check_data_tokenizer(
    config: Config, manifest: Manifest, student: ModelFiles, ours: TokenizerInfo, theirs: TokenizerInfo | None
) -> None:
    """Check that the data were prepared with the student's tokenizer, or the teacher's if that only has more tokens."""
    used = ours
    if theirs is not None and manifest.vocab_size > ours.vocab_size:
        used = theirs if base_fingerprint(theirs, ours.vocab_size) == ours.fingerprint else ours
    if base_fingerprint(used, manifest.vocab_size) != manifest.tokenizer_fingerprint:
        raise DataError(
            f"data.path: {manifest.root} was tokenised with another tokenizer ({manifest.tokenizer_fingerprint[:12]}) "
            f"than that of student.path {student.directory} ({ours.fingerprint[:12]}); prepare the data with it"
        )
    if not prepared_with(manifest, used) and not config.data.allow_other_cuts:
        raise DataError(
            f"data.path: {manifest.root} was tokenised with a tokenizer that has the vocabulary of student.path "
            f"{student.directory} and cuts text differently (other merges): prepare the data with the student's, or "
            "set data.allow_other_cuts"
        )


def _check_cuts(config: Config, ours: TokenizerInfo, theirs: TokenizerInfo, pair: str) -> float:
    """Return the share of a probe text's tokens that the teacher's tokenizer cuts differently from the student's."""
    different = cut_differently(ours, theirs)
    if different > LARGEST_SHARE and not config.data.allow_other_cuts:
        raise ConfigError(
            f"{pair}: their tokenizers have one vocabulary and cut {different:.1%} of a probe text's tokens "
            "differently (other merges), so the teacher would see text as it was never trained on: choose a pair that "
            "shares one tokenizer, or set data.allow_other_cuts"
        )
    return different
