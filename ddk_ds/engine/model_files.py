"""A model's files before any of them is loaded: where they lie, which tensors they hold, what identifies them."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddk_ds.comm import Comm, agree
from ddk_ds.errors import ConfigError, UserError
from ddk_ds.kernels import LogitForm

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
    agree(comm, error)
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

    from ddk_ds.engine.compat import no_init_weights

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
