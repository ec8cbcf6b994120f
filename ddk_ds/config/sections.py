"""The sections of a run's configuration. Every default is the paper's method (arXiv 2407.16154).

The docstrings of classes and fields are the text of docs/configuration.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddk_ds.config.paths import LocalPath, ModelPath, PromptsPath

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
Divergence = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]


FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
FileName = Annotated[str, Field(pattern=f"^{FILE_NAME}$")]
"""The name of a run or of a domain, which is also a directory's, on any file system and store."""
FILE_NAME_RULE = (
    "it names a directory: use letters a-z or A-Z, digits, . _ and -, beginning with a letter or digit; other letters "
    "have several spellings in Unicode, which stores and file systems tell apart, and are boxes in pictures"
)


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """A Hugging Face causal language model."""

    path: ModelPath
    """Directory or hub name of the model: config.json, safetensors weights, tokenizer."""
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention kernel that transformers uses. auto: sdpa, or eager for a model with something that sdpa leaves out,
    such as Gemma 2's soft cap; a kernel named here that leaves something out is an error."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Memory that holds the sharded parameters between uses; none: the device's own."""
    trust_remote_code: bool = False
    """Run the Python code in the model's directory; set it only for code that you have read."""
    whole_layers: bool = True
    """Gather all weights of a layer together, with one hook for each layer; false: one hook for each of its modules,
    which is DeepSpeed's default."""
    leaf_modules: tuple[str, ...] = ()
    """Names of further classes whose weights ZeRO-3 gathers together. Blocks of experts are gathered so in any
    case."""
    compile_layers: bool = False
    """Compile each layer with torch.compile: norms, rotary positions and gates become one kernel each. The first step
    of a model takes longer. A teacher with `shard_within: gpu` is compiled as a whole, on a GPU as a CUDA graph."""

    @model_validator(mode="after")
    def _layers_agree(self) -> Model:
        if self.compile_layers and not self.whole_layers:
            raise ValueError("compile_layers needs the weights of a layer gathered together: set whole_layers to true")
        return self


