"""Tokenizers: load and fingerprint one, train and save a byte-level BPE, and encode documents in parallel.

Encoding closes each document with the EOS token; its order is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ddk_ds.data.documents import Dropped, read_documents
from ddk_ds.data.mds import Ids
from ddk_ds.data.recipe import Recipe, list_files
from ddk_ds.errors import DataError

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer and its identity.

    `vocab` maps token to id, added tokens included; `vocab_size` is the largest id + 1; `fingerprint` is the
    sha256 of the sorted (token, id) map: equal fingerprints mean that every id has the same meaning.
    """

    tokenizer: Tokenizer
    vocab: dict[str, int]
    fingerprint: str
    vocab_size: int
    eos_token_id: int | None


def load_tokenizer(directory: Path) -> TokenizerInfo:
    """Load `directory`/tokenizer.json.

    The EOS token is the one that tokenizer_config.json, or else special_tokens_map.json, names. Text that
    happens to spell a special token is encoded as ordinary text.

    Raises:
        DataError: no tokenizer.json, a broken file, or an EOS token that the vocabulary lacks.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{directory} holds no tokenizer.json; give the directory of a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return TokenizerInfo(
        tokenizer=tokenizer,
        vocab=vocab,
        fingerprint=fingerprint(vocab),
        vocab_size=max(vocab.values()) + 1,
        eos_token_id=_eos_token_id(directory, vocab),
    )


def fingerprint(vocab: Mapping[str, int]) -> str:
    """Return the sha256 (hexadecimal) of the sorted (token, id) map."""
    return hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()


def _eos_token_id(directory: Path, vocab: Mapping[str, int]) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a JSON object: {error}") from None
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if token not in vocab:
            raise DataError(f"{path} names the EOS token {token!r}, which tokenizer.json lacks")
        return vocab[token]
    return None


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
            yield document.text


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


Encoded = tuple[Ids, npt.NDArray[np.int64]]
_BATCHES_AHEAD = 3


class Batch(Protocol):
    """Texts that are encoded together. The encoder returns the batch object itself with the ids."""

    @property
    def texts(self) -> list[str]: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class BatchEncoder(Protocol):
    """A function from batches to pairs (batch, its ids), in order; it reads only a few batches ahead."""

    def __call__(self, batches: Iterable[AnyBatch], /) -> Iterator[tuple[AnyBatch, Encoded]]: ...


class TextEncoder:
    """A function from texts to their ids in `dtype`, each text closed by the tokenizer's EOS."""

    def __init__(self, info: TokenizerInfo, dtype: str) -> None:
        assert info.eos_token_id is not None, "prepare refuses a tokenizer without EOS"
        self._tokenizer = info.tokenizer
        self._eos = [info.eos_token_id]
        self._dtype = dtype

    def __call__(self, texts: list[str]) -> Encoded:
        """Return the ids of all texts in a row (n,), and the number of ids of each text (len(texts),)."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids + self._eos for encoding in encodings]
        lengths = np.array([len(document) for document in ids], np.int64)
        return np.fromiter(chain.from_iterable(ids), self._dtype, int(lengths.sum())), lengths


_encoder: TextEncoder | None = None


def _start_worker(directory: Path, dtype: str) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = TextEncoder(load_tokenizer(directory), dtype)


def _end_with_parent() -> None:
    """End this worker when its parent has ended; a killed parent closes no queue, and workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    assert _encoder is not None, "_start_worker runs first in every worker"
    return _encoder(texts)


@contextmanager
def batch_encoder(directory: Path, dtype: str, workers: int) -> Iterator[BatchEncoder]:
    """Yield a function from batches of texts to their ids.

    Args:
        directory: directory of the tokenizer.
        dtype: dtype of the ids.
        workers: number of encoding processes; 1: this process encodes.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        yield partial(_encode_here, TextEncoder(load_tokenizer(directory), dtype))
        return
    # spawn: a fork would copy locks that the caller's threads hold (progress bar, tokenizers' own pool).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (directory, dtype)) as pool:
        try:
            yield partial(_encode_in_pool, pool, _BATCHES_AHEAD * workers)
        except BrokenProcessPool as error:
            raise DataError(
                f"a tokenising process died ({error}); if memory ran out, give fewer --workers; "
                "the same command goes on from the last finished part"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_here(encoder: TextEncoder, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Encoded]]:
    for batch in batches:
        yield batch, encoder(batch.texts)


def _encode_in_pool(
    pool: ProcessPoolExecutor, max_waiting: int, batches: Iterable[AnyBatch]
) -> Iterator[tuple[AnyBatch, Encoded]]:
    waiting: deque[tuple[AnyBatch, Future[Encoded]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode, batch.texts)))
        if len(waiting) >= max_waiting:
            first, encoded = waiting.popleft()
            yield first, encoded.result()
    while waiting:
        first, encoded = waiting.popleft()
        yield first, encoded.result()
