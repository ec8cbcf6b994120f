"""The run's configuration: typed, frozen and strict. Every default is the paper's method (arXiv 2407.16154).

A wrong key, type or combination is a `ConfigError` that names the key, the value and the fix, before anything
expensive. No value is changed silently: a run uses exactly the values that `--print-config` shows.
"""

from __future__ import annotations

from ddk_ds.config.data_section import Data
from ddk_ds.config.load import load_config, load_run_config, make_config, to_yaml
from ddk_ds.config.methods import METHODS, Doremi, Ted
from ddk_ds.config.mixture_options import Mixture
from ddk_ds.config.optimizer import Optimizer
from ddk_ds.config.run_config import Config
from ddk_ds.config.sections import (
    Checkpoint,
    Guard,
    Limits,
    Loss,
    Model,
    Monitor,
    Positive,
    Section,
)

__all__ = [
    "METHODS",
    "Checkpoint",
    "Config",
    "Data",
    "Doremi",
    "Guard",
    "Limits",
    "Loss",
    "Mixture",
    "Model",
    "Monitor",
    "Optimizer",
    "Positive",
    "Section",
    "Ted",
    "load_config",
    "load_run_config",
    "make_config",
    "to_yaml",
]