class Student(Model):
    """The model in training."""

    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass: less memory, about a third more compute for the student. selective:
    keep the results of matrix products and of attention and recompute the rest, which costs little."""
    offload_activations: Literal["none", "cpu"] = "none"
    """cpu: with `gradient_checkpointing: true`, the one activation that each layer keeps, its input, goes to the host
    and comes back in the backward pass, for samples so long that even these fill the GPU."""
    router_aux_loss: Literal["auto"] | NonNegativeFloat = "auto"
    """Weight of the routers' load-balancing loss in the training loss of a mixture-of-experts student. auto: the
    coefficient of its config.json, or none if its family is trained without one, as DeepSeek-V3 is; 0: none. The loss
    is transformers' own, and averaged over the step's micro-batches and ranks."""

    @model_validator(mode="after")
    def _offload_agrees(self) -> Student:
        if self.offload_activations != "none" and self.gradient_checkpointing is not True:
            kept = "all activations" if not self.gradient_checkpointing else "the results of matrix products"
            raise ValueError(
                f"offload_activations: {self.offload_activations} takes the inputs of layers to the host, and "
                f"gradient_checkpointing: {str(self.gradient_checkpointing).lower()} keeps {kept} on the device: set "
                "gradient_checkpointing to true, or offload_activations to none"
            )
        return self


class TeacherCache(Section):
    """A teacher's distributions, kept on the disk: they are computed once for all runs over the same samples."""

    path: LocalPath
    """Directory of the cache that all ranks see, or its address (s3://, gs://, oci://), which needs `data.cache_dir`.
    Several runs can use and fill it at the same time. Another teacher, other data or another temperature are
    refused."""
    mode: Literal["write_through", "read_only"] = "write_through"
    """write_through: samples that are not there go through the teacher and are written. read_only: the teacher is not
    loaded, and a sample that is not there is an error."""
    keep: Literal["sampled", "topk"] = "sampled"
    """sampled: tokens drawn from the teacher's softmax (RS-KD, arXiv 2503.16870), for the forward KL, whose gradient is
    right on average. topk: the likeliest tokens and all others as one, for every divergence; biased gradient."""
    draws: Annotated[int, Field(ge=1, le=65535)] = 64
    """Tokens drawn at each position with `keep: sampled`; more make the gradient vary less."""
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64
    """Likeliest tokens of each position with `keep: topk`; more make the gradient less biased."""
    seed: Natural = 0
    """Seed of the draws, apart from the run's: runs of all seeds share a cache."""

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are kept of a position."""
        return self.top_k if self.keep == "topk" else self.draws


class Teacher(Model):
    """The frozen model. The placement of its weights and the way they are gathered change no number of the run."""

    shard_within: Literal["world", "node", "gpu", "auto"] = "world"
    """Ranks that share one copy of the weights. world: all ranks; node: the ranks of a node, so that gathers stay
    inside it; gpu: each rank has a copy of its own on its device, a plain module without ZeRO-3; auto: the first of
    gpu, node and world that fits into memory by preflight's estimate."""
    micro_batches_per_pass: Positive | Literal["auto"] = 1
    """Micro-batches whose hidden states one pass computes, layer by layer: each weight is gathered once for all of
    them. auto: as many as fit into memory by preflight's estimate."""
    quantize: Literal["none", "int8", "int8_dynamic", "fp8"] = "none"
    """int8, int8_dynamic, fp8: weights of the layers in 8 bits with one scale for each row. They take half of bf16's
    memory and half the bytes of a gather; the teacher's outputs and its measured perplexities change. int8 multiplies
    in `train.precision`. int8_dynamic and fp8 round the inputs of linear layers as well, with one scale for each token,
    and multiply in 8 bits: int8 on Ampere and later GPUs, FP8 on Ada, Hopper and later ones with
    `train.precision: bf16` (docs/planning.md)."""
    quantize_skip_layers: tuple[int, ...] = ()
    """Layers that `quantize` leaves as they are, by their numbers from 0; -1 is the last. [0, -1] is common."""
    cache: TeacherCache | None = None
    """Keep what the teacher says on the disk; null: it is computed in each step."""
    by_domain: dict[str, ModelPath] | None = None
    """Other teachers by domain, with the tokenizer of `path`, which teaches the rest. A run only reads their cache."""

    @model_validator(mode="after")
    def _passes_agree(self) -> Teacher:
        if self.micro_batches_per_pass != 1 and not self.whole_layers:
            raise ValueError("micro_batches_per_pass computes layer by layer: set whole_layers to true")
        if self.shard_within in ("gpu", "auto") and self.offload_params != "none":
            raise ValueError(
                f"shard_within: {self.shard_within} has the weights on the device, and offload_params is "
                f"{self.offload_params}: set shard_within to node or world"
            )
        if self.shard_within == "auto" and self.compile_layers:
            raise ValueError(
                "compile_layers rounds differently where the teacher is compiled as a whole (gpu) and where layer by "
                "layer (node, world), and shard_within: auto takes what fits: name one of the three"
            )
        if self.quantize_skip_layers and self.quantize == "none":
            raise ValueError("quantize_skip_layers without quantize: no layer is quantized; remove it")
        return self

    @property
    def compiled_whole(self) -> bool:
        """True if the backbone is compiled as one function and not layer by layer, which rounds differently."""
        return self.compile_layers and self.place == "gpu"

    @property
    def place(self) -> Literal["world", "node", "gpu"]:
        """Ranks that share one copy; all of them while `shard_within` is still `auto`.

        train/teacher_passes.py replaces `auto` before the run begins.
        """
        return "world" if self.shard_within == "auto" else self.shard_within

    @property
    def pass_size(self) -> int:
        """Number of micro-batches in one pass; 1 while `micro_batches_per_pass` is still `auto`.

        train/teacher_passes.py replaces `auto` by a number before the run begins.
        """
        return 1 if self.micro_batches_per_pass == "auto" else self.micro_batches_per_pass

    def multiplies_in(self, precision: str) -> bool:
        """Return True if the products of `quantize` have results in this `train.precision`: FP8's only in bf16."""
        return self.quantize != "fp8" or precision == "bf16"


