"""The sections of a run's configuration. Every default is the paper's method (arXiv 2407.16154).

Sections `student` and `teacher`.

Section `monitor`: where a run's numbers go beside its ledger.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
Divergence = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]
ExhaustionPolicy = Literal["cycle", "cap", "stop"]
ControllerKind = Literal[
    "ddk", "ddk_no_smoothing", "equal", "by_size", "static", "schedule", "sheared_llama", "doremi_online"
]
_MEASURING = ("ddk", "ddk_no_smoothing", "sheared_llama", "doremi_online")
# The controllers that use an option. alpha, ratio_cap and initial_floor are not here: they can stay in a configuration
# of DDK whose controller is overridden, so that an ablation is one override.
_CONTROLLERS_WITH: dict[str, tuple[str, ...]] = {
    "proportions": ("static",),
    "schedule_file": ("schedule",),
    "initial": ("ddk",),
    "prior": ("ddk", "sheared_llama", "doremi_online"),
    "reference_losses": ("sheared_llama", "doremi_online"),
    "step_size": ("doremi_online",),
    "smoothing": ("doremi_online",),
    "ppl_smoothing": _MEASURING,
    "floors": (*_MEASURING, "by_size"),
}


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Data(Section):
    """Per-domain MDS shards made by tools/prepare_data.py."""

    path: str
    """Directory that holds domains.json and one directory per domain; or a remote one (s3://, gs://, az://, hf://)."""
    cache_dir: str | None = None
    """Directory on a node's own disk that keeps fetched shards of a remote `path`; null: `path` is read in place."""
    cache_limit_gb: PositiveFloat | None = None
    """Most that the cache may hold, at least 4 shards; null: no limit."""
    download_timeout_s: PositiveFloat = 60.0
    """Seconds that one attempt to fetch a shard may take."""
    download_retries: Natural = 4
    """Further attempts after one that failed, with growing pauses."""
    domains: tuple[str, ...] | None = None
    """Domains to train on, in the order of reports; null: all that the data has."""
    sequence_length: Positive = 2048
    """Tokens of a training sample; must be the shards' own."""
    validation_samples: Positive = 500
    """Held-out samples a domain that perplexities are measured on (the paper: 500)."""
    num_workers: Natural = 0
    """Processes that read ahead, per rank; 0 reads in the training process."""

    @model_validator(mode="after")
    def _cache_goes_with_a_remote(self) -> Data:
        if self.cache_dir is None and "://" in self.path:
            raise ValueError(f"path {self.path} is remote: give cache_dir, a directory on each node's own disk")
        if self.cache_dir is None and self.cache_limit_gb is not None:
            raise ValueError(
                f"cache_limit_gb {self.cache_limit_gb:g} without cache_dir: path is read in place and nothing is ever "
                "removed from it; leave it out, or give cache_dir"
            )
        return self


class Mixture(Section):
    """How the proportions of the domains are decided."""

    controller: ControllerKind = "ddk"
    """ddk (Eq. 1, 2); ddk_no_smoothing (Eq. 1 each interval); equal; by_size (tokens of the domain); static; schedule;
    sheared_llama; doremi_online. docs/methods.md has their formulas and sources."""
    alpha: Fraction = 0.5
    """Smoothing coefficient of Eq. 2; every domain keeps at least (1 - alpha) / N from the second interval on."""
    interval_steps: Positive = 1000
    """K: optimizer steps between two measurements."""
    interval_growth: PositiveFloat = 1.0
    """Interval t (from 0) has max(1, round(interval_steps * interval_growth^t)) steps; 1: all have K."""
    proportions: dict[str, NonNegativeFloat] | None = None
    """Proportion by domain for `controller: static`; they must sum to 1."""
    schedule_file: str | None = None
    """YAML file for `controller: schedule`: a list of {from_interval: 0, proportions: {domain: proportion}}."""
    exclude: tuple[str, ...] = ()
    """Domains that are measured and never drawn, under any controller."""
    floors: dict[str, Fraction] = Field(default_factory=dict)
    """Least proportion by domain, in every interval."""
    ppl_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Weight of the past in the moving average of the student's log perplexities that decides; 0: none."""
    prior: Literal["equal", "by_size"] | dict[str, NonNegativeFloat] = "equal"
    """In place of 1/N in Eq. 2; sheared_llama and doremi_online begin with it: equal, by_size, or by domain."""
    initial: Literal["eq1", "equal"] = "eq1"
    """First interval of `controller: ddk`: by Eq. 1, or of equal proportions."""
    ratio_cap: PositiveFloat | None = None
    """Largest perplexity ratio that enters exp() in Eq. 1 and 2; null: none, as published."""
    initial_floor: Fraction = 0.0
    """Least proportion of a domain in the first interval; 0: none, as published."""
    reference_losses: dict[str, NonNegativeFloat] | None = None
    """Loss by domain, in nats a token, that sheared_llama and doremi_online compare with; null: the teacher's."""
    step_size: NonNegativeFloat = 1.0
    """eta of doremi_online."""
    smoothing: Fraction = 1e-3
    """c of doremi_online: share of equal proportions in every update."""
    exhaustion: ExhaustionPolicy = "cycle"
    """cycle (pass after pass); cap (at its limit the others get a domain's share); stop (there the run ends)."""
    exhaustion_by_domain: dict[str, ExhaustionPolicy] = Field(default_factory=dict)
    """Policy of single domains in place of `exhaustion`."""
    max_passes: PositiveFloat | None = None
    """Limit of each domain with cap or stop, in passes over its samples; null: one pass, with stop alone."""

    @model_validator(mode="after")
    def _options_go_with_the_controller(self) -> Mixture:
        for option, controllers in _CONTROLLERS_WITH.items():
            value = getattr(self, option)
            if self.controller not in controllers and value != type(self).model_fields[option].get_default(
                call_default_factory=True
            ):
                raise ValueError(
                    f"{option} is {value}, which controller: {self.controller} does not use: remove it, or set "
                    f"mixture.controller to {' or '.join(controllers)}"
                )
        if self.controller == "static" and self.proportions is None:
            raise ValueError("controller: static needs proportions: give one for each domain, with the sum 1")
        if self.controller == "schedule" and self.schedule_file is None:
            raise ValueError("controller: schedule needs schedule_file: set it to a YAML file of proportions")
        if self.initial == "equal" and self.initial_floor:
            raise ValueError(f"initial_floor is {self.initial_floor:g}, which initial: equal does not use: remove it")
        return self

    @model_validator(mode="after")
    def _limit_goes_with_policies(self) -> Mixture:
        used = {self.exhaustion, *self.exhaustion_by_domain.values()}
        if "cap" in used and self.max_passes is None:
            raise ValueError("exhaustion: cap needs a limit: set mixture.max_passes, for example 4")
        if used == {"cycle"} and self.max_passes is not None:
            raise ValueError(
                f"max_passes is {self.max_passes:g}, but every domain cycles: set mixture.exhaustion to cap or stop, "
                "or remove it"
            )
        return self


class Loss(Section):
    """Eq. 3: cross-entropy + gamma * T^2 * divergence of the teacher from the student."""

    gamma: NonNegativeFloat = 0.2
    """Weight of the divergence."""
    gamma_end: NonNegativeFloat | None = None
    """Weight at the run's end, to which it changes by equal amounts a step; null: it stays."""
    temperature: PositiveFloat = 1.0
    """Temperature of both softmaxes in the divergence, which is scaled by its square."""
    temperature_end: PositiveFloat | None = None
    """Temperature at the run's end, to which it changes by equal amounts a step; null: it stays."""
    divergence: Divergence = "forward_kl"
    """forward_kl (Eq. 3); reverse_kl; jensen_shannon; skew_forward_kl; skew_reverse_kl; total_variation."""
    coefficient: OpenFraction = 0.5
    """beta of jensen_shannon (the teacher's weight in the mixture), alpha of the skewed divergences."""
    logits_dtype: Literal["float32", "model"] = "float32"
    """model: logits rounded to the training precision; faster on some CPUs, gradients useless near the teacher."""
    chunk_tokens: Positive | None = None
    """Tokens whose logits are held at a time, x vocabulary x 4 bytes for each model; null: by vocabulary and device."""


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
    fused: bool = True
    """torch's AdamW in one pass over the states, on GPU and CPU; false: an operation at a time."""

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
    keep_last: Positive = 3
    """Newest checkpoints that are kept; an older one goes only when the next is complete."""
    keep_every_steps: Positive | None = None
    """Checkpoints whose step is a multiple of this are kept for good; null: none is."""
    in_background: bool = True
    """Write while training goes on, from a copy in the host's memory (14 bytes a parameter, over all ranks)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of this run; never: refuse a directory that has any."""


class Guard(Section):
    """When a run whose numbers have gone wrong stops, instead of spending its time."""

    max_skipped_steps: Natural = 5
    """Steps in a row whose loss or gradient is not finite; each leaves the weights as they were. One more stops."""
    spike_deviations: NonNegativeFloat = 20.0
    """Robust standard deviations above the median of the last 64 steps from which a loss is a spike; 0: none is."""
    spike_steps: Positive = 3
    """Spikes in a row that stop the run."""
    roll_backs: Natural = 0
    """Times that the run, instead of stopping, goes back to its last checkpoint and leaves out the samples since."""
    least_entropy: Fraction = 0.5
    """Entropy of the proportions, as a share of equal ones', under which the mixture raises an alarm; 0: none does."""
    rising_intervals: Natural = 3
    """Intervals in a row with a higher ratio to the teacher after which a domain raises an alarm; 0: none does."""


class Limits(Section):
    """Seconds after which a rank that waits writes its stacks to <run>/stacks and ends the job; 0: never."""

    step_s: NonNegativeFloat = 1800.0
    """One optimizer step, its data included."""
    evaluation_s: NonNegativeFloat = 7200.0
    """Perplexities of one model on all domains, and the decision that follows."""
    checkpoint_s: NonNegativeFloat = 3600.0
    """Writing one checkpoint."""
    export_s: NonNegativeFloat = 7200.0
    """Writing the student at the end."""


class Model(Section):
    """A Hugging Face causal language model."""

    path: str
    """Directory or hub name of the model: config.json, safetensors weights, tokenizer."""
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention kernel that transformers is asked for."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded parameters rest between uses."""
    trust_remote_code: bool = False
    """Run the Python code that the model's directory brings along; only for code that you have read."""
    whole_layers: bool = True
    """Gather a layer's weights as one: a hook for each layer in place of one for each of its parts; false: as
    DeepSpeed does by itself."""
    leaf_modules: tuple[str, ...] = ()
    """Further class names that ZeRO-3 gathers as one (mixture-of-experts blocks, where layers are not)."""
    compile_layers: bool = False
    """torch.compile of each layer: norms, rotary positions and gates become one kernel each; the first step takes
    longer, once a model."""

    @model_validator(mode="after")
    def _layers_agree(self) -> Model:
        if self.compile_layers and not self.whole_layers:
            raise ValueError("compile_layers takes a layer's weights gathered as one: set whole_layers to true")
        return self


class Student(Model):
    """The model in training."""

    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass: less memory, about a third more student compute; selective: all but
    the results of matrix products and of attention, which costs little."""


class Teacher(Model):
    """The frozen model. Where and how its weights are gathered changes no number of the run."""

    shard_within: Literal["world", "node", "gpu"] = "world"
    """Ranks that hold one copy of the weights between them: all; those of a node, so that gathers stay in it; each."""
    micro_batches_per_pass: Positive | Literal["auto"] = 1
    """Micro-batches whose hidden states one pass computes, layer by layer: each gather of a weight serves them all;
    auto: as many as memory holds by preflight's estimate."""
    quantize: Literal["none", "int8"] = "none"
    """Weights of its layers in 8 bits, a scale by row: half the memory and half the bytes of a gather in bf16, and
    other numbers, the perplexities that it is measured by too (docs/planning.md)."""

    @model_validator(mode="after")
    def _passes_agree(self) -> Teacher:
        if self.micro_batches_per_pass != 1 and not self.whole_layers:
            raise ValueError("micro_batches_per_pass goes layer by layer: set whole_layers to true")
        return self

    @property
    def per_pass(self) -> int:
        """Micro-batches of a pass; 1 while `auto` is not settled (train/teacher_passes.py)."""
        return 1 if self.micro_batches_per_pass == "auto" else self.micro_batches_per_pass


class Monitor(Section):
    """Where numbers go beside the ledger, everywhere under the same names (docs/monitoring.md has them)."""

    tensorboard: bool = False
    """Event files for TensorBoard, in <run>/monitor/tensorboard."""
    csv: bool = False
    """A file of step and value for each name, in <run>/monitor/csv."""
    wandb_project: str | None = None
    """Project of Weights & Biases; null: none. With WANDB_MODE=offline the run is kept in <run>/monitor/wandb."""
    wandb_entity: str | None = None
    """User or team that has the project; null: the login's own."""
    prometheus_file: str | None = None
    """File <directory>/<name>.prom with the newest values, for node_exporter's textfile collector; null: none."""
    every_s: NonNegativeFloat = 5.0
    """Seconds between two writes, which a thread does; what comes meanwhile is written together."""

    @model_validator(mode="after")
    def _fit(self) -> Monitor:
        if self.wandb_entity is not None and self.wandb_project is None:
            raise ValueError(f"wandb_entity is {self.wandb_entity}: set wandb_project too, or remove it")
        if self.prometheus_file is not None and not self.prometheus_file.endswith(".prom"):
            raise ValueError(f"prometheus_file is {self.prometheus_file}: the collector reads files named *.prom alone")
        return self

    @property
    def packages(self) -> tuple[str, ...]:
        """Python packages that the choice needs, as they are imported."""
        needed = {
            "tensorboard": self.tensorboard,
            "wandb": self.wandb_project is not None,
            "prometheus_client": self.prometheus_file is not None,
        }
        return tuple(name for name, used in needed.items() if used)
