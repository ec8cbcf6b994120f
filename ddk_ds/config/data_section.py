"""The section of the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddk_ds.config.paths import DataPath, LocalPath, is_address
from ddk_ds.config.sections import Natural, NonNegativeFloat, Positive, PositiveFloat, Section


class Data(Section):
    """The text to train on: MDS shards of each domain, written by `ddk prepare`."""

    path: DataPath
    """Local or remote directory (s3://, gs://, az://, hf://) with domains.json and one directory for each domain."""
    cache_dir: LocalPath | None = None
    """Directory on each node's own disk for the shards that are fetched from `path`; null: `path` is read in place."""
    cache_limit_gb: PositiveFloat | None = None
    """Largest size of the cache in GB, at least that of 4 shards; null: no limit."""
    download_timeout_s: PositiveFloat = 60.0
    """Longest time of one attempt to fetch a shard, in seconds."""
    download_patience_s: NonNegativeFloat = 900.0
    """Seconds for which a shard is tried again, with growing pauses, while the store does not answer or answers that it
    cannot serve now; then the run ends with the exit code of what time may mend. Less than `limits.start_s`,
    `limits.step_s` and `limits.evaluation_s`, by `download_timeout_s` and more."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Domains to train on, in the order of reports; null: all domains of the data."""
    sequence_length: Positive = 2048
    """Tokens of a training sample; must equal the value that the shards were prepared with."""
    documents: Literal["auto", "masked", "joined"] = "auto"
    """masked: the documents of a sample do not see each other: attention and positions begin anew in each, and the
    first token of a document is not predicted from the one before it. joined: a sample is one text, as in the paper.
    auto: masked if the shards have the documents' borders, which shards of earlier versions lack."""
    validation_samples: Positive = 500
    """Held-out samples of each domain that perplexities are measured on (the paper: 500)."""
    allow_other_cuts: bool = False
    """Train although the tokenizers of student and teacher, or of student and data, have one vocabulary but cut text
    differently (other merges): more than 1% of the tokens of a probe text, or data that another tokenizer cut."""
    num_workers: Natural = 0
    """Processes of each rank that read samples ahead, with 0.5 GB together; 0: the training process reads them."""

    @model_validator(mode="after")
    def _cache_goes_with_a_remote(self) -> Data:
        if self.cache_dir is None and is_address(self.path):
            raise ValueError(f"path {self.path} is remote: set cache_dir to a directory on each node's own disk")
        if self.cache_dir is None and self.cache_limit_gb is not None:
            raise ValueError(
                f"cache_limit_gb {self.cache_limit_gb:g} without cache_dir: path is read in place and nothing is ever "
                "removed from it; remove cache_limit_gb, or set cache_dir"
            )
        return self
