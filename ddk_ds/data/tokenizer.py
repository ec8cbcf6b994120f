"""Tokenizers: load and identify one, train and save a byte-level BPE."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from ddk_ds.data.conversations import parse_conversation, strings_in
from ddk_ds.data.documents import Dropped, read_documents
from ddk_ds.data.ordinary_text import OrdinaryText, ordinary_text
from ddk_ds.data.recipe import Recipe, list_files
from ddk_ds.errors import DataError

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")
_GOES_BY_FILE = int(version("transformers").partition(".")[0]) >= 5
"""True for transformers 5, which leaves BOS to tokenizer.json and ignores `add_bos_token`, but for two classes."""
_BOS_OF_CLASS = {"CodeLlamaTokenizer": ("<s>", True), "GPTNeoXTokenizer": ("<|endoftext|>", False)}
"""Tokenizer classes of transformers that do not go by tokenizer.json: their BOS, and the default of `add_bos_token`."""
if not _GOES_BY_FILE:
    _BOS_OF_CLASS |= {
        "LlamaTokenizer": ("<s>", True),
        "GemmaTokenizer": ("<bos>", True),
        "CohereTokenizer": ("<BOS_TOKEN>", True),
    }


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer and its identity.

    `tokenizer` is that of the file `path`, without its truncation and padding. `vocab` maps token to id, added tokens
    included; `vocab_size` is the largest id + 1; `fingerprint` is the sha256 of the sorted (token, id) map: equal
    fingerprints mean that every id has the same meaning. `added` are the added tokens, which its model does not know.
    `bos` are the ids that the tokenizer puts before a text.
    """

    path: Path
    tokenizer: Tokenizer
    vocab: dict[str, int]
    added: frozenset[str]
    fingerprint: str
    vocab_size: int
    bos_token: str | None
    eos_token_id: int | None
    bos: tuple[int, ...]

    @cached_property
    def text(self) -> OrdinaryText:
        """The encoder of text, which gives no control token."""
        ends = {token for token, number in self.vocab.items() if number == self.eos_token_id}
        named = ends if self.bos_token is None else {*ends, self.bos_token}
        return ordinary_text(self.path, self.vocab, named)


def load_tokenizer(directory: Path) -> TokenizerInfo:
    """Load `directory`/tokenizer.json.

    The BOS and EOS tokens are those that tokenizer_config.json, or else special_tokens_map.json, names. Truncation and
    padding, which tokenizer.json can ask for, are off. To encode text use `text`, to which a text that spells a control
    token is ordinary text; `tokenizer` finds such a token if its model has it as a word or piece.

    Raises:
        DataError: no tokenizer.json, a broken file, or an EOS token that the vocabulary lacks.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        original = original_file(directory)
        if original is None:
            raise DataError(f"{directory} holds no tokenizer.json; give the directory of a fast tokenizer")
        raise DataError(
            f"{directory} holds {original[0].name} and no tokenizer.json: `ddk tokenizer --convert {directory}` makes "
            f"one (it needs pip install {original[1]}) and compares both on a thousand lines"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    bos_token, eos_token = (_special_token(directory, vocab, key) for key in ("bos_token", "eos_token"))
    return TokenizerInfo(
        path=path,
        tokenizer=tokenizer,
        vocab=vocab,
        added=frozenset(str(token) for token in tokenizer.get_added_tokens_decoder().values()),
        fingerprint=fingerprint(vocab),
        vocab_size=max(vocab.values()) + 1,
        bos_token=bos_token,
        eos_token_id=None if eos_token is None else vocab[eos_token],
        bos=_bos(directory, tokenizer, bos_token),
    )


def original_file(directory: Path) -> tuple[Path, str] | None:
    """Return the file of a tokenizer in its original form, and the package that reads it; None if there is none."""
    for file in sorted((*directory.glob("*.tiktoken"), *directory.glob("*.model"))):
        with file.open("rb") as stream:
            first = stream.readline(200)
        # tiktoken's ranks are lines of a token in base64 and a number.
        return file, "tiktoken" if _RANK.fullmatch(first.strip()) else "sentencepiece"
    return None


def fingerprint(vocab: Mapping[str, int]) -> str:
    """Return the sha256 (hexadecimal) of the sorted (token, id) map."""
    return hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()


def _special_token(directory: Path, vocab: Mapping[str, int], key: str) -> str | None:
    """Return the token that tokenizer_config.json, or else special_tokens_map.json, names.

    A BOS token that the vocabulary lacks is none: no text begins with it.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_settings(directory / name).get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if token in vocab:
            return str(token)
        if key == "eos_token":
            raise DataError(f"{directory / name} names the EOS token {token!r}, which tokenizer.json lacks")
    return None


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object: it is a {type(content).__name__}")
    return content


