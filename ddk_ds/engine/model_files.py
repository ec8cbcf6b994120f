"""What transformers 4 and 5 do differently; nothing else asks which of them is there.

A model's files before any of them is loaded: where they lie, which tensors they hold, what identifies them.

What memory, gathers and buckets depend on of a model: counts of elements, from its config.json and its tensors'
headers. Pure.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from ddk_ds.comm import Comm, raise_together
from ddk_ds.config import Model
from ddk_ds.config.sections import Teacher
from ddk_ds.errors import ConfigError, UserError
from ddk_ds.kernels import LogitForm

# mypy sees one of the two versions.
try:
    from transformers.conversion_mapping import (  # type: ignore[import-not-found,unused-ignore]
        get_model_conversion_mapping as _transforms,
    )
    from transformers.initialization import no_init_weights  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined,no-redef,unused-ignore]

    def _transforms(model: Any) -> list[Any]:  # type: ignore[misc,unused-ignore]
        return []


__all__ = ["model_names", "no_init_weights"]


def model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of a tensor -> its name in a checkpoint, which transformers 5 may have given another one.

    Raises ConfigError where transformers 5 computes the model's tensors from the stored ones (experts into one).
    """
    transforms = _transforms(model)
    names = {}
    for source in sorted(stored):
        name = source
        for transform in transforms:
            name, pattern = transform.rename_source_key(name)
            if pattern is not None and hasattr(transform, "operations"):
                raise ConfigError(
                    f"{type(model).__name__}: transformers {transformers.__version__} does not take {source} as it is "
                    "stored, and sharded loading cannot convert it; install transformers<5"
                )
        names[name] = source
    return names


_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
# What some models do to hidden @ weight: Cohere and Falcon-H1 multiply, Granite divides, Gemma bends by tanh.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISOR = "logits_scaling"
_SOFTCAP = "final_logit_softcapping"


class StoredTensor(NamedTuple):
    """Where a tensor of a checkpoint lies, and its shape."""

    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFiles:
    """A causal language model on disk."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    """By name in the checkpoint."""

    @property
    def logit_form(self) -> LogitForm:
        """What the model does to the products of its output head."""
        scale = math.prod(float(self.config.get(key) or 1) for key in _MULTIPLIERS)
        scale /= float(self.config.get(_DIVISOR) or 1)
        return LogitForm(scale, float(self.config.get(_SOFTCAP) or 0))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get("num_hidden_layers") or self.config["n_layer"])

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.config.get("hidden_size") or self.config["n_embd"])

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and of every tensor's name, shape, dtype and sampled bytes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            header, start = _header(file)
            digest.update(json.dumps(header, sort_keys=True).encode())
            digest.update(_sample(file, start))
        return digest.hexdigest()[:32]


def model_directory(path: str, key: str, comm: Comm) -> Path:
    """The directory `path`, or the hub's snapshot of the model of that name, downloaded once a node. Collective.

    Raises ConfigError on every rank, naming the configuration key, if any node can have neither.
    """
    if all(comm.gather_objects(Path(path).is_dir())):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    error: UserError | None = None
    try:
        # The node's first rank downloads; the others find the files in the cache afterwards.
        if comm.local_rank == 0:
            snapshot_download(path, allow_patterns=_PATTERNS)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        error = ConfigError(f"{key}: {path} is neither a directory here nor a model that the hub gives: {reason}")
    raise_together(comm, error)
    return Path(snapshot_download(path, allow_patterns=_PATTERNS, local_files_only=True))


def read_model(directory: Path, key: str) -> ModelFiles:
    """What lies in a model's directory; `key` is the configuration key named in errors.

    Raises ConfigError where config.json or safetensors are missing.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{key}: {directory} holds no config.json; give the directory of a Hugging Face model")
    config = json.loads(config_file.read_text())
    return ModelFiles(directory, config, _tensor_files(directory, key))