class Loss(Section):
    """The training loss, Eq. 3: cross-entropy + gamma * T^2 * divergence between teacher and student."""

    gamma: NonNegativeFloat = 0.2
    """Weight of the divergence."""
    gamma_end: NonNegativeFloat | None = None
    """Weight of the divergence at the run's end; it changes linearly with the steps. null: it stays constant."""
    temperature: PositiveFloat = 1.0
    """Temperature T of both softmaxes in the divergence."""
    temperature_end: PositiveFloat | None = None
    """Temperature at the run's end; it changes linearly with the steps. null: it stays constant."""
    temperature_squared: bool = True
    """Multiply the divergence by T^2 (Hinton et al., arXiv 1503.02531), so that its gradient keeps its scale; false:
    cross-entropy + gamma * divergence."""
    divergence: Divergence = "forward_kl"
    """Divergence between the models' distributions of the next token; forward_kl is that of Eq. 3."""
    coefficient: OpenFraction = 0.5
    """beta of jensen_shannon (the teacher's weight in the mixture), or alpha of the skewed divergences."""
    logits_dtype: Literal["float32", "model"] = "float32"
    """Precision of the logits. model: that of training, which is faster on some CPUs but makes the gradients useless
    when the student is near the teacher."""
    chunk_tokens: Positive | None = None
    """Tokens whose logits are in memory at a time. On a GPU, in bf16, each takes vocabulary x 16 bytes: both models'
    logits, and the gradients of four such chunks. null: as many as take 1.25 GB there, 512 to 8,192. More make matrix
    products larger (docs/benchmarks.md), and the order of addition another."""


class Train(Section):
    """Batch sizes and precision of an optimizer step."""

    global_batch_samples: Positive = 256
    """Samples of one optimizer step over all ranks (256 x 2,048 tokens are the paper's 0.5 M)."""
    micro_batch_samples: Positive = 1
    """Samples of one forward pass on one rank."""
    sequence_parallel: Positive = 1
    """Ranks that share each sample, by DeepSpeed's Ulysses: each computes a part of its positions, and in attention all
    positions for a part of the heads. For samples whose activations one device cannot hold."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the computation; master weights, optimizer states and accumulated gradients are always float32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the ranks' gradients of a micro-batch are added. bfloat16 rounds at each rank: the sum is off
    by 0.4 % at 8 ranks, 1 % at 64 and 2 % at 256 (docs/planning.md). In bf16, float32 sends twice the bytes of
    gradients, and its buckets take twice the memory."""
    nvme_path: LocalPath | None = None
    """Directory on a fast local disk for everything that is offloaded to nvme."""

    @model_validator(mode="after")
    def _gradients_keep_their_precision(self) -> Train:
        if self.precision == "fp32" and self.reduce_dtype == "bfloat16":
            raise ValueError("reduce_dtype: bfloat16 rounds the gradients of precision: fp32; remove it")
        return self


