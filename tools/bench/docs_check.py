"""Check every command, key, file and link in README.md, CONTRIBUTING.md and docs/, without running the commands.

python -m tools.bench.docs_check
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from ddk_ds.commands import console
from ddk_ds.config import Config, Mixture, load_config
from ddk_ds.config.keys import section_of
from ddk_ds.data.recipe import Recipe
from ddk_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("ddk", "python", "deepspeed", "torchrun", "make", "pip", "uv", "bash")
_PARSES = ("ArgumentParser(", "command_parser(", "from ddk_ds.commands.")
_PROPER = ("Hugging Face", "Python", "Slurm")
_BLOCK = re.compile(r"^(?: {4,}|\t)\S")
_VARIABLE = re.compile(r"^[A-Za-z_]\w*=\S*$")
_INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")
LAUNCHER_OPTIONS = {
    "deepspeed": {"--num_gpus": 1, "--num_nodes": 1, "--hostfile": 1, "--master_port": 1, "--quiet": 0},
    "torchrun": {"--nproc-per-node": 1, "--nnodes": 1, "--rdzv-backend": 1, "--rdzv-endpoint": 1, "-m": 0},
}
# The section that `key=value` belongs to, by tool; for all other tools, the run's configuration.
OVERRIDDEN: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("prepare_data", "train_tokenizer", "prepare_command", "tokenizer_command"), Recipe),
    **dict.fromkeys(("replay", "replay_command"), Mixture),
}
_PATH = re.compile(
    r"(?<![\w/.*-])((?:docs|tools|configs|ddk_ds|tests|launch)/[\w./-]+\.(?:md|py|yaml|json|png|sbatch))\b"
)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_KEY = re.compile(r"`([a-z]+)\.([a-z_]+)(?:=[^`]*|: [^`]*)?`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each fault. Returns 0, or 1 if there is a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pages", nargs="*", type=Path, help="pages to check (default: all)")
    options = parser.parse_args(arguments)
    faults = [] if options.pages else [f"{path} --help: {fault}" for path in scripts() for fault in _help(path)]
    num_commands = 0
    for page in options.pages or pages():
        text = page.read_text(encoding="utf-8")
        shown = list(commands(text))
        num_commands += len(shown)
        where = page.resolve().relative_to(ROOT) if page.resolve().is_relative_to(ROOT) else page
        faults += [f"{where}:{line}: {fault}" for line, fault in page_faults(page, text, shown)]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{num_commands} commands checked, {len(faults)} faults")
    return int(bool(faults))


def pages() -> list[Path]:
    """Return all pages of documentation except the log, which describes older states."""
    docs = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"]
    return [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs) if path.is_file()]


def page_faults(page: Path, text: str, shown: Sequence[Command]) -> Iterator[tuple[int, str]]:
    """Yield the line and the message of each fault of a page."""
    for command in shown:
        for fault in command_faults(command):
            yield command.line, f"{command.text}: {fault}"
    for number, line in enumerate(text.split("\n"), 1):
        for path in _PATH.findall(line):
            if _missing([path]) and (ROOT / path).parent.is_dir():  # else it is another project's
                yield number, f"{path}: there is no such file"
        for link in _LINK.findall(line):
            if "://" not in link and not (page.parent / link).exists():
                yield number, f"link to {link}: there is no such file"
        for section, key in _KEY.findall(line):
            if section in _sections() and key not in _sections()[section]:
                yield number, f"{section}.{key}: there is no such key"


@dataclass(frozen=True)
class Command:
    """A command that a page shows."""

    line: int
    text: str
    script: str = ""
    """The lines up to END, for `python - <<'END'`; else empty."""

    @property
    def words(self) -> list[str]:
        """Return the command's words, without the variables before it. Raises ValueError if a quote does not close.

        The content of `[...]` is kept, `a|b` becomes `a`, and a placeholder such as DIR becomes `1`.
        """
        text = re.sub(r"\[((?:--|key=value)[^\]]*)\]", r"\1", self.text).replace("key=value", "")
        text = re.sub(r"\b(\w+)(?:\|\w+)+", r"\1", re.sub(r"<<'?\w+'?", "", text))
        words = shlex.split(text, comments=True)
        while words and _VARIABLE.match(words[0]):
            words.pop(0)
        return ["1" if re.fullmatch(r"[A-Z]+|<[\w -]+>", word) else word for word in words]


def commands(text: str) -> Iterator[Command]:
    """Yield the commands in indented blocks and in `code` of a page that begin with one of PROGRAMS."""
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
    """An exception that carries a tool's parser out of its main()."""


def parser_of(path: Path) -> argparse.ArgumentParser | None:
    """Return the parser of a script below the project's root, or None if it takes no arguments.

    The script's main() runs until it has made its parser.
    """
    if not any(mark in (ROOT / path).read_text(encoding="utf-8") for mark in _PARSES):
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
    """Return every script that a user can start, relative to the root."""
    files = [path for tree in ("launch", "tools") for path in sorted((ROOT / tree).rglob("*.py"))]
    starts = re.compile(r"^if __name__ ==", re.MULTILINE)
    return [path.relative_to(ROOT) for path in files if starts.search(path.read_text(encoding="utf-8"))]


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the `words` of a command by the tool's parser. Raises ValueError with argparse's message."""
    with _raising(parser):
        return parser.parse_intermixed_args(list(words))


def unknown_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return the options among `words` that the tool lacks, for a command that is shown in part."""
    known = {option for action in parser._actions for option in action.option_strings}
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


@contextmanager
def _raising(parser: argparse.ArgumentParser) -> Iterator[None]:
    def error(message: str) -> None:
        raise ValueError(message)

    with mock.patch.object(parser, "error", error), mock.patch.object(sys, "argv", [parser.prog]):
        yield


