"""Reading of YAML and overrides into a `Config`; an error names each wrong key, its value and the fix."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from ddk_ds.config.keys import flatten, value_at
from ddk_ds.config.methods import METHODS, OF_STAGES
from ddk_ds.config.paths import resolve_overrides, resolve_paths
from ddk_ds.config.run_config import Config
from ddk_ds.config.sections import FILE_NAME_RULE
from ddk_ds.config.suggestions import did_you_mean
from ddk_ds.errors import ConfigError
from ddk_ds.files import read_object
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
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    return make_config(values, str(path), overrides, path.parent)


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the resolved configuration of a run, and apply `key.path=value` overrides.

    Raises ConfigError, as `load_config`, or if it is not what the run's run.json says: a file that was cut would give
    defaults in place of what the run used.
    """
    path, identity = run_dir / "config.yaml", run_dir / "run.json"
    if not identity.is_file():
        return load_config(path, overrides)
    known, own = read_object(identity, "put it back from a copy", ConfigError), load_config(path)
    values = flatten(own.model_dump(mode="json"))
    for key in known.keys() & values.keys():
        if known[key] != values[key]:
            raise ConfigError(
                f"{path}: {key} is {values[key]!r}, in {identity} it is {known[key]!r}: one of the two was cut or "
                "changed; put it back from a copy"
            )
    return load_config(path, overrides) if overrides else own


def make_config(raw: Any, source: str, overrides: Sequence[str] = (), base: Path | None = None) -> Config:
    """Apply `key.path=value` overrides to `raw`, make its paths absolute (paths.py) and validate the result.

    Args:
        raw: nested mapping, plain or of OmegaConf.
        source: the origin of `raw`, for example a file's name; error messages begin with it.
        base: directory at which the relative paths of `raw` begin; None: the working directory.

    Raises:
        ConfigError: names each wrong key, its value and the fix.
    """
    check_overrides(overrides, "train.micro_batch_samples=2")
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
    if values.get("method") in OF_STAGES:
        command = f"ddk stages --config {source} --method {values['method']}"
        raise ConfigError(f"{source}: method: {values['method']} takes several runs: start them by `{command}`")
    _check_method(values, given, source)
    values = _tuples(values)
    named = resolve_paths(Config, values, written, given, base and base.absolute(), source)
    values.setdefault("output_dir", os.path.abspath(Config.model_fields["output_dir"].default))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explained(error, source, overrides)) from error
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


def _check_method(values: Mapping[Any, Any], given: Any, source: str) -> None:
    """Raise ConfigError if a key contradicts the method's own value for it.

    A key beside `method`, in the file or among the overrides, is a mixture or divergence combined with the method: it
    is right, unless it makes another method of it. An override of `method` alone means all that the method is.

    Args:
        values: the file's values with the overrides.
        given: nested mapping of the overrides alone.
    """
    method = values.get("method")
    if not isinstance(method, str) or method not in METHODS:
        return
    preset = METHODS[method]
    for key, own in preset.sets.items():
        found = value_at(values, key)
        left_in_file = "method" in given and value_at(given, key) is None
        if found in (None, own) or not (left_in_file or key == preset.by_definition):
            continue
        places = [
            f"override {name}={value}" if value_at(given, name) is not None else f"{source}: {name}: {value}"
            for name, value in (("method", method), (key, found))
        ]
        mend = f"remove {key}" if key == preset.by_definition else f"remove {key}, or give it as an override too"
        raise ConfigError(f"{places[0]} is {key}: {own} and contradicts {places[1]}: {mend}")


def _tuples(value: Any) -> Any:
    # YAML has only lists and strict fields need tuples: convert all, except under the free-form DeepSpeed keys.
    if isinstance(value, dict):
        return {key: item if key == "deepspeed" else _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def check_overrides(overrides: Sequence[str], example: str) -> None:
    """Raise ConfigError that names the first override that is not key.path=value, or whose value is no YAML."""
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.-]*=", item):
            raise ConfigError(f"override {item!r}: write it as key.path=value, for example {example}")
        try:
            OmegaConf.from_dotlist([item])
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"override {item!r}: its value cannot be read as YAML: {reason}") from error


def _explained(errors: ValidationError, source: str, overrides: Sequence[str]) -> str:
    """Return the message of pydantic's errors: each names its override or the file, the key, the value and the fix."""
    messages = []
    for error in errors.errors():
        key = ".".join(str(part) for part in error["loc"])
        named = [item for item in overrides if _belong_together(key, item.partition("=")[0])]
        last = next((item for item in reversed(named) if f"{key}.".startswith(f"{item.partition('=')[0]}.")), None)
        if last is None and error["type"] == "extra_forbidden" and named:
            last = named[-1]  # it names a key of a section that does not exist
        if last is not None:
            where = f"override {last}" + ("" if last.startswith(f"{key}=") else f": {key}")
            messages.append(_explain(error, key, where, "=..."))
        else:
            where = f"{source} with {', '.join(named)}" if named else source
            messages.append(_explain(error, key, f"{where}: {key}" if key else where, ""))
    return "; ".join(messages)


def _belong_together(key: str, other: str) -> bool:
    """Return True if one of two dotted keys is the other, or a section that holds it; "" holds all."""
    return not key or f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


_EXPECTED = {"tuple_type": "a list, for example [a, b]", "model_type": "a section with keys of its own"}


def _explain(error: Any, key: str, where: str, ending: str) -> str:
    """Return the message of one of pydantic's errors; `ending` follows the keys that it suggests."""
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key, {did_you_mean(Config, key, error['input'], ending)}"
    if error["type"] == "missing":
        return f"{where}: is required, set it"
    if error["type"] == "value_error":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: {error['input']!r}: {FILE_NAME_RULE}"
    if error["type"] == "too_short" and not error["input"]:
        return f"{where}: is empty: name at least one, or leave the key out"
    if error["type"] in _EXPECTED:
        return f"{where}: must be {_EXPECTED[error['type']]}, got {error['input']!r}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
