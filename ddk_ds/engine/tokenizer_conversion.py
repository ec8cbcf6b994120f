"""tokenizer.json from a model that ships its tokenizer as a SentencePiece model or as tiktoken's ranks alone.

transformers converts both, but not always right: for Llama's class version 5 gives other tokens to text with several
spaces, and a rank file does not hold the regular expression that cuts text into words. So a conversion counts only if
it gives the tokens of the original library to 1,000 lines of prose, code and odd characters.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from ddk_ds.data.same_cuts import probe_lines
from ddk_ds.data.tokenizer import original_file, read_settings, refuse_existing
from ddk_ds.errors import DataError
from ddk_ds.files import write_text

NUM_LINES = 1000
Encode = Callable[[str], list[int]]


def convert_tokenizer(directory: Path, pattern: str | None = None, *, trusted: bool = False) -> Path:
    """Write tokenizer.json next to the original file, and return the original's path.

    Without a tokenizer_config.json, one is written that names a SentencePiece model's BOS and EOS.

    Args:
        pattern: the regular expression of a tiktoken encoding; None takes it from Python code of the directory.
        trusted: permits that code.

    Raises:
        DataError: the directory has a tokenizer.json or no original, a package is missing, the pattern is not known, or
            no conversion gives the original's tokens.
    """
    refuse_existing(directory)
    original = original_file(directory)
    if original is None:
        raise DataError(f"--convert {directory}: holds neither a SentencePiece model nor tiktoken's ranks")
    file, package = original
    if importlib.util.find_spec(package) is None:
        raise DataError(f"--convert {directory}: {file.name} is read by {package}: pip install {package}")
    settings = read_settings(directory / "tokenizer_config.json")
    if package == "tiktoken":
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # it would keep this file's content by its path
        encode, candidates = _tiktoken(directory, file, pattern, settings, trusted=trusted)
    else:
        encode, candidates, special = _sentencepiece(directory, file)
        settings = settings or {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    reasons: list[str] = []
    for candidate in candidates:
        tokenizer = _converted(candidate, encode, reasons)
        if tokenizer is not None:
            break
    else:
        raise DataError(
            f"--convert {directory}: no conversion of {file.name} gives the tokens of {package} "
            f"({'; '.join(reasons)}): choose a model with a tokenizer.json"
        )
    tokenizer.post_processor = _begin(tokenizer, settings)
    if not (directory / "tokenizer_config.json").is_file() and settings:
        write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    return file


def _converted(candidate: Callable[[], Tokenizer], encode: Encode, reasons: list[str]) -> Tokenizer | None:
    """Return a tokenizer if it can be made and encodes as `encode` does; otherwise add the reason to `reasons`."""
    try:
        tokenizer = candidate()
    except Exception as error:  # transformers raises whatever a class runs into
        reasons.append((str(error).strip() or type(error).__name__).splitlines()[0][:120])
        return None
    differing = [line for line in _lines() if tokenizer.encode(line, add_special_tokens=False).ids != encode(line)]
    if differing:
        reasons.append(f"{len(differing):,} of {NUM_LINES:,} lines differ, such as {differing[0][:40]!r}")
        return None
    return tokenizer


def _sentencepiece(directory: Path, file: Path) -> tuple[Encode, list[Callable[[], Tokenizer]], dict[str, str]]:
    """Return the original's function, ways to convert it, and its special tokens by their keys."""
    from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

    model = import_module("sentencepiece").SentencePieceProcessor(model_file=str(file))
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    special = {key: model.id_to_piece(number) for key, number in ids.items() if number >= 0}

    def by(loader: Any) -> Callable[[], Tokenizer]:
        def convert() -> Tokenizer:
            backend: Tokenizer = loader.from_pretrained(directory, local_files_only=True).backend_tokenizer
            return Tokenizer.from_str(backend.to_str())

        return convert

    def encode(text: str) -> list[int]:
        found: list[int] = model.encode(text)
        return found

    return encode, [by(AutoTokenizer), by(LlamaTokenizerFast), by(PreTrainedTokenizerFast)], special


def _tiktoken(
    directory: Path, file: Path, pattern: str | None, settings: dict[str, Any], *, trusted: bool
) -> tuple[Encode, list[Callable[[], Tokenizer]]]:
    """Return the original's function and the way to convert it."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if pattern is not None:
        named = {token["content"]: int(number) for number, token in settings.get("added_tokens_decoder", {}).items()}
        ranks = import_module("tiktoken.load").load_tiktoken_bpe(str(file))
        encoding = import_module("tiktoken").Encoding(
            file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=named
        )
    else:
        encoding = _own_encoding(directory, trusted=trusted)
    special: dict[str, int] = dict(sorted(encoding._special_tokens.items(), key=lambda item: item[1]))

    def convert() -> Tokenizer:
        converter: Any = TikTokenConverter(vocab_file=str(file), pattern=encoding._pat_str)
        # The name of this argument differs between transformers 4 and 5.
        converter.additional_special_tokens = converter.extra_special_tokens = list(special)
        tokenizer = converter.converted()
        wrong = [token for token, number in special.items() if tokenizer.token_to_id(token) != number]
        if wrong:
            raise ValueError(f"{wrong[0]} gets another id than {special[wrong[0]]}")
        return tokenizer

    return encoding.encode_ordinary, [convert]


def _own_encoding(directory: Path, *, trusted: bool) -> Any:
    """Return the tiktoken encoding inside the tokenizer that the directory's own Python code makes."""
    from transformers import AutoTokenizer

    if not trusted or not any(directory.glob("*.py")):
        raise DataError(
            f"--convert {directory}: tiktoken's ranks do not say how text is cut into words: give that regular "
            "expression by --pattern, or if the directory has the tokenizer's Python code, read it and permit it by "
            "--trust-remote-code"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, use_fast=False, trust_remote_code=True, local_files_only=True
        )
    except Exception as error:  # whatever that code raises
        raise DataError(f"--convert {directory}: its own code fails ({error}); give --pattern") from error
    found = [value for value in vars(tokenizer).values() if isinstance(value, import_module("tiktoken").Encoding)]
    if not found:
        raise DataError(f"--convert {directory}: its own code has no tiktoken encoding; give --pattern")
    return found[0]


def _begin(tokenizer: Tokenizer, settings: dict[str, Any]) -> Any:
    """Return the post-processor that puts the BOS token before a text, if the settings ask for it."""
    token = settings.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = None if token is None else tokenizer.token_to_id(token)
    if not settings.get("add_bos_token") or number is None:
        return None
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


def _lines() -> Iterator[str]:
    """Yield NUM_LINES different texts: prose, code, formulas, spaces, and characters of all planes."""
    probe = probe_lines()
    yield from (
        "",
        " ",
        "a  b   c",
        "\ta\t\tb",
        "x\r\ny\n\n\nz ",
        "e\u0301 é ﬁ ① ½",
        "全角\u3000空白",
        "\u200b\ufeff\x00\x01",
    )
    yield from probe
    yield from (f"  {line}   " for line in probe)
    code = Path(ast.__file__).read_text(encoding="utf-8").splitlines()
    yield from code[:400]
    draw = random.Random(0)
    for number in range(NUM_LINES - 8 - 2 * len(probe) - 400):
        if number % 2:
            yield "\n".join(draw.sample(probe, 2)) + " " * draw.randrange(9) + draw.choice(code)
        else:
            points = (
                draw.choice((draw.randrange(32, 0x3000), draw.randrange(0x1F300, 0x1FA00), 32)) for _ in range(30)
            )
            yield "".join(map(chr, points))