def _bos(directory: Path, tokenizer: Tokenizer, named: str | None) -> tuple[int, ...]:
    """Return the ids that the tokenizer itself puts before a text, as transformers loads it."""
    config = read_settings(directory / "tokenizer_config.json")
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name in _BOS_OF_CLASS:
        token, adds = _BOS_OF_CLASS[name]
        number = tokenizer.token_to_id(named or token)
        adds = adds if _GOES_BY_FILE else config.get("add_bos_token", adds)
        return (number,) if adds and number is not None else ()

    return added_before(lambda text, **options: encode(tokenizer, text, **options).ids)


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> Encoding:
    """Return the encoding of a text. Raises DataError if the tokenizer has no token for a part of it."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"the tokenizer cannot encode {text[:80]!r}: {error}; repair its tokenizer.json") from error


def added_before(encode: Callable[..., Sequence[int]]) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text: its BOS, as a rule.

    Args:
        encode: function of a text and the keyword `add_special_tokens`, which returns ids.
    """
    bare, whole = (list(encode("a", add_special_tokens=added)) for added in (False, True))
    begin = next(start for start in range(len(whole) + 1) if whole[start : start + len(bare)] == bare)
    return tuple(whole[:begin])


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that the token ids `new` add to that of `prompt`.

    Decoded alone, they would lose the space before the first word in some vocabularies.
    """
    begin, whole = decode(prompt), decode([*prompt, *new])
    return whole.removeprefix(begin) if whole.startswith(begin) else decode(new)


def train_tokenizer(recipe: Recipe, vocab_size: int, *, domain_bytes: int = 1_000_000) -> Tokenizer:
    """Train a byte-level BPE on up to `domain_bytes` of UTF-8 text of each domain, so that domains weigh the same.

    Raises:
        DataError: `vocab_size` is less than all bytes and special tokens, or the text gives fewer tokens.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < least:
        raise DataError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens are {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (EOS_TOKEN, PAD_TOKEN)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(recipe, domain_bytes), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the recipe's text gives {tokenizer.get_vocab_size():,} tokens, not {vocab_size:,}: "
            "add text or lower the vocabulary's size"
        )
    return tokenizer


def _sample(recipe: Recipe, domain_bytes: int) -> Iterator[str]:
    seen: set[bytes] = set()
    for name, files in list_files(recipe).items():
        domain = recipe.domains[name]
        limit = min(domain_bytes, domain.max_bytes or domain_bytes)
        capped = domain.model_copy(update={"max_bytes": limit})
        for document in read_documents(capped, files, seed=0, seen=seen, dropped=Dropped()):
            chat = domain.chat is not None
            yield from strings_in(parse_conversation(document.text).messages) if chat else [document.text]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a directory that `transformers.AutoTokenizer.from_pretrained` and `load_tokenizer` can read.

    Raises:
        DataError: the directory already holds a tokenizer.
    """
    refuse_existing(directory)
    directory.mkdir(parents=True, exist_ok=True)
    special = {"eos_token": EOS_TOKEN, "bos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        # Otherwise transformers adds token_type_ids, which causal models refuse in generate().
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(directory / "tokenizer_config.json", config)
    tokenizer.save(str(directory / "tokenizer.json"))


def refuse_existing(directory: Path) -> None:
    """Raise DataError if the directory already holds a tokenizer."""
    if (directory / "tokenizer.json").exists():
        raise DataError(f"{directory} already holds a tokenizer; choose another directory or delete it first")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
