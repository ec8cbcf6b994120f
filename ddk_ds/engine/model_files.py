"""A model's files before it is loaded: their place, the tensors in them, their fingerprint and the model's shape.

Everything here is read from config.json and from the headers of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from transformers import CONFIG_MAPPING, AutoConfig

from ddk_ds.comm import Comm, raise_together
from ddk_ds.config import Model
from ddk_ds.config.sections import Teacher
from ddk_ds.data.patience import http_status, refused
from ddk_ds.engine.attention import Kernel, attention_window, best_kernel
from ddk_ds.engine.config_sizes import (
    LOGIT_KEYS,
    SIZE_KEYS,
    attention_width,
    config_size,
    experts_per_token,
    is_expert,
    is_router,
    mlp_width,
)
from ddk_ds.engine.eight_bits import FORMATS, skipped_layers
from ddk_ds.engine.stored_tensors import StoredTensor, read_entries
from ddk_ds.engine.unloaded_models import hf_config_of, meta_model
from ddk_ds.engine.wrapped_models import text_part
from ddk_ds.errors import ConfigError, TemporaryError, UserError
from ddk_ds.files import read_object
from ddk_ds.kernels import LogitForm

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Compute dtypes by `train.precision`."""
COPY_AGAIN = "copy the complete model directory again"
"""What mends a model whose files are damaged."""
COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
# Files of a model that are downloaded from the hub.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
_LICENCE_KEYS = ("license", "license_name", "license_link")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
# Tensors of older checkpoints that are not parameters: rotary frequencies and attention masks.
_BUFFERS = re.compile(r"(\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")
_LAYER = re.compile(r"^(.*?\.\d+)\.")
# The first matrix of an MLP without a gate (GPT-2 and StarCoder; OPT, Phi; GPT-J; GPT-NeoX, Bloom, Falcon).
_PLAIN_MLP = re.compile(r"\.(c_fc|fc1|fc_in|dense_h_to_4h)\.weight$")
# Architectures whose output head is the embedding if config.json does not say otherwise.
_TIED_BY_DEFAULT = ("gpt_bigcode", "gpt2")


@dataclass(frozen=True)
class ModelFiles:
    """A causal language model on disk: its directory, config.json and tensors."""

    directory: Path
    config: dict[str, Any]
    """The content of config.json, without `quantization_config`: tensors are read as what they stand for."""
    tensors: dict[str, StoredTensor]
    """The tensors by their names in the checkpoint."""
    wrapper: dict[str, Any] = field(default_factory=dict)
    """The content of config.json if it is that of a wrapper, whose text model this is."""
    unused: frozenset[str] = frozenset()
    """Names of tensors in the files that the wrapper has beside its text model."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the dtype of its file; if it is quantised, the numbers that it stands for."""
        return self.tensors[name].read(name)

    @property
    def quantized(self) -> bool:
        """Return True if a tensor is stored as small numbers and scales."""
        return any(tensor.scale is not None for tensor in self.tensors.values())

    @property
    def stored_names(self) -> set[str]:
        """Return the names of all tensors in the files, scales included."""
        names = {tensor.stored_name or name for name, tensor in self.tensors.items()}
        return names | self.unused | {t.scale.name for t in self.tensors.values() if t.scale is not None}

    def hf_config(self, *, trusted: bool = False) -> Any:
        """Return the model's transformers configuration; `trusted` permits Python code of its directory.

        Raises ValueError or ImportError where transformers cannot build it.
        """
        if trusted and "auto_map" in self.config:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=True)
        return hf_config_of(self.config)

    @property
    def logit_form(self) -> LogitForm:
        """Return the scale and the softcap that the model applies to the products of its output head."""
        factors, divisors, caps = (
            [float(self.config[key]) for key in keys if self.config.get(key)] for keys in LOGIT_KEYS.values()
        )
        return LogitForm(math.prod(factors) / math.prod(divisors), sum(caps))

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers. Raises ConfigError if config.json does not say it."""
        return self._size("layers")

    @property
    def width(self) -> int:
        """Return the width of the hidden states. Raises ConfigError if config.json does not say it."""
        return self._size("width")

    @property
    def vocab_rows(self) -> int | None:
        """Return the rows of the output head by config.json; None if it does not say them."""
        return self.config.get("vocab_size")

    def _size(self, name: str) -> int:
        size = config_size(self.config, name)
        if not size:
            known = " or ".join(SIZE_KEYS[name])
            raise ConfigError(f"{self.directory}/config.json does not say the number of {name}: it has no {known}")
        return size

    @property
    def fingerprint(self) -> str:
        """Return a hash of config.json, the tensors' names, shapes, dtypes and samples of their bytes, and own code."""
        digest = hashlib.sha256(json.dumps(self.wrapper or self.config, sort_keys=True).encode())
        for code in sorted(self.directory.glob("*.py")) if "auto_map" in self.config else ():
            digest.update(code.read_bytes())
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            header, start = _header(file)
            digest.update(json.dumps(header, sort_keys=True).encode())
            digest.update(_sample(file, start))
        return digest.hexdigest()[:32]


