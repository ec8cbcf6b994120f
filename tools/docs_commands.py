"""The commands that a page of documentation shows, and the command lines that the tools take."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "deepspeed", "make", "pip", "bash")
_PROPER = ("Hugging Face", "Python", "Slurm")
_BLOCK = re.compile(r"^(?: {4,}|\t)\S")
_VARIABLE = re.compile(r"^[A-Za-z_]\w*=\S*$")
_INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    line: int
    text: str
    script: str = ""
    """What follows it up to END, for `python - <<'END'`."""

    @property
    def words(self) -> list[str]:
        """Its words, without variables before it. `[...]` is taken for given, of `a|b` the first, a name such as DIR
        for any value. Raises ValueError where quotes do not close."""
        text = re.sub(r"\[((?:--|key=value)[^\]]*)\]", r"\1", self.text).replace("key=value", "")
        text = re.sub(r"\b(\w+)(?:\|\w+)+", r"\1", re.sub(r"<<'?\w+'?", "", text))
        words = shlex.split(text, comments=True)
        while words and _VARIABLE.match(words[0]):
            words.pop(0)
        return ["1" if re.fullmatch(r"[A-Z]+|<[\w -]+>", word) else word for word in words]


def commands(text: str) -> Iterator[Command]:
    """Those of indented blocks and of `code` in the text that begin with one of PROGRAMS."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if not _BLOCK.match(line):
            continue
        while line.endswith("\\") and number < len(lines):
            line = line[:-1] + lines[number].strip()
            number += 1
        script = []
        if "<<'END'" in line:
            while number < len(lines) and lines[number].strip() != "END":
                script.append(lines[number][4:])
                number += 1
        for part in re.split(r"&&|;", line):
            command = Command(start + 1, part.strip(), "\n".join(script))
            if _begins_with_program(part):
                yield command
    for found in _INLINE.finditer(text):
        yield Command(text.count("\n", 0, found.start()) + 1, " ".join(found.group(1).split()))


def _begins_with_program(text: str) -> bool:
    words = text.split()
    while words and _VARIABLE.match(words[0]):
        words.pop(0)
    return bool(words) and words[0] in PROGRAMS


class _Captured(BaseException):
    """Carries a tool's parser out of its main()."""


def parser_of(path: Path) -> argparse.ArgumentParser | None:
    """The parser that a script below the project's root makes; None: it takes no arguments.

    Nothing of it runs beyond the making of the parser.
    """
    if "ArgumentParser(" not in (ROOT / path).read_text(encoding="utf-8"):
        return None
    main = importlib.import_module(".".join(path.with_suffix("").parts)).main

    def capture(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Captured(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", capture),
        mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", capture),
    ):
        try:
            main()
        except _Captured as captured:
            parser: argparse.ArgumentParser = captured.args[0]
            return parser
    raise AssertionError(f"{path}: main() parsed nothing")


def scripts() -> list[Path]:
    """Every script that a user starts, relative to the root."""
    found = [path for tree in ("launch", "tools") for path in sorted((ROOT / tree).rglob("*.py"))]
    starts = re.compile(r"^if __name__ ==", re.MULTILINE)
    return [path.relative_to(ROOT) for path in found if starts.search(path.read_text(encoding="utf-8"))]


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """What the tool would take from its command line. Raises ValueError with argparse's own words."""
    with _raising(parser):
        return parser.parse_intermixed_args(list(words))


def unknown_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The options among `words` that the tool does not have: for a command that is not shown whole."""
    known = {option for action in parser._actions for option in action.option_strings}
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


@contextmanager
def _raising(parser: argparse.ArgumentParser) -> Iterator[None]:
    def error(message: str) -> None:
        raise ValueError(message)

    with mock.patch.object(parser, "error", error), mock.patch.object(sys, "argv", [parser.prog]):
        yield


def help_faults(parser: argparse.ArgumentParser) -> list[str]:
    """Where a tool's --help is not in the manner of all: a line about the tool, one for each argument."""
    first = (parser.description or "").strip().partition("\n")[0]
    faults = [] if first.endswith((".", ".)")) else [f"{first!r} is no sentence that says what it does"]
    for action in parser._actions:
        text, name = action.help, "/".join(action.option_strings) or str(action.metavar or action.dest)
        if isinstance(action, argparse._HelpAction) or text == argparse.SUPPRESS:
            continue
        if not text:
            faults.append(f"{name} has no help")
        elif text.endswith(".") or (re.match(r"[A-Z][a-z]", text) and not text.startswith(_PROPER)):
            faults.append(f"{name}: {text!r} begins with a capital or ends with a full stop")
    return faults
