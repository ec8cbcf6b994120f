"""The student on its ZeRO-3 engine, and what both models are built by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ddk_ds.comm import Comm
from ddk_ds.config import Config, Model
from ddk_ds.engine.ds_config import bucket_sizes, student_ds_config
from ddk_ds.engine.filters import FilterShape, LayerFilters, build_filters
from ddk_ds.engine.head import HeadFunction, OutputHead, StudentRoot
from ddk_ds.engine.layers import checkpoint_layers, prepare_layers, use_causal_kernels
from ddk_ds.engine.model_files import ModelFiles, model_shape, no_init_weights
from ddk_ds.engine.process_memory import freed_at_once
from ddk_ds.engine.stage_clock import StageClock, time_gathers, time_reductions
from ddk_ds.engine.weights import load_weights, source_names
from ddk_ds.engine.zero_shards import ShardWriter
from ddk_ds.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Student:
    """The model in training: its engine, whose root is a `StudentRoot`, and its parameters by their names on disk."""

    engine: Any
    parameters: dict[str, nn.Parameter]
    clock: StageClock

    def __call__(self, input_ids: torch.Tensor, function: HeadFunction) -> Any:
        """input_ids (B, L) -> function(hidden (B*L, H), head), through the engine: also in evaluation."""
        with self.clock.stage("forward"):
            return self.engine(input_ids, self._timed(function))

    def filtered(
        self, input_ids: torch.Tensor, function: HeadFunction | None, teacher_states: Sequence[torch.Tensor]
    ) -> tuple[Any, tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """As a call, and beside it the matched layers' hidden states of both models through their filters."""
        with self.clock.stage("forward"):
            return self.engine(input_ids, None if function is None else self._timed(function), teacher_states)

    def _timed(self, function: HeadFunction) -> HeadFunction:
        def timed(hidden: torch.Tensor, head: OutputHead) -> Any:
            with self.clock.stage("head"):
                return function(hidden, head)

        return timed

    @property
    def filters(self) -> LayerFilters:
        """TED's, in a run that has them."""
        return self.engine.module.filters

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a micro-batch's loss; `last`: it is the step's last, `update` follows."""
        with self.clock.stage("backward"):
            self.engine.backward(loss, scale_wrt_gas=False)
            if not last:
                self.engine.step()

    def update(self, learning_rate: float) -> float:
        """Apply the optimizer after the last micro-batch; returns the global gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.clock.stage("optimizer"):
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, directory: Path, tag: str, client_state: dict[str, Any], *, background: bool) -> None:
        """Begin to write this rank's shards of weights and optimizer, and the run's own state, to directory/tag.

        In the background training may go on: see `saving` and `saved`. Collective.
        """
        self.engine.checkpoint_engine.begin(background=background)
        self.engine.save_checkpoint(
            str(directory),
            tag=tag,
            client_state={"run": client_state},
            save_latest=False,
            exclude_frozen_parameters=True,
        )

    @property
    def saving(self) -> bool:
        """Whether this rank still writes what `save` began."""
        return self.engine.checkpoint_engine.busy

    def saved(self) -> tuple[dict[Path, tuple[int, str]], str]:
        """This rank's files with their bytes and xxh64, once they are written; why one could not be, or ""."""
        return self.engine.checkpoint_engine.wait()

    def load(self, directory: Path, tag: str, *, universal: bool = False) -> dict[str, Any]:
        """Restore what `save` wrote on as many ranks, or a universal checkpoint; returns the run's own state."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.engine.optimizer.param_groups]
        self.engine._config.load_universal_checkpoint = universal
        # What is frozen is not saved: it is as it was loaded from the model's own files.
        whole = all(parameter.requires_grad for parameter in self.engine.module.parameters())
        path, client_state = self.engine.load_checkpoint(str(directory), tag=tag, load_module_strict=whole)
        assert path is not None, f"DeepSpeed found no checkpoint in {directory}/{tag}"
        # A universal one has given every group the first one's weight decay, and all of them one step counter.
        for group, ours in zip(self.engine.optimizer.param_groups, groups, strict=True):
            group.update(ours)
        for moments in self.engine.optimizer.optimizer.state.values():
            moments["step"] = moments["step"].clone()
        return client_state["run"]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes without gradients; releases what they gathered and prefetched."""
        self.engine.eval()
        try:
            with torch.no_grad(), self.clock.paused():
                yield
        finally:
            self.engine.train()
            self.engine.optimizer.parameter_offload.get_param_coordinator().release_and_reset_all(self.engine.module)


