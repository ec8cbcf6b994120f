"""A plan's models: what is known of them from config.json, or from the headers of their weights, alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ddk_ds.engine.flops import model_flops
from ddk_ds.engine.model_files import ModelFiles, configured_files, read_model
from ddk_ds.engine.model_shape import ModelShape, model_shape
from ddk_ds.errors import ConfigError


@dataclass(frozen=True)
class PlannedModel:
    """A model as a plan sees it."""

    shape: ModelShape
    forward_flops: float
    """Of one token, with the whole square of attention."""
    source: str
    """What was read."""

    @property
    def head_flops(self) -> float:
        """Of one token, the part of `forward_flops` that the output head has."""
        return 2.0 * self.shape.head


def describe(files: ModelFiles, sequence_length: int, source: str) -> PlannedModel:
    """What a plan needs of these files."""
    return PlannedModel(model_shape(files), model_flops(files, sequence_length, causal=False), source)


def find_model(path: str, key: str, directories: tuple[Path, ...], sequence_length: int) -> PlannedModel:
    """The model that `path` names: a directory with weights or with config.json alone, or a config.json's own path.

    Of a hub name, the file `<last part>.json` in one of `directories`. Nothing is downloaded and no weight is read.

    Raises:
        ConfigError: there is none, or it describes no causal language model; names the configuration `key`.
    """
    place = Path(path)
    if (place / "model.safetensors").is_file() or (place / "model.safetensors.index.json").is_file():
        return describe(read_model(place, key), sequence_length, f"headers of the weights in {place}")
    tried = [place / "config.json", place, *(directory / f"{place.name}.json" for directory in directories)]
    config = next((file for file in tried if file.is_file()), None)
    if config is None:
        places = ", ".join(map(str, directories))
        raise ConfigError(
            f"{key}: {path} is no directory with a config.json, and {place.name}.json is not in {places}: save the "
            f"model's config.json there, or give its path: {key}=path/to/config.json"
        )
    return describe(_configured(config, key), sequence_length, str(config))


def _configured(config: Path, key: str) -> ModelFiles:
    try:
        return configured_files(config)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{key}: {config} cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{key}: {config} describes no causal language model that transformers can build: {reason}. It must be "
            "a whole config.json with its model_type; of a model with code of its own, give the directory with weights"
        ) from error
