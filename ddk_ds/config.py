"""The run's configuration: typed, frozen and strict. Every default is the paper's method (arXiv 2407.16154).

A wrong key, type or combination is a `ConfigError` that names the key, the value and the fix, and comes before
anything expensive. Nothing is silently rewritten: what `--print-config` shows is what runs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from ddk_ds.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Controller = Literal["ddk", "ddk_no_smoothing", "equal", "by_size", "static"]


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """A Hugging Face causal language model."""

    path: str
    """Directory or hub name of the model: config.json, safetensors weights, tokenizer."""
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention kernel that transformers is asked for."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded parameters rest between uses."""
    leaf_modules: tuple[str, ...] = ()
    """Class names that ZeRO-3 gathers as one (mixture-of-experts blocks)."""


class Student(Model):
    """The model in training."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more student compute."""


class Data(Section):
    """Per-domain MDS shards made by tools/prepare_data.py."""

    path: str
    """Directory that holds domains.json and one directory per domain."""
    domains: tuple[str, ...] | None = None
    """Domains to train on, in the order of reports; null: all that the data has."""
    sequence_length: Positive = 2048
    """Tokens of a training sample; must be the shards' own."""
    validation_samples: Positive = 500
    """Held-out samples a domain that perplexities are measured on (the paper: 500)."""
    num_workers: Natural = 0
    """Processes that read ahead, per rank; 0 reads in the training process."""


class Mixture(Section):
    """How the proportions of the domains are decided."""

    controller: Controller = "ddk"
    """ddk (Eq. 1, 2); ddk_no_smoothing (Eq. 1 each interval); equal; by_size (tokens of the domain); static."""
    alpha: Fraction = 0.5
    """Smoothing coefficient of Eq. 2; every domain keeps at least (1 - alpha) / N from the second interval on."""
    interval_steps: Positive = 1000
    """K: optimizer steps between two measurements."""
    proportions: dict[str, NonNegativeFloat] | None = None
    """Proportion by domain for `controller: static`; they must sum to 1."""
    ratio_cap: PositiveFloat | None = None
    """Largest perplexity ratio that enters exp() in Eq. 1 and 2; null: none, as published."""
    initial_floor: Fraction = 0.0
    """Least proportion of a domain in the first interval; 0: none, as published."""


class Loss(Section):
    """Eq. 3: cross-entropy + gamma * KL(teacher || student)."""

    gamma: NonNegativeFloat = 0.2
    """Weight of the divergence."""
    temperature: PositiveFloat = 1.0
    """Temperature of both softmaxes in the divergence, which is scaled by its square."""
    chunk_tokens: Positive = 256
    """Tokens whose logits are held at a time: chunk_tokens x vocabulary x 4 bytes for each model."""


class Optimizer(Section):
    """AdamW with linear warm-up from 0 and cosine decay to a floor."""

    learning_rate: PositiveFloat = 3e-5
    """Peak learning rate."""
    min_learning_rate: NonNegativeFloat = 3e-6
    """Learning rate at the end of the cosine."""
    warmup_steps: Natural = 1000
    """Steps of linear warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; never on norms and biases (tensors of one axis)."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's states rest."""

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Optimizer:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}: lower it"
            )
        return self


class Train(Section):
    """Batches and numbers of a step."""

    global_batch_samples: Positive = 256
    """Samples of one optimizer step over all ranks (256 x 2,048 tokens: the paper's 0.5 M)."""
    micro_batch_samples: Positive = 1
    """Samples of one forward pass on one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype; master weights, optimizer and gradient accumulation are float32 in both."""
    nvme_path: str | None = None
    """Directory on a fast local disk for anything that is offloaded to nvme."""


