"""What every command shares: exit codes and the types of its arguments."""

from __future__ import annotations

import argparse

EXIT_USER_ERROR = 2
"""An error that the user can mend."""
EXIT_INTERRUPTED = 75
"""A signal ended the run, which saved first: the same command continues it (EX_TEMPFAIL of sysexits.h)."""


def positive(text: str) -> int:
    """Parse a command-line number that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 1")
    return int(text)
