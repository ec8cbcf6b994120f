"""The attention kernel of a model: one that computes all that the model's own attention computes.

transformers hands a kernel whatever the model wants, and the kernel drops what it does not know: torch's sdpa has
neither the soft cap of Gemma 2 nor the sinks of gpt-oss, and would compute another model without a word. Which kernels
are right for a model is measured: each of its attention modules is called with random queries, keys and values, once by
its own code ("eager") and once by sdpa.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ddk_ds.config import Model
from ddk_ds.config.sections import Student
from ddk_ds.engine.attention_masks import sees_later_tokens
from ddk_ds.engine.unloaded_models import backbone_of, hf_config_of, no_init_weights, without_memory
from ddk_ds.errors import ConfigError

Kernel = Literal["sdpa", "flash_attention_2", "eager"]
_PROBE, _UNMASKED = "ddk_probe", "ddk_probe_unmasked"
_LENGTH = 8
_SCORES = 8.0
"""Standard deviation of the probe's attention scores: a soft cap of up to 1,000 changes such scores measurably."""
_TOLERANCE = 1e-5
_COMMON = set(inspect.signature(sdpa_attention_forward).parameters)
_FLASH = set(inspect.signature(flash_attention_forward).parameters)


@dataclass(frozen=True)
class Attention:
    """The kernel that a model is computed with, and a line for the user if it is not the usual one."""

    kernel: Kernel
    note: str = ""


@dataclass(frozen=True)
class _Call:
    """A call of an attention kernel: the module, the shapes of queries, keys and values, and the kernel's options."""

    module: Any
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    options: dict[str, Any]


class _NotComparable(Exception):
    """A model that does not reach its first attention without values."""


class _Ended(Exception):
    """The end of a model's first attention."""


def choose_attention(
    config: dict[str, Any], directory: Path, key: str, section: Model | None = None, *, trusted: bool = False
) -> Attention:
    """Return the attention kernel of a model: the one that its `section` of the configuration names, or the best.

    The best is sdpa if it computes what the model's own attention computes, and otherwise "eager", the model's own.
    No weight is read.

    Args:
        config: content of the model's config.json.
        directory: the model's directory, for code of its own, which `trusted` or the section permits.
        key: the configuration's key of the model, for messages.

    Raises ConfigError if the model cannot be built, if it is not a backbone and an output head, if it is a student that
    cannot be trained, or if the section names a kernel that leaves out something that the model computes.
    """
    asked = "auto" if section is None else section.attn_implementation
    trusted = trusted or (section is not None and section.trust_remote_code)
    own_code = _own_code(config, directory, trusted)
    try:
        unfit = dict(_unfit(json.dumps(config), own_code))
    except ConfigError as error:
        raise ConfigError(f"{key}: {directory}: {error}") from error
    except Exception as error:  # each model's code has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {directory} cannot be built: {reason}") from error
    if isinstance(section, Student) and "student" in unfit:
        raise ConfigError(f"{key}: {directory}: {unfit['student']}: choose another student")
    if asked == "auto":
        why = unfit.get("sdpa") or unfit.get("auto")
        if why is None:
            return Attention("sdpa")
        return Attention("eager", f"{key}: attention is computed by eager: {why}")
    if asked in unfit:
        raise ConfigError(
            f"{key}.attn_implementation is {asked}, but {unfit[asked]}: set {key}.attn_implementation to auto or eager"
        )
    return Attention(asked)


def check_apart(config: dict[str, Any], directory: Path, key: str, section: Model) -> None:
    """Raise ConfigError if it is plain without values that a model cannot keep the documents of a sample apart.

    `choose_attention` has accepted the model. What only values tell, engine/split_check.py finds once it is loaded.
    """
    if reason := not_kept_apart(config, directory, trusted=section.trust_remote_code):
        raise ConfigError(
            f"data.documents is masked, but {key}.path {directory} cannot keep documents apart: {reason}: "
            "set data.documents to joined, or choose another model"
        )


def not_kept_apart(config: dict[str, Any], directory: Path, *, trusted: bool = False) -> str:
    """Return why it is plain without values that a model cannot keep documents apart; "" if it is not."""
    return dict(_unfit(json.dumps(config), _own_code(config, directory, trusted))).get("masked", "")


def _own_code(config: dict[str, Any], directory: Path, trusted: bool) -> Path | None:
    """Return the directory of a model whose own Python code is run; None for one of transformers' models."""
    return directory if trusted and "auto_map" in config else None


def best_kernel(config: dict[str, Any]) -> Kernel:
    """Return the kernel for a model of this config.json, for estimates: sdpa also where that cannot be told."""
    try:
        return choose_attention(config, Path(), "model").kernel
    except ConfigError:
        return "sdpa"


