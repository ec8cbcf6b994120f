"""Show how the student of a run and its teacher continue a prompt, side by side.

    ddk generate RUN --prompt "def fibonacci(n):" [--prompt ...] [--no-teacher]
    ddk generate MODEL --prompt-file prompts.txt --temperature 0.8 --seed 1

RUN is a run's directory: the student is the one that the finished run exported, else its newest export (`ddk export`
makes one of any checkpoint). The teacher is the configuration's. MODEL is the directory of any Hugging Face model,
which is shown alone. The models are loaded one after the other by plain transformers. Each token is the likeliest one,
unless --temperature or --top-p is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.config import Config, load_config
from ddk_ds.errors import ConfigError
from ddk_ds.files import read_lines

_SIDE_BY_SIDE = 80
"""Columns of a terminal from which on two texts stand side by side."""


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Show the texts; return 0, or 2 after an error that the user can mend."""
    options = _parse(arguments)
    directory, config = _student(options.model)
    prompts, texts = _continue(directory, config if options.teacher else None, options)
    console = Console(highlight=False)
    for number, prompt in enumerate(prompts):
        console.print(_shown(prompt, {name: column[number] for name, column in texts.items()}, console.width))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, check=_lacking)
    parser.add_argument("model", type=Path, metavar="RUN_OR_DIR", help="directory of a run, or of a Hugging Face model")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; can be given several times")
    parser.add_argument("--prompt-file", metavar="FILE", help="text file with a prompt on each line")
    parser.add_argument("--no-teacher", dest="teacher", action="store_false", help="show the student alone")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=_above_0, metavar="T", help="draw tokens at this temperature")
    parser.add_argument("--top-p", type=_share, metavar="P", help="draw among the likeliest tokens with this share")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: that of the files")
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: the first GPU, else the CPU)")
    return parse(parser, arguments)


def _lacking(options: argparse.Namespace) -> str:
    return "" if options.prompt or options.prompt_file is not None else "give a text by --prompt or --prompt-file"


def _above_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return number


def _share(text: str) -> float:
    if (number := _above_0(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0 and at most 1")
    return number


def _student(place: Path) -> tuple[Path, Config | None]:
    """Return the directory of the model that `place` names, and the configuration if it is a run's.

    Raises ConfigError if it is neither a model nor a run with an export.
    """
    if (place / "config.json").is_file():
        return place, None
    if not (place / "config.yaml").is_file():
        raise ConfigError(
            f"{place} is neither the directory of a run (it has no config.yaml) nor that of a Hugging Face model (no "
            "config.json)"
        )
    # exports/step-<step>-<dtype>, by `ddk export`
    exports = sorted(
        (place / "exports").glob("step-*/config.json"), key=lambda path: int(path.parent.name.split("-")[1])
    )
    found = [path.parent for path in (place / "export/config.json", *reversed(exports)) if path.is_file()]
    if not found:
        raise ConfigError(
            f"{place} has no exported student yet: make one of its newest checkpoint by `ddk export {place}`"
        )
    return found[0], load_config(place / "config.yaml")


def _continue(
    student: Path, config: Config | None, options: argparse.Namespace
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the prompts, and the continuations of all of them by each model's title."""
    # Imported here: torch and transformers take seconds, for which a wrong path need not wait.
    import torch

    from ddk_ds.comm import SingleProcess
    from ddk_ds.data.shared_vocabulary import base_fingerprint
    from ddk_ds.data.tokenizer import load_tokenizer
    from ddk_ds.engine.generation import Decoding, continue_prompts
    from ddk_ds.engine.model_files import DTYPES, check_code, model_directory, read_model

    prompts = [*options.prompt]
    if options.prompt_file is not None:
        prompts += read_lines(options.prompt_file, "--prompt-file")
    models = {f"student: {student}": (student, config is not None and config.student.trust_remote_code)}
    if config is not None and config.teacher is not None:
        teacher = model_directory(config.teacher.path, "teacher.path", SingleProcess())
        models[f"teacher: {config.teacher.path}"] = teacher, config.teacher.trust_remote_code
        ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
        if ours.fingerprint != base_fingerprint(theirs, ours.vocab_size):
            raise ConfigError(f"{student} and teacher.path {teacher} have different tokenizers: not this run's pair")
    for directory, trusted in models.values():
        check_code(read_model(directory, "model"), "model", trusted=trusted)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
    decoding = Decoding(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.chat)
    texts = {
        title: continue_prompts(
            directory, prompts, decoding, dtype=DTYPES.get(options.dtype, "auto"), device=device, trusted=trusted
        )
        for title, (directory, trusted) in models.items()
    }
    return prompts, texts


def _shown(prompt: str, texts: Mapping[str, str], width: int) -> RenderableType:
    """Return the prompt and what each model made of it: side by side where the terminal is wide, else below."""
    head = Text.assemble(("prompt  ", "bold"), _printable(prompt))
    texts = {title: _printable(text) for title, text in texts.items()}
    if width < _SIDE_BY_SIDE:
        parts = [Text.assemble((f"{title}\n", "bold"), text) for title, text in texts.items()]
        return Group(head, *parts, "")
    table = Table(expand=True, show_header=False)
    for _ in texts:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(title, "bold") for title in texts), end_section=True)
    table.add_row(*(Text(text) for text in texts.values()))
    return Group(head, table, "")


def _printable(text: str) -> str:
    """Return the text without control characters: a terminal would obey what a model writes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text.expandtabs(4))