def load_student(
    config: Config,
    files: ModelFiles,
    vocab_size: int,
    comm: Comm,
    shape: FilterShape | None = None,
    clock: StageClock | None = None,
) -> Student:
    """The student on its training engine, with TED's filters where their `shape` is given. Collective.

    `clock` counts the seconds of its parts of a step.

    Raises ConfigError where the files do not fit.
    """
    buckets = bucket_sizes(model_shape(files).largest_layer)
    ds_config = student_ds_config(config, comm.world_size, buckets)
    model = load_sharded(config, config.student, "student.path", files, ds_config, comm)
    check_vocabulary(model, vocab_size, "student.path")
    checkpoint_layers(model, config.student.gradient_checkpointing)
    prepare_layers(backbone_of(model), files.num_layers, config.student)
    parameters = _by_name_on_disk(model, files)
    filters = None if shape is None else build_filters(config, shape, ds_config, comm)
    if config.method == "ted_filters":
        model.requires_grad_(False)
    root = _root(model, files, filters)
    engine, _, _, _ = deepspeed.initialize(model=root, optimizer=_adamw(root, config), config=ds_config)
    engine.checkpoint_engine = ShardWriter()
    engine.train()
    clock = clock or StageClock(get_accelerator().device_name())
    time_gathers(engine.optimizer.parameter_offload.get_param_coordinator(), clock, "gather")
    time_reductions(engine.optimizer, clock, "reduce")
    return Student(engine, parameters, clock)


def names_on_disk(files: ModelFiles, *, trusted: bool) -> dict[str, str]:
    """The name of each of the student's parameters in its engine, and so in checkpoints -> its name in `files`.

    No weight is read. Raises ConfigError where the model cannot be built.
    """
    try:
        hf_config = AutoConfig.from_pretrained(files.directory, trust_remote_code=trusted)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trusted)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{files.directory} cannot be built: {error}") from error
    model.tie_weights()
    stored = {id(parameter): name for name, parameter in _by_name_on_disk(model, files).items()}
    return {name: stored[id(parameter)] for name, parameter in _root(model, files, None).named_parameters()}


def _by_name_on_disk(model: PreTrainedModel, files: ModelFiles) -> dict[str, nn.Parameter]:
    sources = source_names(model, files)
    return {sources.get(name, name): parameter for name, parameter in model.named_parameters()}


def _root(model: PreTrainedModel, files: ModelFiles, filters: LayerFilters | None) -> StudentRoot:
    return StudentRoot(backbone_of(model), model.get_output_embeddings(), files.logit_form, filters, files.num_layers)


@freed_at_once()
def load_sharded(
    config: Config, model: Model, key: str, files: ModelFiles, ds_config: dict[str, Any], comm: Comm, group: Any = None
) -> PreTrainedModel:
    """The model of these files, its parameters cut between the ranks of `group` (None: all). Collective."""
    use_causal_kernels()
    trusted = model.trust_remote_code
    hf_config = AutoConfig.from_pretrained(files.directory, trust_remote_code=trusted)
    hf_config.use_cache = False
    dtype = DTYPES[config.train.precision]
    try:
        # zero.Init takes its dtype from ds_config; its dtype argument gives bf16 on a CPU whatever is asked. By default
        # it also turns to that dtype what the model computes in fp32, such as rotary frequencies.
        overrides = [deepspeed.zero.DeepSpeedTensorOverride.device]
        sharded = deepspeed.zero.Init(
            config_dict_or_path=ds_config, tensor_overrides=overrides, data_parallel_group=group
        )
        with no_init_weights(), sharded:
            built = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=model.attn_implementation, dtype=dtype, trust_remote_code=trusted
            )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{key}: {files.directory} cannot be built: {error}") from error
    if built.get_output_embeddings() is None:
        raise ConfigError(f"{key}: {type(built).__name__} has no output head to distil")
    built.tie_weights()
    load_weights(built, files, comm)
    return built


def backbone_of(model: PreTrainedModel) -> nn.Module:
    backbone = model.base_model
    assert backbone is not model, f"{type(model).__name__} has no backbone apart from its head"
    return backbone


def check_vocabulary(model: PreTrainedModel, vocab_size: int, key: str) -> None:
    head: Any = model.get_output_embeddings()
    rows = int(head.weight.ds_shape[0])
    if rows < vocab_size:
        raise ConfigError(f"{key}: its head has {rows} rows, the tokenizer {vocab_size} tokens: not a pair")


def _adamw(root: nn.Module, config: Config) -> torch.optim.Optimizer:
    options = config.optimizer
    trained: list[Any] = [p for p in root.parameters() if p.requires_grad]
    decayed = [p for p in trained if len(p.ds_shape) > 1]
    plain = [p for p in trained if len(p.ds_shape) <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=0.0, betas=options.betas, eps=options.eps, fused=options.fused
    )
