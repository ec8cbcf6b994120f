"""Encoding in parallel: documents to ids with EOS, in the same order for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.packing import Ids
from ddk_ds.data.tokenizer import TokenizerInfo, load_tokenizer

Encoded = tuple[Ids, npt.NDArray[np.int64]]
BatchEncoder = Callable[[Iterable[list[str]]], Iterator[Encoded]]
_BATCHES_AHEAD = 4


class TextEncoder:
    """Texts to ids of `dtype`, each text closed by the tokenizer's EOS."""

    def __init__(self, info: TokenizerInfo, dtype: str) -> None:
        assert info.eos_token_id is not None, "prepare refuses a tokenizer without EOS"
        self._tokenizer = info.tokenizer
        self._eos = [info.eos_token_id]
        self._dtype = dtype

    def __call__(self, texts: list[str]) -> Encoded:
        """The ids of all texts in a row (n,), and the number of ids of each text (len(texts),)."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids + self._eos for encoding in encodings]
        tokens = np.concatenate([np.array(document, self._dtype) for document in ids])
        return tokens, np.array([len(document) for document in ids], np.int64)


_encoder: TextEncoder | None = None


def _start_worker(directory: Path, dtype: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = TextEncoder(load_tokenizer(directory), dtype)


def _encode(texts: list[str]) -> Encoded:
    assert _encoder is not None, "_start_worker runs first in every worker"
    return _encoder(texts)


@contextmanager
def batch_encoder(directory: Path, dtype: str, workers: int) -> Iterator[BatchEncoder]:
    """A function from batches of texts to their `Encoded`, in order, reading only a few batches ahead.

    Args:
        directory: the tokenizer's.
        dtype: of the ids.
        workers: processes; 1 encodes in this one.
    """
    if workers == 1:
        yield partial(map, TextEncoder(load_tokenizer(directory), dtype))
        return
    # spawn: a fork would copy locks that the caller's threads hold (progress bar, tokenizers' own pool).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (directory, dtype)) as pool:
        yield partial(_in_order, pool, _BATCHES_AHEAD * workers)


def _in_order(pool: ProcessPoolExecutor, max_waiting: int, batches: Iterable[list[str]]) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode, batch))
        if len(waiting) >= max_waiting:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