def help_faults(parser: argparse.ArgumentParser) -> list[str]:
    """Return the faults of a tool's --help, which must have a sentence about the tool and a line per argument."""
    first = (parser.description or "").strip().partition("\n")[0]
    faults = [] if first.endswith((".", ".)")) else [f"{first!r} is not a sentence"]
    for action in parser._actions:
        text, name = action.help, "/".join(action.option_strings) or str(action.metavar or action.dest)
        if isinstance(action, argparse._HelpAction) or text == argparse.SUPPRESS:
            continue
        if not text:
            faults.append(f"{name} has no help")
        elif text.endswith(".") or (re.match(r"[A-Z][a-z]", text) and not text.startswith(_PROPER)):
            faults.append(f"{name}: {text!r} begins with a capital or ends with a full stop")
    return faults


def command_faults(command: Command) -> list[str]:
    """Return the faults of a command: a tool, target, option, configuration or key that does not exist."""
    try:
        program, *words = command.words
    except ValueError as error:
        return [str(error)]
    match program:
        case "make":
            return [f"there is no target {word}" for word in words if word not in _targets()]
        case "pip" | "uv":
            return _pip_faults(words)
        case "bash":
            return _missing(words[:1])
        case "deepspeed" | "torchrun":
            return _launched_faults(words, LAUNCHER_OPTIONS[program])
        case "ddk":
            return _ddk_faults(words)
        case _:
            return _python_faults(words, command.script)


def _python_faults(words: Sequence[str], script: str) -> list[str]:
    if words[:1] == ["-m"] and words[1].startswith("tools."):
        path = f"{words[1].replace('.', '/')}.py"
        return _missing([path]) or _tool_faults(Path(path), words[2:])
    if words[:1] == ["-m"]:
        if importlib.util.find_spec(words[1].partition(".")[0]) is None:
            return [f"there is no module {words[1]}"]
        return _missing([word for word in words[2:] if word.startswith("tests/")])
    if words[:1] == ["-"]:
        try:
            compile(script, "script", "exec")
        except SyntaxError as error:
            return [f"its script: {error}"]
        return _missing([word for word in words[1:] if "/" in word])
    missing = _missing(words[:1])
    return missing or _tool_faults(Path(words[0]), words[1:])


def _launched_faults(words: Sequence[str], known: Mapping[str, int]) -> list[str]:
    """Return the faults of a launcher's command; `known` are its options, with the number of their values."""
    rest, option = list(words), ""
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option not in known:
            return [f"{option}: not one of the launcher's options that are used here"]
        del rest[: known[option]]
    if option == "-m" and rest:
        rest[0] = f"{rest[0].replace('.', '/')}.py"
    return _python_faults(rest, "")


def _ddk_faults(words: Sequence[str]) -> list[str]:
    name = words[0] if words else ""
    if name in ("1", "", "--version") or "--help" in words:  # 1 is a placeholder, as COMMAND
        return []
    if name not in console.NAMES:
        return [f"ddk has no command {name}"]
    return _tool_faults(Path(f"ddk_ds/commands/{name.replace('-', '_')}_command.py"), words[1:])


def _tool_faults(path: Path, words: Sequence[str]) -> list[str]:
    faults = _missing([word for word in words if word.startswith("configs/")])
    if path.stem == "X":
        return faults
    parser = _parser(path)
    if parser is None:
        return faults + [f"{path} takes no arguments" for _ in words[:1]]
    if "..." in words or not words:
        return faults + [f"it has no option {word}" for word in unknown_options(parser, words)]
    try:
        options = parse(parser, words)
    except ValueError as error:
        return [*faults, str(error)]
    overrides = getattr(options, "overrides", None) or []
    return faults or _override_faults(path, getattr(options, "config", None), overrides)


def _override_faults(path: Path, config: Path | str | None, overrides: Sequence[str]) -> list[str]:
    section = OVERRIDDEN.get(path.stem, Config)
    if section is Config and re.fullmatch(r"configs/[^$]+\.yaml", str(config)):
        try:
            load_config(ROOT / str(config), overrides)
        except UserError as error:
            return [str(error)]
    return [f"{item}: there is no such key" for item in overrides if not _is_key(section, item.partition("=")[0])]


def _is_key(section: type[BaseModel], key: str) -> bool:
    first, _, rest = key.partition(".")
    field = section.model_fields.get(first)
    if field is None or not rest:
        return field is not None
    inner = section_of(field)
    return "dict" in str(field.annotation) if inner is None else _is_key(inner, rest)


def _pip_faults(words: Sequence[str]) -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [
        name for word in words for group in re.findall(r"(?:\.|ddk_ds)\[([\w,]+)\]", word) for name in group.split(",")
    ]
    return [f"there is no extra {name}" for name in named if name not in extras] + _missing(
        [word for word in words if word.endswith(".txt")]
    )


def _missing(paths: Sequence[str]) -> list[str]:
    """Return a fault for each path that does not exist; `$name` and `X` in a path stand for anything."""
    globs = {path: re.sub(r"\$\w+|\bX\b", "*", path) for path in paths}
    return [f"{path}: there is no such file" for path, glob in globs.items() if not any(ROOT.glob(glob))]


def _help(path: Path) -> list[str]:
    parser = _parser(path)
    return [] if parser is None else help_faults(parser)


@cache
def _parser(path: Path) -> argparse.ArgumentParser | None:
    return parser_of(path)


@cache
def _sections() -> dict[str, set[str]]:
    sections = {name: section_of(field) for name, field in Config.model_fields.items()}
    return {name: set(section.model_fields) for name, section in sections.items() if section is not None}


@cache
def _targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    raise SystemExit(main())