def attention_window(config: dict[str, Any]) -> int:
    """Return the tokens that layers with a window, or with chunks, see; 0 without such layers, or if none can tell."""
    try:
        text = hf_config_of(config).get_text_config()
    except Exception:  # a model with code of its own
        return 0
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and not {"sliding_attention", "chunked_attention"} & set(kinds):
        return 0
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=0)


@lru_cache
def _unfit(config: str, own_code: Path | None) -> tuple[tuple[str, str], ...]:
    """Return (kernel, reason) for each kernel that may not be used for the model of this config.json.

    The kernel "auto" stands for sdpa where that may be used only if it is named, "student" for any in training, and
    "masked" for any if documents are kept apart.

    `own_code` is the directory of a model whose own Python code is run; None for one of transformers' models.
    """
    if own_code is None:
        hf_config = hf_config_of(json.loads(config))
    else:
        hf_config = AutoConfig.from_pretrained(own_code, trust_remote_code=True)
    calls, masked = None, False
    # Fake tensors have shapes and no memory, as those of the meta device, on which rotary positions do not run.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # In bf16, the one dtype in which transformers 5 multiplies by all experts at once without values.
    options: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": own_code is not None}
    build = partial(AutoModelForCausalLM.from_config, hf_config, **options)
    try:
        with fake, no_init_weights():
            model = build()
    except RuntimeError:  # a fake parameter cannot be converted, as DeepSeek-V4's norms are when they are made
        model = without_memory(build)
        with fake:
            model = model.to_empty(device="cpu")
    model.eval()
    with fake, no_init_weights(), suppress(_NotComparable):
        with suppress(Exception):  # older models look for it among the tokens, to warn; in newer ones it must be given
            model.config.pad_token_id = None
        if not _takes(model, "use_cache"):  # OpenAI's GPT of 4.57
            raise ConfigError(f"{type(model).__name__} cannot be told to keep no cache: choose another model")
        if model.get_output_embeddings() is None:
            raise ConfigError(f"{type(model).__name__} has no output head to distil")
        if sees_later_tokens(model.config):
            raise ConfigError(
                f"{type(model).__name__} cannot be distilled: its tokens see later ones (use_bidirectional_attention "
                "in config.json, or its family's default): choose another model"
            )
        calls = _calls(model)
        masked = bool(calls) and not _runs_unmasked(model, calls[-1].module)
    name, found = type(model).__name__, {}
    for kernel, flag in (("sdpa", "_supports_sdpa"), ("flash_attention_2", "_supports_flash_attn")):
        lost = set() if calls is None else {item for call in calls for item in _lost(call, kernel)}
        if lost:
            found[kernel] = f"{kernel} leaves out {' and '.join(sorted(lost))} of {name}'s attention"
        elif not getattr(model, flag, False):
            found[kernel] = f"transformers has no {kernel} for {name}"
        elif masked:
            found[kernel] = f"the attention of {name} needs a mask, and has none with {kernel}"
    if getattr(model, "_is_stateful", False):
        found["masked"] = f"{name} ({model.config.model_type}) carries a state from token to token"
    elif not _takes(model, "position_ids"):
        found["masked"] = f"{name} ({model.config.model_type}) takes no positions"
    if kept := _kept(model):
        found["student"] = f"{name} cannot be trained, since {kept} keeps what it computed for the next pass"
    if calls is None:
        found["auto"] = f"sdpa could not be compared with the attention of {name}"
    return tuple(found.items())


_noted: list[_Call] = []


def _note_call(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any
) -> tuple[Any, None]:
    """Note a call as the attention kernel `_PROBE`, and return a result of the right shape."""
    _noted.append(_Call(module, (query.shape, key.shape, value.shape), options))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(_PROBE, _note_call)
