"""Reading of YAML and overrides into a `Config`; an error names each wrong key, its value and the fix."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from ddk_ds.config.keys import section_of
from ddk_ds.config.paths import resolve_overrides, resolve_paths
from ddk_ds.config.run_config import Config
from ddk_ds.errors import ConfigError
from ddk_ds.redact import names_a_secret, redact


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, and validate the result.

    Raises:
        ConfigError: names each wrong key, its value and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: there is no such file")
    try:
        values = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return make_config(values, str(path), overrides, path.parent)


def make_config(raw: Any, source: str, overrides: Sequence[str] = (), base: Path | None = None) -> Config:
    """Apply `key.path=value` overrides to `raw`, make its paths absolute (paths.py) and validate the result.

    Args:
        raw: nested mapping, plain or of OmegaConf.
        source: the origin of `raw`, for example a file's name; error messages begin with it.
        base: directory at which the relative paths of `raw` begin; None: the working directory.

    Raises:
        ConfigError: names each wrong key, its value and the fix.
    """
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise ConfigError(f"override {item!r}: write it as key.path=value, for example train.micro_batch_samples=2")
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
        written = OmegaConf.to_container(raw) if OmegaConf.is_config(raw) else raw
        merged = OmegaConf.merge(raw, resolve_overrides(Config, deepcopy(given), Path.cwd())) if overrides else raw
        values = OmegaConf.to_container(merged, resolve=True) if OmegaConf.is_config(merged) else merged
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{source}: cannot be read with the overrides given: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: holds {type(values).__name__}, expected keys and values")
    values = {str(key): value for key, value in values.items()}
    _check_no_credentials(values, "", source)
    values = _tuples(values)
    named = resolve_paths(Config, values, written, given, base and base.absolute(), source)
    values.setdefault("output_dir", os.path.abspath(Config.model_fields["output_dir"].default))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from error
    return config.with_names(named)


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, which `load_config` reads back to an equal `Config`."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _check_no_credentials(value: Any, key: str, source: str) -> None:
    """Raise ConfigError if a text under `key` is a credential, by the name of its key or by its form.

    The run's directory and every checkpoint hold the resolved configuration, so it must not hold a secret. `value` can
    be a section or a list, and `key` is its path; "" for the complete configuration.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _check_no_credentials(item, f"{key}.{name}" if key else str(name), source)
    is_secret = names_a_secret(key.rpartition(".")[2])
    if isinstance(value, str) and (is_secret or redact(value) != value):
        raise ConfigError(
            f"{source}: {key} holds a credential ({'***' if is_secret else redact(value)}): give it in the environment "
            "or in the store's own credentials file, never in the configuration, which runs keep and print"
        )


def _tuples(value: Any) -> Any:
    # YAML has only lists and strict fields need tuples: convert all, except under the free-form DeepSpeed keys.
    if isinstance(value, dict):
        return {key: item if key == "deepspeed" else _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


_EXPECTED = {"tuple_type": "a list, for example [a, b]", "model_type": "a section with keys of its own"}


def _explain(error: Any) -> str:
    """Return the message of one of pydantic's errors: it names the key, the value and the fix."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key, {hint}"
    if error["type"] == "missing":
        return f"{key}: is required, set it"
    if error["type"] == "value_error":
        return (f"{key}: " if key else "") + error["msg"].removeprefix("Value error, ")
    if error["type"] in _EXPECTED:
        return f"{key}: must be {_EXPECTED[error['type']]}, got {error['input']!r}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _known_keys(loc: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = Config
    for part in loc:
        section = section_of(section.model_fields[str(part)]) or section
    return list(section.model_fields)
