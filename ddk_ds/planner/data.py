"""What a plan knows of the data: from domains.json where it is there, otherwise from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples, interval_steps, total_steps
from ddk_ds.data.manifest import FILE_NAME, load_manifest
from ddk_ds.data.mds import token_dtype
from ddk_ds.data.store import LocalStore
from ddk_ds.errors import ConfigError

# The paper's; assumed where neither the configuration nor the data says.
ASSUMED_DOMAINS = 10


@dataclass(frozen=True)
class DataFacts:
    """The data of a run, and how long that makes it."""

    domains: int
    vocab_size: int
    """Tokens of the tokenizer, or rows of the student's head, which are never fewer."""
    token_bytes: int
    """Of one token in the shards."""
    shard_bytes: int
    """Of all domains' tokens; without prepared data, of every token that the run draws, and of validation."""
    steps: int
    """Optimizer steps, at the latest."""
    intervals: int
    source: str

    @property
    def measurements(self) -> int:
        """Of the student: before each interval and at the end."""
        return self.intervals + 1


def find_data(config: Config, head_rows: int) -> DataFacts:
    """`head_rows` are those of the student's head.

    Raises:
        ConfigError: the run's length depends on data that is not here.
        DataError: domains.json is there and broken, or lacks a domain.
    """
    place = Path(config.data.path)
    if (place / FILE_NAME).is_file():
        manifest = load_manifest(LocalStore(config.data.path))
        names = config.data.domains or tuple(manifest.domains)
        manifest.require(names)
        sizes = {name: manifest.domains[name].train.samples for name in names}
        steps = total_steps(config, corpus_samples(config.mixture, sizes))
        used = [manifest.domains[name] for name in names]
        token_bytes = np.dtype(manifest.dtype).itemsize
        return DataFacts(
            domains=len(names),
            vocab_size=manifest.vocab_size,
            token_bytes=token_bytes,
            shard_bytes=token_bytes * sum(one.train.tokens + one.validation.tokens for one in used),
            steps=steps,
            intervals=_intervals(config, steps),
            source=f"{place / FILE_NAME}",
        )
    if config.stop.steps is None and config.stop.intervals is None:
        raise ConfigError(
            f"stop: the run ends with its data, and data.path {config.data.path} holds no {FILE_NAME} here: give "
            "stop.steps=N, or data.path=DIR of the prepared shards"
        )
    length = config.data.sequence_length
    steps = total_steps(config.model_copy(update={"stop": config.stop.model_copy(update={"data_once": False})}), 0)
    domains = len(config.data.domains) if config.data.domains is not None else ASSUMED_DOMAINS
    token_bytes = np.dtype(token_dtype(head_rows)).itemsize
    samples = steps * config.train.global_batch_samples + domains * config.data.validation_samples
    named = "data.domains" if config.data.domains is not None else f"assumed: {ASSUMED_DOMAINS} domains, as the paper"
    return DataFacts(
        domains=domains,
        vocab_size=head_rows,
        token_bytes=token_bytes,
        shard_bytes=token_bytes * samples * length,
        steps=steps,
        intervals=_intervals(config, steps),
        source=f"{named}; no prepared data in data.path: as much as the run draws",
    )


def _intervals(config: Config, steps: int) -> int:
    done = count = 0
    while done < steps:
        done += interval_steps(config.mixture, count)
        count += 1
    return count
