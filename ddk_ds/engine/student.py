"""The student on its ZeRO-3 engine, and the loading of a model, which the teacher uses too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ddk_ds.comm import Comm
from ddk_ds.config import Config, Model
from ddk_ds.engine.attention import choose_attention
from ddk_ds.engine.attention_masks import use_own_masks
from ddk_ds.engine.conversion import Conversion, conversions, model_tensors
from ddk_ds.engine.ds_config import bucket_sizes, student_ds_config
from ddk_ds.engine.filters import FilterShape, LayerFilters, build_filters
from ddk_ds.engine.gather_brake import GatherBrake
from ddk_ds.engine.head import HeadFunction, OutputHead, StudentRoot
from ddk_ds.engine.layers import checkpoint_layers, prepare_layers
from ddk_ds.engine.model_files import DTYPES, ModelFiles, model_shape
from ddk_ds.engine.process_memory import freed_at_once
from ddk_ds.engine.resizing import resized
from ddk_ds.engine.router_loss import RouterLoss, router_loss
from ddk_ds.engine.sequence_parallel import SequenceGroup, sequence_group, split_attention
from ddk_ds.engine.stage_clock import StageClock, time_gathers, time_reductions
from ddk_ds.engine.transfers import HostCopy
from ddk_ds.engine.unloaded_models import backbone_of, meta_model, no_init_weights
from ddk_ds.engine.weights import full_shape, load_weights, persistent_buffers
from ddk_ds.engine.zero_shards import MODEL_FILE, ShardWriter, load_shard
from ddk_ds.errors import CheckpointError, ConfigError

# DeepSpeed compares each optimizer with Muon, whose kernels are compiled when it is imported, and that imports torch's
# compiler: three seconds of each start. Nothing here uses them.
with patch("deepspeed.runtime.compiler.compile", lambda: lambda kernel: kernel):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@dataclass
class Student:
    """The model in training: its engine, whose root is a `StudentRoot`, and its parameters by the model's names."""

    engine: Any
    whole: PreTrainedModel
    """The model as transformers has it; the engine's root has the same backbone and head."""
    parameters: dict[str, nn.Parameter]
    stored: StoredForm
    clock: StageClock
    sequence: SequenceGroup | None = None
    """The ranks that share each sample; None if it is this rank's own."""

    def __call__(self, input_ids: torch.Tensor, function: HeadFunction, positions: torch.Tensor | None = None) -> Any:
        """Return `function(hidden, head)` for token ids (B, L), with hidden states (B*L, H), in an engine's pass.

        `positions` (B, L), on the CPU, are those of the tokens in their documents, if documents are kept apart.
        """
        with self.clock.stage("forward"):
            return self.engine(input_ids, self._timed(function), None, positions)

    def filtered(
        self,
        input_ids: torch.Tensor,
        function: HeadFunction | None,
        teacher_states: Sequence[torch.Tensor],
        positions: torch.Tensor | None = None,
    ) -> tuple[Any, tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Return the result of `__call__` (None without a function), and the filtered hidden states of both models.

        The two lists, the student's and then the teacher's, hold a tensor (B*L, Ht) for each pair of layers that TED
        matches. `teacher_states` are the teacher's hidden states (B*L, Ht) of these pairs, before the filters.
        """
        with self.clock.stage("forward"):
            timed = None if function is None else self._timed(function)
            return self.engine(input_ids, timed, teacher_states, positions)

    def _timed(self, function: HeadFunction) -> HeadFunction:
        def timed(hidden: torch.Tensor, head: OutputHead) -> Any:
            with self.clock.stage("head"):
                return function(hidden, head)

        return timed

    @property
    def router(self) -> RouterLoss | None:
        """Return the load-balancing loss that is part of the training loss; None if there is none."""
        router: RouterLoss | None = self.engine.module.router
        return router

    def take_router_loss(self) -> torch.Tensor:
        """Return the `router`'s loss of the last micro-batch, without its weight, and let go of it."""
        root = self.engine.module
        loss, root.router_loss = root.router_loss, None
        assert loss is not None, "no micro-batch since the last call"
        return loss

    @property
    def filters(self) -> LayerFilters:
        """Return TED's filters; None in a run of another method."""
        return self.engine.module.filters

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a micro-batch's loss. `last` marks the step's last one, before `update`."""
        with self.clock.stage("backward"):
            self.engine.backward(loss, scale_wrt_gas=False)
            if not last:
                self.engine.step()

    def update(self, learning_rate: float, numbers: torch.Tensor) -> tuple[float, list[float]]:
        """Update the weights after the last micro-batch; return the gradient's norm before clipping, and `numbers`.

        DeepSpeed decides on the host if the norm is finite, and else leaves the weights as they are. This is the one
        time in a step that the host waits until the device has computed all; `numbers` (n,) float64 on the device come
        with the norm, so that nothing waits for the update.

        Raises ConfigError if a gradient did not reach the optimizer, which would leave its weights as they are.
        """
        self._check_gradients()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer, copies = self.engine.optimizer, list[HostCopy]()
        norms_of = optimizer._get_norm_groups

        def copied() -> list[torch.Tensor]:
            norms: list[torch.Tensor] = norms_of()
            norm = combine_grad_norm_groups(norms).to(numbers)
            copies.append(HostCopy(torch.cat([norm.reshape(1), numbers])))
            return norms

        optimizer._get_norm_groups = copied
        try:
            with self.clock.stage("optimizer"):
                self.engine.step()
        finally:
            del optimizer._get_norm_groups
        [copy] = copies
        grad_norm, *values = copy.read()
        return grad_norm, values

    def _check_gradients(self) -> None:
        """Raise ConfigError if a parameter still has its gradient: ZeRO-3 did not see it and would drop it in silence.

        torch calls the hooks on a module's gradients only if the module returns a tensor or a tuple.
        """
        # The optimizer's own lists: to walk over the modules of a mixture of experts takes tens of milliseconds.
        groups = self.engine.optimizer.fp16_groups
        if any(parameter.grad is not None for group in groups for parameter in group):
            lost = [name for name, parameter in self.engine.module.named_parameters() if parameter.grad is not None]
            raise ConfigError(
                f"student.path: the gradients of {len(lost)} parameters, {lost[0]} among them, did not reach the "
                "optimizer: its layers return something other than a tensor or a tuple of tensors; set "
                "student.whole_layers to false, or choose another student"
            )

    def save(self, directory: Path, tag: str, client_state: dict[str, Any], *, background: bool) -> None:
        """Write this rank's shards of weights and optimizer, and `client_state`, the run's own state, to directory/tag.

        With `background` this returns when the tensors are copied to the host, and training can continue while they are
        written; `save_pending` and `wait_for_save` tell when they are. Collective.
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
    def save_pending(self) -> bool:
        """Return True while this rank is still writing the files of the last `save`."""
        return self.engine.checkpoint_engine.pending

    def wait_for_save(self) -> tuple[dict[Path, tuple[int, str]], str]:
        """Wait for the last `save`; return this rank's files with bytes and xxh64, and an error message or ""."""
        return self.engine.checkpoint_engine.wait()

    def load(self, directory: Path, tag: str, saved_ranks: int) -> dict[str, Any]:
        """Load a checkpoint that `save` wrote on `saved_ranks` ranks, and return the run's own state. Collective.

        Raises CheckpointError if its parameters are not the engine's, which depend on the version of transformers.
        """
        engine = self.engine
        saved, own = load_shard(directory / tag / MODEL_FILE)["param_shapes"], engine._get_zero_param_shapes()
        if list(chain(*(group.items() for group in saved))) != list(chain(*(group.items() for group in own))):
            raise CheckpointError(
                f"{directory}: its weights have other names, shapes or places than those of "
                f"{type(self.whole).__name__} in transformers {transformers.__version__}: give the model that it "
                "was trained from, and continue with the version that wrote it, which its manifest.json names"
            )
        groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
        # Frozen parameters are not saved; they are as they were loaded from the model's own files.
        strict = all(parameter.requires_grad for parameter in engine.module.parameters())
        same = saved_ranks == engine.dp_world_size
        with nullcontext() if same else resized(engine, directory / tag, saved_ranks):
            path, client_state = engine.load_checkpoint(str(directory), tag=tag, load_module_strict=strict)
        assert path is not None, f"DeepSpeed found no checkpoint in {directory}/{tag}"
        # A fork can have other options of AdamW than the checkpoint.
        for group, original in zip(engine.optimizer.param_groups, groups, strict=True):
            group.update(original)
        return client_state["run"]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block in evaluation mode, without gradients and timing; then release the gathered weights."""
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
    """Load the student onto its training engine, with TED's filters if their `shape` is given. Collective.

    `clock` measures the seconds of the student's stages in each step; None makes a new clock. Raises ConfigError if the
    model cannot be built or filled from `files`, or if its head has fewer rows than `vocab_size`.
    """
    largest_layer = model_shape(files).largest_layer
    ds_config = student_ds_config(config, comm.world_size, bucket_sizes(largest_layer))
    model = load_built(config, config.student, "student.path", files, comm, zero_init(ds_config, form=_OneDtype))
    check_vocabulary(model, vocab_size, "student.path")
    checkpoint_layers(model, config.student)
    prepare_layers(backbone_of(model), files.num_layers, config.student)
    stored = stored_form(model, files)
    filters = None if shape is None else build_filters(config, shape, ds_config, comm)
    if config.preset.freezes_student:
        model.requires_grad_(False)
    router = None if config.preset.freezes_student else router_loss(model, config.student.router_aux_loss)
    sequence = sequence_group(config, comm)
    if router is not None and sequence is not None:
        raise ConfigError(
            f"train.sequence_parallel is {sequence.size}, but the routers of {type(model).__name__} are balanced over "
            "whole samples: set student.router_aux_loss to 0, or train.sequence_parallel to 1"
        )
    root = _root(model, files, filters, router, sequence)
    engine, _, _, _ = deepspeed.initialize(model=root, optimizer=_adamw(root, config), config=ds_config)
    engine.checkpoint_engine = writer = ShardWriter()
    engine._copy_recovery_script = partial(writer.keep_error, engine._copy_recovery_script)
    engine.train()
    clock = clock or StageClock(get_accelerator().device_name())
    brake = GatherBrake(get_accelerator(), largest_layer)
    time_gathers(engine.optimizer.parameter_offload.get_param_coordinator(), brake, clock, "gather")
    _reduce_behind_the_host(engine.optimizer)
    time_reductions(engine.optimizer, clock, "reduce")
    own = model_tensors(model)
    parameters: Any = {name: own[name] for conversion in stored.parameters for name in conversion.targets}
    return Student(engine, model, parameters, stored, clock, sequence)


def _reduce_behind_the_host(optimizer: Any) -> None:
    """Make the computation wait at the end of a backward pass until its gradients are reduced, not the host too.

    DeepSpeed makes the host wait for its stream of reductions after each micro-batch. Offloaded gradients need that.
    """
    stream = optimizer.reduce_and_partition_stream
    if stream is not None and not optimizer.offload_optimizer:
        stream.synchronize = lambda: get_accelerator().current_stream().wait_stream(stream)


class StoredForm(NamedTuple):
    """The form of a student's tensors in its files, and so in an export."""

    parameters: list[Conversion]
    buffers: list[str]
    """Names in the files of the model's buffers, such as a router's correction. They are not trained."""


def stored_form(model: PreTrainedModel, files: ModelFiles) -> StoredForm:
    """Return in what form `files` store the model. Raises ConfigError if they do not fit, or are not reversible."""
    buffers, found = persistent_buffers(model).keys(), conversions(model, files)
    for conversion in found:
        conversion.check_reversible("student.path")
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return StoredForm(
        [conversion for conversion in found if conversion.targets.keys() <= own],
        sorted(name for conversion in found if conversion.targets.keys() <= buffers for name in conversion.sources),
    )


def unloaded_student(files: ModelFiles, *, trusted: bool) -> tuple[StoredForm, dict[str, tuple[str, torch.Size]]]:
    """Return the student's form in `files`, and by the model's names each parameter's name in checkpoints and shape.

    Reads no weights. Raises ConfigError if the model cannot be built.
    """
    try:
        model = meta_model(files.hf_config(trusted=trusted), trusted=trusted)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{files.directory} cannot be built: {error}") from error
    saved = {id(parameter): (name, parameter.shape) for name, parameter in _root(model, files, None).named_parameters()}
    return stored_form(model, files), {
        name: saved[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _root(
    model: PreTrainedModel,
    files: ModelFiles,
    filters: LayerFilters | None,
    router: RouterLoss | None = None,
    sequence: SequenceGroup | None = None,
) -> StudentRoot:
    head = model.get_output_embeddings()
    return StudentRoot(backbone_of(model), head, files.logit_form, filters, files.num_layers, router, sequence)


class _OneDtype(deepspeed.zero.Init):
    """ZeRO-3's construction of a model whose parameters all have the compute dtype, as DeepSpeed's optimizer needs.

    Mamba makes some in float32 and Apertus in bf16, whatever the model's dtype is.
    """

    def _post_init_method(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(self.dtype)
        super()._post_init_method(module)


def zero_init(ds_config: dict[str, Any], group: Any = None, form: Any = deepspeed.zero.Init) -> Any:
    """Return a context in which a model is built with its parameters sharded over the ranks of `group` (None: all)."""
    # zero.Init takes its dtype from ds_config; its argument `dtype` always gives bf16 on a CPU. By default it would
    # also convert to that dtype what the model computes in fp32, such as rotary frequencies.
    overrides = [deepspeed.zero.DeepSpeedTensorOverride.device]
    return form(config_dict_or_path=ds_config, tensor_overrides=overrides, data_parallel_group=group)


@freed_at_once()
def load_built(
    config: Config, model: Model, key: str, files: ModelFiles, comm: Comm, construction: AbstractContextManager[Any]
) -> PreTrainedModel:
    """Load the model of these files, built inside `construction`, which shards it or names its device. Collective.

    `key` is the configuration key that names the model in errors. Raises ConfigError if it cannot be built or filled.
    """
    use_own_masks()
    trusted = model.trust_remote_code
    kernel: str = choose_attention(files.config, files.directory, key.removesuffix(".path"), model).kernel
    if sequence := sequence_group(config, comm):
        kernel = split_attention(kernel, sequence)
    hf_config = files.hf_config(trusted=trusted)
    hf_config.use_cache = False
    dtype = DTYPES[config.train.precision]
    try:
        with no_init_weights(), construction:
            built = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=kernel, dtype=dtype, trust_remote_code=trusted
            )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{key}: {files.directory} cannot be built: {error}") from error
    built.tie_weights()
    load_weights(built, files, comm)
    return built


def check_vocabulary(model: PreTrainedModel, vocab_size: int, key: str) -> None:
    """Raise ConfigError, naming the configuration `key`, if the model's head has fewer rows than `vocab_size`."""
    head: Any = model.get_output_embeddings()
    rows = int(full_shape(head.weight)[0])
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
