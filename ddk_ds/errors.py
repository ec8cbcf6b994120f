"""Errors that a user can mend. Each message names what is wrong, where, its value, and what to do about it."""

from __future__ import annotations


class UserError(ValueError):
    """Base of every error that is the user's to mend; the commands print it as one line and exit with 2."""


class ConfigError(UserError):
    """A key of the run's configuration is unknown, has a wrong value, or does not go with another."""


class DataError(UserError):
    """Text, tokenizer, shards or `domains.json` are missing, damaged, or do not fit the run."""


class CheckpointError(UserError):
    """A checkpoint or run directory is incomplete, or belongs to another run."""