class Stop(Section):
    """The conditions that end the run; the first one that is met ends it."""

    steps: Positive | None = None
    """Number of optimizer steps."""
    intervals: Positive | None = None
    """Number of distillation intervals."""
    data_once: bool = False
    """End after the interval in which the number of samples drawn reaches the number of training samples in the
    data."""
    discrepancy: NonNegativeFloat | None = None
    """End when the maximum over domains of (student perplexity / teacher perplexity - 1) is below this value."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Stop:
        if self.steps is None and self.intervals is None and not self.data_once:
            raise ValueError(
                "no end is set: set steps, intervals or data_once: true (discrepancy alone may never end the run)"
            )
        return self


class Checkpoint(Section):
    """The sharded checkpoints in <output_dir>/<name>/checkpoints."""

    every_steps: Positive = 500
    """Optimizer steps between two checkpoints; the last is written at the end of the run."""
    keep_last: Positive = 3
    """Number of newest checkpoints that are kept; an older one is deleted only after a newer one is complete."""
    keep_every_steps: Positive | None = None
    """Checkpoints whose step is a multiple of this number are never deleted; null: no such checkpoints."""
    in_background: bool = True
    """Write while training continues, from a copy in the host's memory (14 bytes a parameter over all ranks
    together)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest complete checkpoint of this run; never: it is an error if there is a checkpoint."""


class Guard(Section):
    """Limits at which a run with bad numbers stops or raises an alarm, so that it does not waste its time."""

    max_skipped_steps: Natural = 5
    """Allowed number of consecutive steps whose loss or gradient is not finite; they leave the weights unchanged. One
    more such step stops the run."""
    spike_deviations: NonNegativeFloat = 20.0
    """Robust standard deviations above the median of the last 64 steps at which a loss counts as a spike; 0: never."""
    spike_steps: Positive = 3
    """Number of consecutive spikes that stop the run."""
    roll_backs: Natural = 0
    """Number of times that the run, instead of stopping, returns to its last checkpoint before the bad steps and skips
    the samples since it."""
    least_entropy: Fraction = 0.65
    """Entropy of the proportions, divided by that of equal proportions, below which there is an alarm, in every
    interval and with every controller that moves proportions; 0: no alarm. At 0.65 it comes when one domain has more
    than 83 % of two domains' samples, or more than 62 % of ten's."""
    rising_intervals: Natural = 3
    """Number of consecutive intervals with a rising perplexity ratio to the teacher after which a domain raises an
    alarm; 0: no alarm."""


# gloo counts milliseconds in 32 bits.
_FOR_EVER_S = 20 * 86400.0


class Limits(Section):
    """Time limits in seconds: after one, a rank that still waits writes its stacks to <run>/stacks and ends the job; 0:
    no limit."""

    start_s: NonNegativeFloat = 1800.0
    """Limit of a run's start until its ranks have met and checked its inputs, and again of loading its models, in
    seconds."""
    step_s: NonNegativeFloat = 1800.0
    """Limit of one optimizer step with the loading of its data, or of the ranks' leaving at the end, in seconds."""
    evaluation_s: NonNegativeFloat = 7200.0
    """Limit of measuring one model's perplexities on all domains, or of the decision after it, in seconds."""
    checkpoint_s: NonNegativeFloat = 3600.0
    """Limit of writing one checkpoint, or of restoring one, in seconds."""
    export_s: NonNegativeFloat = 7200.0
    """Limit of writing the student at the end of the run, in seconds."""
    silence_s: NonNegativeFloat = 45.0
    """Seconds after which a host whose kernel does not answer that of the first rank's counts as gone: the run ends and
    names it. A stopped or slow process does not count."""

    @property
    def collective_s(self) -> float:
        """Return the timeout of a collective, longer than any limit: the limit of the phase ends a wait, with stacks.

        A slow rank may be in an earlier phase than those that wait for it, so it is longer than two limits.
        """
        limits = (self.start_s, self.step_s, self.evaluation_s, self.checkpoint_s, self.export_s)
        return 2 * max(limits) + 600.0 if all(limits) else _FOR_EVER_S


class Monitor(Section):
    """Further outputs of a run's numbers, next to the ledger and with the same names (docs/monitoring.md)."""

    tensorboard: bool = False
    """Write event files for TensorBoard to <run>/monitor/tensorboard."""
    csv: bool = False
    """Write a file with step and value for each name to <run>/monitor/csv."""
    wandb_project: str | None = None
    """Project of Weights & Biases; null: not used. With WANDB_MODE=offline the run is written to
    <run>/monitor/wandb."""
    wandb_entity: str | None = None
    """User or team that owns the project; null: the user who is logged in."""
    prometheus_file: LocalPath | None = None
    """File <directory>/<name>.prom with the newest values, for node_exporter's textfile collector; null: no file."""
    every_s: NonNegativeFloat = 5.0
    """Seconds between two writes by the monitor's thread; values in between are written together."""
    samples_every: Natural = 0
    """Optimizer steps between two continuations of fixed prompts by the student, which the ledger gets next to the
    teacher's; 0: none."""
    sample_prompts: tuple[str, ...] | PromptsPath | None = None
    """Those prompts: a list of texts, or a text file with one on each line; null: the first 32 tokens of each domain's
    first held-out sample."""
    sample_tokens: Positive = 32
    """Tokens of a continuation, each the likeliest one; each takes a forward pass of the model."""

    @model_validator(mode="after")
    def _options_agree(self) -> Monitor:
        if self.sample_prompts is not None and not self.samples_every:
            raise ValueError("sample_prompts is set and samples_every is 0: set samples_every to a number of steps")
        if self.wandb_entity is not None and self.wandb_project is None:
            raise ValueError(f"wandb_entity is {self.wandb_entity}: set wandb_project too, or remove it")
        if self.prometheus_file is not None and not self.prometheus_file.endswith(".prom"):
            raise ValueError(f"prometheus_file is {self.prometheus_file}: the collector reads only files named *.prom")
        return self

    @property
    def packages(self) -> tuple[str, ...]:
        """Import names of the Python packages that the chosen outputs need, for example "wandb"."""
        needed = {
            "tensorboard": self.tensorboard,
            "wandb": self.wandb_project is not None,
            "prometheus_client": self.prometheus_file is not None,
        }
        return tuple(name for name, used in needed.items() if used)