class Stop(Section):
    """When the run ends: at the first of these that comes."""

    steps: Positive | None = None
    """Optimizer steps."""
    intervals: Positive | None = None
    """Distillation intervals."""
    data_once: bool = False
    """End with the interval in which the samples drawn reach the number of samples in the corpus."""
    discrepancy: NonNegativeFloat | None = None
    """End when max over domains of (student perplexity / teacher perplexity - 1) is under this."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Stop:
        if self.steps is None and self.intervals is None and not self.data_once:
            raise ValueError(
                "no end is set: give steps, intervals or data_once: true (discrepancy alone may never come)"
            )
        return self


class Checkpoint(Section):
    """Sharded checkpoints in <output_dir>/<name>/checkpoints."""

    every_steps: Positive = 500
    """Steps between two checkpoints; one more is written at the end."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of this run; never: refuse a directory that has any."""


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run, and of its directory."""
    output_dir: str = "runs"
    """Directory that holds the runs' directories."""
    seed: Natural = 0
    """Seed of the data order and of dropout."""
    method: Literal["ddk", "cpt"] = "ddk"
    """ddk: distillation from a teacher (Eq. 3); cpt: cross-entropy alone, without a teacher."""
    student: Student
    """The model in training."""
    teacher: Model | None = None
    """The frozen model; needed by `method: ddk`."""
    data: Data
    mixture: Mixture = Mixture()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    stop: Stop
    checkpoint: Checkpoint = Checkpoint()
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys, merged into the dictionary made from the rest; contradictions are errors."""

    @property
    def run_dir(self) -> Path:
        """Directory of this run."""
        return Path(self.output_dir) / self.name

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if self.method == "ddk" and self.teacher is None:
            raise ValueError("method: ddk needs a teacher: set teacher.path, or method: cpt")
        if self.method == "cpt" and self.teacher is not None:
            raise ValueError("method: cpt takes no teacher: remove teacher, or set method: ddk")
        if self.method == "cpt" and self.mixture.controller.startswith("ddk"):
            raise ValueError(
                f"mixture.controller: {self.mixture.controller} compares with a teacher, which method: cpt has not: "
                "set mixture.controller to by_size, equal or static"
            )
        if (self.mixture.controller == "static") != (self.mixture.proportions is not None):
            raise ValueError("mixture.proportions goes with mixture.controller: static, and only with it")
        if self.stop.discrepancy is not None and self.teacher is None:
            raise ValueError("stop.discrepancy compares with a teacher, which method: cpt has not: remove it")
        uses_nvme = "nvme" in (self.optimizer.offload, self.student.offload_params) or (
            self.teacher is not None and self.teacher.offload_params == "nvme"
        )
        if uses_nvme and self.train.nvme_path is None:
            raise ValueError("something is offloaded to nvme: set train.nvme_path to a directory on a local disk")
        if self.data.domains is not None and len(set(self.data.domains)) != len(self.data.domains):
            raise ValueError(f"data.domains names a domain twice: {', '.join(self.data.domains)}")
        return self

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches a rank runs in one optimizer step on `world_size` ranks; ConfigError if they do not divide."""
        per_pass = self.train.micro_batch_samples * world_size
        count, rest = divmod(self.train.global_batch_samples, per_pass)
        if rest or not count:
            raise ConfigError(
                f"train.global_batch_samples {self.train.global_batch_samples} is not a multiple of "
                f"train.micro_batch_samples {self.train.micro_batch_samples} x {world_size} ranks = {per_pass}: "
                "change one of the three"
            )
        return count


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, and validate.

    Raises ConfigError naming each wrong key, its value and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: there is no such file")
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise ConfigError(f"override {item!r}: write it as key.path=value, for example train.micro_batch_samples=2")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML with the overrides given: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, expected keys and values")
    return make_config({str(key): value for key, value in values.items()}, str(path))


def make_config(values: dict[str, Any], source: str) -> Config:
    """Validate plain nested values; `source` is named in errors."""
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _tuples(value: Any) -> Any:
    # YAML has lists only, strict tuple fields want tuples: convert, except under the free-form DeepSpeed keys.
    if isinstance(value, dict):
        return {key: item if key == "deepspeed" else _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key, {hint}"
    if item["type"] == "missing":
        return f"{where}: is required, set it"
    if item["type"] == "value_error":
        return (f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ")
    return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _known_keys(loc: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = Config
    for part in loc:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