def model_directory(path: str, key: str, comm: Comm, note: str = "") -> Path:
    """Return the directory `path`, or the snapshot of the hub's model of that name. Collective.

    Each node downloads the model once. Raises ConfigError on every rank if a node can get neither; it names `key`, the
    configuration key, and ends with `note`, which says where the path begins.
    """
    if all(comm.gather_objects(Path(path).is_dir())):
        return Path(path)
    from huggingface_hub import snapshot_download

    error: UserError | None = None
    try:
        # The first rank of each node downloads; the others then find the files in the cache.
        if comm.local_rank == 0:
            snapshot_download(path, allow_patterns=_PATTERNS)
    except _hub_errors() as failure:
        error = _no_model(path, key, failure, note)
    raise_together(comm, error)
    return Path(snapshot_download(path, allow_patterns=_PATTERNS, local_files_only=True))


def check_hub_name(path: str, key: str, note: str = "") -> None:
    """Raise ConfigError, as `model_directory` does, if the hub and its cache have no config.json of a model `path`.

    Nothing else is downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(path, "config.json")
    except _hub_errors() as failure:
        raise _no_model(path, key, failure, note) from failure


def _hub_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    return HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError


def _no_model(path: str, key: str, failure: Exception, note: str) -> UserError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    answer = failure if failure.__cause__ is None else failure.__cause__
    said = answer if isinstance(answer, OfflineModeIsEnabled) else failure
    reason = (str(said).strip() or type(said).__name__).splitlines()[0]
    if http_status(answer) is not None and not refused(answer):
        return TemporaryError(f"{key}: the hub cannot give {path} now: {reason}; start again later{note}")
    return ConfigError(f"{key}: {path} is neither a directory here nor a model that the hub gives: {reason}{note}")


def read_model(directory: Path, key: str) -> ModelFiles:
    """Read a model's config.json and the headers of its weights; of a wrapper, those of the text model in it.

    Raises ConfigError if config.json or safetensors are missing, if there are two sets of weights, or if they are
    quantised in a way that cannot be read; it names `key`, the configuration key.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{key}: {directory} holds no config.json; give the directory of a Hugging Face model")
    config = read_object(config_file, COPY_AGAIN, ConfigError)
    try:
        _check_rotary({**config, **config.get("text_config", {})}, f"{key}: {config_file}")
        tensors = read_entries(config, _entries(directory, key), f"{key}: {directory}")
        whole = ModelFiles(directory, _unquantized(config), tensors)
        text = ModelFiles(directory, *text_part(whole.config, tensors, f"{key}: {directory}"))
        if text.config is whole.config:
            return whole
        return replace(text, wrapper=whole.config, unused=frozenset(whole.stored_names - text.stored_names))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"{key}: {directory}: the index or a header is damaged ({error}); {COPY_AGAIN}") from error


def configured_files(config: Path) -> ModelFiles:
    """Return a description of the files that a model would have, from its Hugging Face configuration (a JSON file).

    There are no weights: each tensor has its shape, and as its `file` the path of the configuration. The model takes no
    memory.
    """
    values, _ = text_part(json.loads(config.read_text()), {}, str(config))
    model = meta_model(hf_config_of(values))
    tensors = {name: StoredTensor(config, tuple(tensor.shape)) for name, tensor in model.named_parameters()}
    return ModelFiles(config.parent, values, tensors)


def _check_rotary(values: Mapping[str, Any], where: str) -> None:
    version = transformers.__version__
    if "rope_parameters" in values and "rope_theta" not in values and int(version.partition(".")[0]) < 5:
        raise ConfigError(
            f"{where} has rope_parameters and no rope_theta, as transformers 5 writes it; transformers {version} would "
            "read another model in silence: install transformers 5 (make setup)"
        )


