"""Argument types and the report of an error, as several commands share them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ddk_ds.errors import UserError, disk_error
from ddk_ds.exit_codes import EXIT_USER_ERROR, exit_code

RANK_SCRIPT = Path(__file__).resolve().with_name("commands") / "distill_rank.py"
"""The script that a launcher starts on each rank of a run."""
CORES_PER_GPU = 6
"""Cores that a rank with a GPU needs: for its own two threads that start kernels, NCCL's, checkpoints and reading."""


class Main(Protocol):
    """A command's main(): takes its arguments, or those of the command line if None, and returns the exit code."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def mendable(error: Exception) -> tuple[str, int] | None:
    """Return the line for the user and the exit code of an error that can be mended; None for any other error."""
    if isinstance(error, UserError):
        return f"error: {error}", exit_code(error)
    if isinstance(error, OSError) and (line := disk_error(error)):
        return f"error: {line}", EXIT_USER_ERROR
    return None


def reports_user_errors(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Make a main() print a UserError, or a disk's or file's error, as one line to stderr and return its exit code."""

    @wraps(main)
    def reporting(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (UserError, OSError) as error:
            if (found := mendable(error)) is None:
                raise
            line, code = found
            print(line, file=sys.stderr)
            return code

    return reporting


class _Parser(argparse.ArgumentParser):
    hint: Callable[[str], str] | None = None
    check: Callable[[argparse.Namespace], str] | None = None

    def parse_intermixed_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        options = super().parse_intermixed_args(*arguments)
        if self.check and (fault := self.check(options)):
            self.error(fault)
        return options

    def error(self, message: str) -> NoReturn:
        super().error(message + (self.hint(message) if self.hint else ""))


def command_parser(
    doc: str | None,
    hint: Callable[[str], str] | None = None,
    check: Callable[[argparse.Namespace], str] | None = None,
) -> argparse.ArgumentParser:
    """Return a parser without arguments, whose --help shows a command's docstring as it is written.

    `hint` takes the text of an error about the arguments, and returns what is added to it. `check` takes the parsed
    options, and returns what is wrong with several of them together, or nothing (""). The parser asks it, so that
    tools/bench/docs_check.py finds such a fault in a page's command.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.hint, parser.check = hint, check
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command's arguments, among which key=value overrides may stand between options."""
    complete(parser)
    return parser.parse_intermixed_args(arguments)


def complete(parser: argparse.ArgumentParser) -> None:
    """If a shell asks for completions (argcomplete sets this variable), print them and end the process."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def positive(text: str) -> int:
    """Return the command-line argument as an integer; raise ArgumentTypeError unless it is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 1")
    return int(text)
