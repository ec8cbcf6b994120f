"""Section `mixture` of a configuration, read and checked as that of a run."""

from __future__ import annotations

from typing import Any

from ddk_ds.config import Config, Mixture, make_config


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
    """Return section `mixture` with these options; ConfigError, as a user gets it, if one is out of range."""
    return config_with({"controller": controller, **options}).mixture