def check_code(files: ModelFiles, key: str, *, trusted: bool) -> None:
    """Raise ConfigError if the model needs Python code of its own directory and the configuration does not trust it."""
    if "auto_map" not in files.config or files.config.get("model_type") in CONFIG_MAPPING:
        return
    if not trusted:
        raise ConfigError(
            f"{key}.path: {files.directory} is a {files.config.get('model_type')!r}, which transformers does not know, "
            f"and brings Python code along; it is run only with {key}.trust_remote_code: true. Read it first"
        )
    if not any(files.directory.glob("*.py")):
        raise ConfigError(f"{key}.path: {files.directory} needs Python code that is not in it; download it whole")


def _unquantized(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content without `quantization_config`, also in the part of the text model."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = _unquantized(plain["text_config"])
    return plain


def _entries(directory: Path, key: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the file and the header's entry of each tensor."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if single.is_file() and single not in files:
            raise ConfigError(
                f"{key}: {directory} holds two sets of weights, {single.name} and the files that {index.name} names, "
                "and programs differ in which one they read: move one of the two away"
            )
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
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in files:
        for name, entry in _header(file)[0].items():
            if name in entries:
                raise ConfigError(f"{key}: {entries[name][0]} and {file} both hold {name}: copy the model again")
            if name != "__metadata__":
                entries[name] = (file, entry)
    return entries


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file and the position of its first tensor byte."""
    # The format: 8 bytes of little-endian length, a JSON header of that length, the tensors' bytes.
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(min(length, file.stat().st_size))), 8 + length


def _sample(file: Path, start: int, pieces: int = 64, piece_bytes: int = 65536) -> bytes:
    # Hashing 28 GB would take minutes on every start. 64 pieces spread over the file distinguish two trainings of a
    # model, because every tensor changes in every step. A file of up to 4 MiB is hashed completely.
    size = file.stat().st_size - start
    if size <= pieces * piece_bytes:
        offsets = [start + i for i in range(0, size, piece_bytes)]
    else:
        offsets = [start + (size - piece_bytes) * i // (pieces - 1) for i in range(pieces)]
    with file.open("rb") as stream:
        samples = []
        for offset in offsets:
            stream.seek(offset)
            samples.append(stream.read(piece_bytes))
    return b"".join(samples)


class Matrix(NamedTuple):
    """A matrix of a layer, or its fused experts."""

    layer: int
    shape: tuple[int, ...]
    expert: bool = False
    """True for weights of experts of which a token uses some."""

    @property
    def elements(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model on which memory, gathers and buckets depend; counts of elements unless stated otherwise."""

    tensors: tuple[int, ...]
    """Elements of each parameter, tied ones once."""
    largest_layer: int
    """Elements of the largest layer."""
    head: int
    """Elements of the output head; those of the embedding if they are tied."""
    layers: int
    hidden: int
    attention: int
    """Width of queries and of the attention's output: heads x size of a head."""
    key_value: int
    """Width of keys and of values."""
    intermediate: int
    """Width of the MLP; in a mixture of experts, of all experts together that one token uses."""
    gated: bool
    """True if the MLP multiplies two of its products; it then keeps four tensors of that width, otherwise two."""
    heads: int
    matrices: tuple[Matrix, ...] = ()
    """Each matrix and each layer's fused experts, but no routers; their elements are part of `tensors`."""
    experts_per_token: int = 0
    """Experts that a token is sent to; 0 in a dense model."""
    normed_heads: bool = False
    """True if queries and keys have norms of their own."""
    best_kernel: Kernel = "sdpa"
    """The kernel of its attention if `attn_implementation` is auto."""
    window: int = 0
    """Tokens that layers with a window see; 0 if all layers see all."""

    @property
    def kv_heads(self) -> int:
        """Return the number of heads of keys and values."""
        return self.key_value * self.heads // self.attention

    @cached_property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(self.tensors)

    @cached_property
    def _counts(self) -> Counter[int]:
        """The number of parameters of each size: experts make thousands, of few sizes."""
        return Counter(self.tensors)

    def shard(self, world_size: int) -> int:
        """Return the elements of one rank's shards; ZeRO-3 pads each tensor to a multiple of the number of ranks."""
        return sum(count * math.ceil(size / world_size) for size, count in self._counts.items())

    def as_sharded(self, model: Model, precision: str) -> ModelShape:
        """Return the shape in elements of the compute dtype, as ZeRO-3 holds and gathers the weights.

        It differs from this shape for a teacher in 8 bits: one element then holds two (bf16) or four (fp32) weights.
        Raises ConfigError if `quantize_skip_layers` names a layer that is not there.
        """
        if not isinstance(model, Teacher) or model.quantize == "none":
            return self
        weights_per_element = COMPUTE_BYTES[precision]
        packed = self.quantized(model, precision)
        others = (self._counts - Counter(matrix.elements for matrix in packed)).elements()
        small = (*others, *(matrix.elements // weights_per_element for matrix in packed))
        before, after = Counter[int](), Counter[int]()  # elements of each layer's matrices
        for matrix in self.matrices:
            before[matrix.layer] += matrix.elements
            after[matrix.layer] += matrix.elements
        for matrix in packed:
            after[matrix.layer] -= matrix.elements - matrix.elements // weights_per_element
        rest = self.largest_layer - max(before.values(), default=0)
        return replace(self, tensors=small, largest_layer=rest + max(after.values(), default=0))

    def quantized(self, model: Teacher, precision: str) -> tuple[Matrix, ...]:
        """Return the matrices that `model.quantize` stores in 8 bits. Raises ConfigError as `as_sharded` does."""
        if model.quantize == "none":
            return ()
        form, skipped = FORMATS[model.quantize], skipped_layers(model, self.layers)
        return tuple(
            matrix
            for matrix in self.matrices
            if matrix.layer not in skipped and form.fits(matrix.shape, COMPUTE_BYTES[precision])
        )

    def multiplied_in_8_bits(self, model: Teacher, precision: str) -> tuple[Matrix, ...]:
        """Return the matrices whose products are in 8 bits: those of linear layers, but not of experts."""
        if model.quantize == "none" or not FORMATS[model.quantize].rounds_inputs:
            return ()
        return tuple(matrix for matrix in self.quantized(model, precision) if not matrix.expert)


def model_shape(files: ModelFiles) -> ModelShape:
    """Return the shape of a model from its config.json and the headers of its weights."""
    values = files.config
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
    hidden = config_size(values, "width")
    num_heads = max(1, config_size(values, "heads"))
    attention = attention_width(values)
    key_value_heads = 1 if values.get("multi_query") else _first(values, "num_key_value_heads") or num_heads
    shapes = {name: files.tensors[name].shape for name in sizes if _LAYER.match(name)}
    return ModelShape(
        tensors=tuple(sizes.values()),
        largest_layer=max(layers.values(), default=0),
        head=next((sizes[name] for name in heads if name in sizes), outside),
        layers=config_size(values, "layers") or len(layers),
        hidden=hidden,
        attention=attention,
        key_value=key_value_heads * attention // num_heads,
        intermediate=mlp_width(values) or 4 * hidden,
        experts_per_token=experts_per_token(values),
        gated=not any(_PLAIN_MLP.search(name) for name in sizes),
        heads=num_heads,
        matrices=tuple(
            Matrix(int(_LAYER.findall(name)[0].rpartition(".")[2]), shape, is_expert(name, shape, values))
            for name, shape in shapes.items()
            if len(shape) > 1 and (len(shape) == 2 or is_expert(name, shape, values))
            if not is_router(name, shape, values) and not name.endswith("bias")
        ),
        normed_heads=any(name.endswith("q_norm.weight") for name in shapes),
        best_kernel=best_kernel(files.config),
        window=attention_window(files.config),
    )


def _first(values: Mapping[str, Any], *keys: str) -> int:
    return next((int(values[key]) for key in keys if values.get(key)), 0)


def read_licence(files: ModelFiles) -> dict[str, str]:
    """Return the licence fields (license, ...) of the model's own card, or else of its config.json.

    Return {} if neither names a licence: "unknown" and a bare "other" name none.
    """
    card = files.directory / "README.md"
    front: Any = None
    if card.is_file():
        begin, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
        if not begin.strip():
            try:
                front = yaml.safe_load(rest.partition("\n---")[0])
            except yaml.YAMLError:
                front = None
    for values in (front, files.config):
        if isinstance(values, dict):
            found = {key: values[key] for key in _LICENCE_KEYS if isinstance(values.get(key), str)}
            if found.get("license", "") not in ("", "unknown") and (found["license"] != "other" or len(found) > 1):
                return found
    return {}
