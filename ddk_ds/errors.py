"""Errors that a user can correct. Each message names the place, the wrong value, the reason and what to do about it."""

from __future__ import annotations


class UserError(ValueError):
    """Base class of all errors that a user can correct; the commands print it as one line and exit by `exit_code`."""


class ConfigError(UserError):
    """A key of the run's configuration is unknown, has a wrong value, or cannot be combined with another."""


class DataError(UserError):
    """Text, tokenizer, shards or `domains.json` are missing or damaged, or do not fit the run."""


class CheckpointError(UserError):
    """A checkpoint or a run's directory is incomplete, or belongs to another run."""


class TemporaryError(UserError):
    """Something that time may mend, like an object store that does not answer: the same command may pass later."""
