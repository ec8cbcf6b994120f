"""Encoding in parallel: documents to ids with EOS, in the same order for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ddk_ds.data.packing import Ids
from ddk_ds.data.tokenizer import TokenizerInfo, load_tokenizer
from ddk_ds.errors import DataError

Encoded = tuple[Ids, npt.NDArray[np.int64]]
_BATCHES_AHEAD = 3


class Batch(Protocol):
    """Texts that are encoded together; what else the caller keeps with them comes back beside their ids."""

    @property
    def texts(self) -> list[str]: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class BatchEncoder(Protocol):
    """Batches to (batch, its ids), in order, reading only a few batches ahead."""

    def __call__(self, batches: Iterable[AnyBatch], /) -> Iterator[tuple[AnyBatch, Encoded]]: ...


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
    """A killed parent closes no queue: its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    assert _encoder is not None, "_start_worker runs first in every worker"
    return _encoder(texts)


@contextmanager
def batch_encoder(directory: Path, dtype: str, workers: int) -> Iterator[BatchEncoder]:
    """A function from batches of texts to their ids.

    Args:
        directory: the tokenizer's.
        dtype: of the ids.
        workers: processes; 1 encodes in this one.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        yield partial(_here, TextEncoder(load_tokenizer(directory), dtype))
        return
    # spawn: a fork would copy locks that the caller's threads hold (progress bar, tokenizers' own pool).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (directory, dtype)) as pool:
        try:
            yield partial(_in_order, pool, _BATCHES_AHEAD * workers)
        except BrokenProcessPool as error:
            raise DataError(
                f"a tokenising process died ({error}); if memory ran out, give fewer --workers; "
                "the same command goes on from the last finished part"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _here(encoder: TextEncoder, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Encoded]]:
    for batch in batches:
        yield batch, encoder(batch.texts)


def _in_order(
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
