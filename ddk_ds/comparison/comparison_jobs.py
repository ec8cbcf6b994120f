"""The runs of a comparison: which methods or variants with which seeds, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddk_ds.comparison.method_stages import Job
from ddk_ds.config import Config
from ddk_ds.config.paths import absolute_items
from ddk_ds.config.sections import FILE_NAME
from ddk_ds.errors import ConfigError

METHODS = ("cpt", "kd", "ddk_equal", "ddk_no_smoothing", "ddk")
"""Methods that are compared unless the user names others."""
OWN_KEYS = ("name", "output_dir", "seed", "method")
"""Configuration keys that the comparison itself sets."""
PRESET_KEYS = ("mixture.controller", "loss.divergence")
"""Configuration keys that a method sets, unless the configuration sets them."""
SUITES = {path.stem: path for path in sorted((Path(__file__).parent / "suites").glob("*.yaml"))}
"""Grids that come with the project, by name."""


@dataclass(frozen=True)
class Column:
    """One column of the comparison's table: a method, or a grid's variant of a method."""

    label: str
    method: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparisonPlan:
    """Everything that a comparison runs, as the user asked for it."""

    config: Path
    """YAML file that all runs share."""
    overrides: tuple[str, ...]
    """key=value items for all runs."""
    out: Path
    """Directory of the runs and of the report."""
    seeds: int
    """Runs of each column, with seeds 0, 1, ..."""
    methods: tuple[str, ...] = METHODS
    grid: Path | None = None
    """YAML file of variants, which replace `methods`."""

    @cached_property
    def columns(self) -> list[Column]:
        """Return the columns in their order. Raises ConfigError where the grid or the configuration is not readable."""
        if self.grid is None:
            return [Column(name, name) for name in dict.fromkeys(self.methods)]
        return [_variant(label, items, self._own_method) for label, items in read_grid(self.grid).items()]

    def make_jobs(self) -> list[Job]:
        """Make and check a job for each seed and column. Raises ConfigError if a job cannot be run or compared.

        The jobs of the first seed come first, for all columns, so that a partial comparison has all columns.
        """
        for column in self.columns:
            _check_own_keys((*self.overrides, *column.overrides))
        jobs = [
            Job(
                self.config,
                column.method,
                f"{column.label}-s{seed}",
                self.out,
                (*self.overrides, *self._preset_items(column), *column.overrides, f"seed={seed}"),
                column.overrides,
            )
            for seed in range(self.seeds)
            for column in self.columns
        ]
        for job in jobs:
            job.check()
        return jobs

    @property
    def _own_method(self) -> str:
        return str(self._configured("method") or "ddk")

    @cached_property
    def _configuration(self) -> Any:
        """Return the YAML file with the overrides for all runs, without any default."""
        try:
            return OmegaConf.merge(OmegaConf.load(self.config), OmegaConf.from_dotlist(list(self.overrides)))
        except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"--config {self.config}: cannot be read with the overrides given: {error}") from error

    def _preset_items(self, column: Column) -> list[str]:
        """Return the configuration's values of PRESET_KEYS as overrides, if the column keeps them.

        A column's own overrides replace them. A grid's variants of the configuration's own method keep them. Raises
        ConfigError for another column, since each method has its own values.
        """
        items = []
        for key in PRESET_KEYS:
            value = self._configured(key)
            if value is None or any(item.startswith(f"{key}=") for item in column.overrides):
                continue
            if self.grid is None or column.method != self._own_method:
                raise ConfigError(
                    f"{key}: {self.config} or an override sets it to {value!r}, which would hold for every method: "
                    f"leave it out (each method has its own), or give it in a variant of --grid ({column.label})"
                )
            items.append(f"{key}={value}")
        return items

    def _configured(self, key: str) -> Any:
        """Return the value that the YAML file and the overrides give a key, or None where they leave the default."""
        try:
            return OmegaConf.select(self._configuration, key)
        except OmegaConfBaseException as error:
            raise ConfigError(f"--config {self.config}: cannot be read with the overrides given: {error}") from error


def read_grid(path: Path) -> dict[str, list[str]]:
    """Read a grid's variants: a list of "key=value" for each label. Raises ConfigError that names the file's fault."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--grid {path}: cannot be read as YAML: {error}") from error
    variants = values.get("variants") if isinstance(values, dict) else None
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"--grid {path}: write variants: {{label: [key=value, ...]}}")
    for label, items in variants.items():
        if not re.fullmatch(FILE_NAME, str(label)):
            raise ConfigError(f"--grid {path}: label {label!r}: use letters, digits and . _ -, as in a run's name")
        if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
            raise ConfigError(f"--grid {path}: {label}: {items!r} is no list of key=value")
    base = path.absolute().parent  # the file names the paths in it
    return {str(label): absolute_items(Config, items, base) for label, items in variants.items()}


def _variant(label: str, overrides: list[str], default_method: str) -> Column:
    methods = [item.partition("=")[2] for item in overrides if item.startswith("method=")]
    others = tuple(item for item in overrides if not item.startswith("method="))
    return Column(label, methods[-1] if methods else default_method, others)


def _check_own_keys(overrides: Iterable[str]) -> None:
    for item in overrides:
        if item.partition("=")[0] in OWN_KEYS:
            raise ConfigError(f"override {item}: the comparison sets it; use --out, --seeds, --methods or --grid")
