"""The console command `ddk`: a subcommand for each thing that a user does, imported when it is asked for."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ddk_ds.command_line import Main, command_parser, complete
from ddk_ds.exit_codes import EXIT_USER_ERROR
from ddk_ds.version import VERSION

# The module of a subcommand is ddk_ds/commands/<subcommand>_command.py.
GROUPS = {
    "before": {
        "prepare": "text to shards of samples",
        "adopt": "token shards that exist, read where they are",
        "look": "show samples, and a page of the data",
        "tokenizer": "train a tokenizer on a recipe's text",
        "init": "make a model with random weights",
        "cut-student": "cut a student out of a teacher",
        "plan": "estimate memory, hours and disks",
        "teach": "fill a cache of the teacher, for all runs",
        "preflight": "check a run and its machines",
        "verify": "hash the shards of prepared data",
    },
    "runs": {
        "distill": "distil, on this machine or on hosts reached by ssh",
        "submit": "submit a run to Slurm",
        "stages": "run the stages of DoReMi or TED",
        "compare": "compare methods, with several seeds each",
    },
    "after": {
        "status": "show a run on one screen",
        "report": "write a run as one HTML page",
        "summary": "print the results of finished runs",
        "replay": "take a run's decisions again, or otherwise",
        "generate": "continue prompts by student and teacher",
        "export": "write a checkpoint's student for Hugging Face",
        "evaluate": "measure models on benchmarks and held-out text",
    },
}
NAMES = [name for group in GROUPS.values() for name in group]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; 2 if there is none of that name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "_ARGCOMPLETE" in os.environ:
        return _complete()
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if words[0] == "--version":
        print(f"ddk {VERSION}")
        return 0
    name = words.pop(0)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`ddk --help` lists them"
        print(f"error: ddk has no command {name!r}: {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    sys.argv[0] = f"ddk {name}"  # argparse shows it in its messages
    return command(name)(words)


def command(name: str) -> Main:
    """Import the subcommand `name` and return its main()."""
    run: Main = import_module(f"ddk_ds.commands.{name.replace('-', '_')}_command").main
    return run


def _help() -> str:
    """Return the text of `ddk --help`: the subcommands in groups, within a screen of 24 lines."""
    lines = ["Distil a large language model into a small one. ddk COMMAND --help says more."]
    for group, commands in GROUPS.items():
        for name, text in commands.items():
            lines.append(f"{group if name == next(iter(commands)) else '':<8}{name:<12} {text}")
    return "\n".join(lines) + "\n"


def _complete() -> int:
    """Print the completions that a shell asks for, by argcomplete, and end the process."""
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    if len(words) > 2 and words[1] in NAMES:
        os.environ["_ARGCOMPLETE"] = "2"  # argcomplete's number of the word that is the program
        return command(words[1])([])
    parser = command_parser(__doc__)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", choices=NAMES)
    complete(parser)
    return 0