ALL_MASK_ATTENTION_FUNCTIONS.register(_PROBE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
ALL_ATTENTION_FUNCTIONS.register(_UNMASKED, _note_call)
ALL_MASK_ATTENTION_FUNCTIONS.register(_UNMASKED, lambda *_, **__: None)


def _calls(model: Any) -> list[_Call]:
    """Return the calls of attention in a pass of the model, of those alike one; [] if it takes no kernels.

    Older models have a class for each kernel, in which transformers implements all of the model's attention. Raises
    ConfigError if the head does not get the backbone's hidden states.
    """
    takes_kernels = model._can_set_attn_implementation()
    if takes_kernels:
        model.set_attn_implementation(_PROBE)
    _noted.clear()
    hidden: list[torch.Tensor] = []
    hooks = [
        backbone_of(model).register_forward_hook(lambda _module, _arguments, output: hidden.append(output[0])),
        model.get_output_embeddings().register_forward_pre_hook(lambda _module, given: hidden.append(given[0])),
    ]
    try:
        model(torch.zeros(1, _LENGTH, dtype=torch.long), use_cache=False)
    except Exception as error:
        # A mixture of experts does not run without values: its routing depends on them. Its first layer's attention
        # has been noted then.
        if takes_kernels and not _noted:
            raise _NotComparable from error
    finally:
        for hook in hooks:
            hook.remove()
    same_dtype = len(hidden) == 2 and hidden[0].dtype == hidden[1].dtype  # Mamba's are cast to the head's dtype
    if same_dtype and len({StorageWeakRef(tensor.untyped_storage()) for tensor in hidden}) == 2:
        raise ConfigError(
            f"{type(model).__name__} cannot be distilled: it computes something between its backbone and its output "
            "head: choose another model"
        )
    first: dict[Any, _Call] = {}  # `_runs_unmasked` runs a model only as far as the last of them
    for call in _noted:
        first.setdefault((type(call.module), call.shapes, repr(sorted(_plain(call.options)))), call)
    _noted.clear()
    return list(first.values())


def _runs_unmasked(model: Any, attention: Any) -> bool:
    """Return True if a model runs without a mask until `attention` ends; causal text has none but in eager."""

    def end(*_: Any) -> None:
        raise _Ended  # the rest of the pass is not needed

    hook = attention.register_forward_hook(end)
    model.set_attn_implementation(_UNMASKED)
    try:
        model(torch.zeros(1, _LENGTH, dtype=torch.long), use_cache=False)
    except _Ended:
        return True
    except Exception:
        return False
    finally:
        hook.remove()
    return False


def _takes(model: Any, argument: str) -> bool:
    """Return True if a model's backbone takes an argument of this name."""
    taken = inspect.signature(backbone_of(model).forward).parameters.values()
    return any(one.name == argument or one.kind is one.VAR_KEYWORD for one in taken)


def _kept(model: Any) -> str:
    """Return the class and name of a tensor that a pass has left in a module, with its gradient's graph; "" if none."""
    return next(
        (
            f"{type(module).__name__}.{name}"
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.Tensor) and value.grad_fn is not None
        ),
        "",
    )


def _plain(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        yield name, f"tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _lost(call: _Call, kernel: str) -> list[str]:
    """Return the parts of a call that the kernel leaves out: names of options, or "a part" if no option explains it."""
    eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
    if eager is None:
        return []
    drawn = torch.Generator().manual_seed(0)  # the training's own generators stay as they are
    module, options = _real_module(call.module, drawn), {k: _real(value, drawn) for k, value in call.options.items()}
    tensors = _queries(call, drawn)

    def result(function: Callable[..., Any], without: tuple[str, ...] = ()) -> torch.Tensor:
        used = {key: value for key, value in options.items() if key not in without}
        output: torch.Tensor = function(module, *tensors, **used)[0]
        return output

    def same(first: torch.Tensor, second: torch.Tensor) -> bool:
        return bool((first - second).abs().max() <= _TOLERANCE)

    with torch.no_grad():
        own = result(eager)
        further = [key for key in options if key not in _COMMON and not same(result(eager, (key,)), own)]
        try:
            plain = result(sdpa_attention_forward)
        except ValueError:  # transformers 5 refuses a soft cap itself
            plain = result(sdpa_attention_forward, tuple(further))
        if same(own, plain):
            return []
        if not further or not same(result(eager, tuple(further)), plain):
            return ["a part"]
    return [key for key in further if kernel != "flash_attention_2" or key not in _FLASH]


def _queries(call: _Call, drawn: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return random queries, keys, values and a causal mask, in float64, for a call."""
    query, key, value = (torch.randn(shape, generator=drawn, dtype=torch.float64) for shape in call.shapes)
    scaling = call.options.get("scaling") or query.shape[-1] ** -0.5
    query *= _SCORES / (scaling * math.sqrt(query.shape[-1]))
    mask = torch.full((1, 1, query.shape[2], key.shape[2]), torch.finfo(torch.float64).min, dtype=torch.float64)
    return query, key, value, mask.triu(1)


def _real_module(module: Any, drawn: torch.Generator) -> Any:
    """Return a copy of a module with values in its own parameters and buffers, such as gpt-oss's sinks."""
    real = copy.copy(module)
    real._parameters = {name: _real(value, drawn) for name, value in module._parameters.items()}
    real._buffers = {name: _real(value, drawn) for name, value in module._buffers.items()}
    return real


def _real(value: Any, drawn: torch.Generator) -> Any:
    """Return random numbers in place of a tensor of numbers, and ones in place of a mask or of positions."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype.is_floating_point:
        return torch.randn(tuple(value.shape), generator=drawn, dtype=torch.float64)
    return torch.ones(tuple(value.shape), dtype=value.dtype)
