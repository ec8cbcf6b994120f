"""The controller of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ddk_ds.config import Mixture
from ddk_ds.errors import ConfigError
from ddk_ds.mixture import Controller, ControllerOptions, make_controller


def controller_of(mixture: Mixture, train_tokens: Mapping[str, int], schedule: Any) -> Controller:
    """The controller that the section asks for, over domains with their training tokens.

    `schedule`: content of `mixture.schedule_file`. Raises ConfigError where an option does not fit.
    """
    options = ControllerOptions(**mixture.model_dump(include={option.name for option in fields(ControllerOptions)}))
    names, sizes = list(train_tokens), list(train_tokens.values())
    return make_controller(mixture.controller, names, options, sizes=sizes, schedule=schedule)


def read_schedule(path: str | None) -> Any:
    """Plain values of the YAML file `mixture.schedule_file`; None where there is none."""
    if path is None:
        return None
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"mixture.schedule_file {path}: cannot be read as YAML: {reason}") from None
