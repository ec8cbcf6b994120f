"""Errors that a user can correct. Each message names the place, the wrong value, the reason and what to do about it."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the operating system's errors that free space mends."""
_OF_A_DISK = (*DISK_FULL, errno.EROFS, errno.EIO, errno.ESTALE)


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


def disk_error(error: OSError) -> str:
    """Return an error about a file or a disk as a line that says what to do; "" for any other error.

    Writing to an open file, or closing it, gives an error without a name.
    """
    if error.filename is None and error.errno not in _OF_A_DISK:
        return ""
    name = "" if error.filename is None else f"{error.filename}: "
    mend = "make room" if error.errno in DISK_FULL else "mend that"
    return f"{name}{error.strerror or error}; {mend}, then start the same command again"
