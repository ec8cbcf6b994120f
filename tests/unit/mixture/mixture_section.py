"""Section `mixture` of a configuration, read and checked like that of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddk_ds.config import Config, Mixture, make_config
from ddk_ds.mixture.exhaustion import Exhaustion, make_exhaustion


def config_with(mixture: dict[str, Any], **sections: Any) -> Config:
    """Return a run's configuration with this section `mixture` and these other sections."""
    values: dict[str, Any] = {
        "name": "run",
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"path": "data"},
        "optimizer": {"warmup_steps": 0},
        "train": {"global_batch_samples": 4},
        "stop": {"steps": 100},
    }
    return make_config({**values, "mixture": mixture, **sections}, "run.yaml")


def section(controller: str = "ddk", **options: Any) -> Mixture:
    """Return section `mixture` with these options.

    Raises:
        ConfigError: an option is out of range; the message is the one that a user gets.
    """
    return config_with({"controller": controller, **options}).mixture


def exhaustion_of(sizes: Mapping[str, int], **options: Any) -> Exhaustion:
    """Return the policies of domains with these numbers of samples."""
    return make_exhaustion(section(**options), sizes)