def configured_files(config: Path) -> ModelFiles:
    """The model that a Hugging Face configuration (JSON) describes, as if it lay there: `file` of a tensor holds none.

    Nothing of it is built in memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ddk_ds.engine.model_files import no_init_weights

    values = json.loads(config.read_text())
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    model.tie_weights()
    tensors = {name: StoredTensor(config, tuple(tensor.shape)) for name, tensor in model.named_parameters()}
    return ModelFiles(config.parent, values, tensors)


def check_code(files: ModelFiles, key: str, *, trusted: bool) -> None:
    """Raise ConfigError where the model needs Python code of its own directory, and the configuration trusts none."""
    from transformers import CONFIG_MAPPING

    if "auto_map" not in files.config or files.config.get("model_type") in CONFIG_MAPPING:
        return
    if not trusted:
        raise ConfigError(
            f"{key}.path: {files.directory} is a {files.config.get('model_type')!r}, which transformers does not know, "
            f"and brings Python code along; it is run only with {key}.trust_remote_code: true. Read it first"
        )
    if not any(files.directory.glob("*.py")):
        raise ConfigError(f"{key}.path: {files.directory} needs Python code that is not in it; download it whole")


def _tensor_files(directory: Path, key: str) -> dict[str, StoredTensor]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif single.is_file():
        files = [single]
    else:
        raise ConfigError(
            f"{key}: {directory} holds no safetensors weights; save the model with "
            "save_pretrained(..., safe_serialization=True)"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{key}: {directory} lacks {', '.join(missing)}, which its index names; copy it again")
    return {
        name: StoredTensor(file, tuple(entry["shape"]))
        for file in files
        for name, entry in _header(file)[0].items()
        if name != "__metadata__"
    }


def _header(file: Path) -> tuple[dict[str, Any], int]:
    # safetensors: 8 bytes of little-endian length, a JSON header, then the tensors' bytes.
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)), 8 + length


def _sample(file: Path, start: int, pieces: int = 64, piece_bytes: int = 65536) -> bytes:
    # Hashing 28 GB would take minutes on every start: 64 spread pieces tell two trainings of a model apart, since
    # every tensor changes in every step. A file of up to 4 MiB is hashed whole.
    size = file.stat().st_size - start
    if size <= pieces * piece_bytes:
        offsets = [start + i for i in range(0, size, piece_bytes)]
    else:
        offsets = [start + (size - piece_bytes) * i // (pieces - 1) for i in range(pieces)]
    with file.open("rb") as stream:
        taken = []
        for offset in offsets:
            stream.seek(offset)
            taken.append(stream.read(piece_bytes))
    return b"".join(taken)


COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
# What older checkpoints store beside parameters: rotary frequencies and attention masks.
_BUFFERS = re.compile(r"(\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")
_LAYER = re.compile(r"^(.*?\.\d+)\.")
# First matrix of an MLP without a gate (GPT-2 and StarCoder; OPT, Phi; GPT-J; GPT-NeoX, Bloom, Falcon).
_PLAIN_MLP = re.compile(r"\.(c_fc|fc1|fc_in|dense_h_to_4h)\.weight$")
# Architectures whose output head is the embedding where config.json does not say.
_TIED_BY_DEFAULT = ("gpt_bigcode", "gpt2")


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on of a model; counts of elements."""

    tensors: tuple[int, ...]
    """Elements of each parameter, tied ones once."""
    largest_layer: int
    """Elements of the largest layer."""
    head: int
    """Elements of the output head, which is the embedding's where they are tied."""
    layers: int
    hidden: int
    attention: int
    """Width of queries and of the attention's output: heads x their size."""
    key_value: int
    """Width of keys and of values."""
    intermediate: int
    """Width of the MLP that a token goes through; of a mixture of experts: of all experts that it goes to."""
    gated: bool
    """Whether the MLP multiplies two of its products: it then keeps four tensors of that width, otherwise two."""
    heads: int
    matrices: tuple[int, ...] = ()
    """Elements of those of `tensors` that are matrices of the layers."""

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.tensors)

    def shard(self, world_size: int) -> int:
        """Elements of one rank's shards: ZeRO-3 pads each tensor to a multiple of the ranks."""
        return sum(math.ceil(tensor / world_size) for tensor in self.tensors)

    def at_rest(self, model: Model, precision: str) -> ModelShape:
        """In elements as ZeRO-3 holds and gathers them: of the compute dtype, two or four weights of 8 bits in one."""
        if not isinstance(model, Teacher) or model.quantize == "none":
            return self
        in_one = COMPUTE_BYTES[precision]
        others = list(self.tensors)
        for matrix in self.matrices:
            others.remove(matrix)
        small = (*others, *(matrix // in_one for matrix in self.matrices))
        return replace(self, tensors=small, largest_layer=self.largest_layer // in_one)


def model_shape(files: ModelFiles) -> ModelShape:
    """The shape of a model from its config.json and its tensors' headers."""
    values = {**files.config, **files.config.get("text_config", {})}
    sizes = {name: math.prod(t.shape) for name, t in files.tensors.items() if not _BUFFERS.search(name)}
    heads = [name for name in sizes if name.endswith(_HEADS)]
    if values.get("tie_word_embeddings", values.get("model_type") in _TIED_BY_DEFAULT):
        for name in heads:
            del sizes[name]
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        if match := _LAYER.match(name):
            layers[match[1]] = layers.get(match[1], 0) + size
    outside = max((size for name, size in sizes.items() if not _LAYER.match(name)), default=0)
    hidden = _first(values, "hidden_size", "n_embd", "d_model")
    num_heads = max(1, _first(values, "num_attention_heads", "n_head"))
    head_size = _first(values, "head_dim") or hidden // num_heads
    experts = _first(values, "num_experts_per_tok") or 1
    intermediate = _first(values, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    return ModelShape(
        tensors=tuple(sizes.values()),
        largest_layer=max(layers.values(), default=0),
        head=next((sizes[name] for name in heads if name in sizes), outside),
        layers=_first(values, "num_hidden_layers", "n_layer") or len(layers),
        hidden=hidden,
        attention=num_heads * head_size,
        key_value=(1 if values.get("multi_query") else _first(values, "num_key_value_heads") or num_heads) * head_size,
        intermediate=experts * intermediate,
        gated=not any(_PLAIN_MLP.search(name) for name in sizes),
        heads=num_heads,
        matrices=tuple(
            size for name, size in sizes.items() if _LAYER.match(name) and len(files.tensors[name].shape) == 2
        ),
    )


def configured_shape(config: Path) -> ModelShape:
    """The shape of the model that a Hugging Face configuration (JSON) describes: nothing of it is built in memory."""
    return model_shape(configured_files(config))


def _first(values: Mapping[str, Any], *keys: str) -> int:
    return next((int(values[key]) for key in keys if values.get(key)), 0)
