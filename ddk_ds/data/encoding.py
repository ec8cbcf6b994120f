"""Documents to token ids, in parallel: each begins with the BOS that the recipe asks for and ends with the EOS token.

Conversations begin and end as their template has them (chat_encoding.py). The order is the same for any number of
processes.
"""

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
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ddk_ds.data.chat_encoding import ChatEncoder, ChatStyle, Conversations
from ddk_ds.data.long_documents import Part
from ddk_ds.data.mds import Ids
from ddk_ds.data.screening import Marks, Screening
from ddk_ds.data.tokenizer import TokenizerInfo, load_tokenizer
from ddk_ds.errors import DataError

_BATCHES_AHEAD = 3


class Encoded(NamedTuple):
    """The ids of some parts of documents in a row (n,), the number of ids of each part, and the control tokens found.

    `control_tokens` counts those that the text spells, which are split or dropped. Of `conversations` ids and lengths
    are those of the ones that are kept; None: the parts are text.
    """

    ids: Ids
    lengths: npt.NDArray[np.int64]
    control_tokens: int
    conversations: Conversations | None = None


class Batch(Protocol):
    """Parts of documents that are encoded together. The encoder returns the batch object itself with the ids.

    `texts` are the complete documents that end in it.
    """

    @property
    def parts(self) -> list[Part]: ...

    @property
    def texts(self) -> list[str]: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class BatchEncoder(Protocol):
    """A function from batches to (batch, its ids, its marks), in order; it reads only a few batches ahead.

    The parts are conversations of a style; None: text.
    """

    def __call__(
        self, batches: Iterable[AnyBatch], style: ChatStyle | None = None, /
    ) -> Iterator[tuple[AnyBatch, Encoded, Marks]]: ...


class TextEncoder:
    """A function from parts of documents to their ids in `dtype`."""

    def __init__(self, info: TokenizerInfo, dtype: str, bos: tuple[int, ...]) -> None:
        """Store the tokenizer; a document begins with the ids `bos` and ends with EOS."""
        assert info.eos_token_id is not None, "prepare refuses a tokenizer without EOS"
        self._text = info.text
        self._bos = list(bos)
        self._eos = [info.eos_token_id]
        self._dtype = dtype

    def __call__(self, parts: list[Part]) -> Encoded:
        """Return the ids of the parts. Raises DataError if one cannot be encoded."""
        texts, control_tokens = self._text.encode_all([part.text for part in parts])
        ids = [
            [*(self._bos if part.opens else ()), *text, *(self._eos if part.closes else ())]
            for part, text in zip(parts, texts, strict=True)
        ]
        lengths = np.array([len(part) for part in ids], np.int64)
        joined = np.fromiter(chain.from_iterable(ids), self._dtype, int(lengths.sum()))
        return Encoded(joined, lengths, control_tokens)


class _Work:
    """The work on a batch: the ids of its parts, and the marks of its complete documents."""

    def __init__(self, info: TokenizerInfo, dtype: str, bos: tuple[int, ...], screening: Screening) -> None:
        self._info, self._screening = info, screening
        self._text = TextEncoder(info, dtype, bos)
        self._chats: dict[ChatStyle, ChatEncoder] = {}

    def __call__(self, parts: list[Part], texts: list[str], style: ChatStyle | None) -> tuple[Encoded, Marks]:
        return self._encoded(parts, style), self._screening(texts)

    def _encoded(self, parts: list[Part], style: ChatStyle | None) -> Encoded:
        if style is None:
            return self._text(parts)
        if style not in self._chats:
            self._chats[style] = ChatEncoder(self._info, style)
        found = self._chats[style]([part.text for part in parts])
        return Encoded(found.ids, found.lengths, 0, found)


_work: _Work | None = None


def _start_worker(directory: Path, dtype: str, bos: tuple[int, ...], screening: Screening) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: the parent ends its workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = _Work(load_tokenizer(directory), dtype, bos, screening)


def end_with_parent() -> None:
    """End this process when its parent has ended; a killed parent closes no queue, and workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _run(parts: list[Part], texts: list[str], style: ChatStyle | None) -> tuple[Encoded, Marks]:
    assert _work is not None, "_start_worker runs first in every worker"
    return _work(parts, texts, style)


@contextmanager
def batch_encoder(
    info: TokenizerInfo, dtype: str, bos: tuple[int, ...], workers: int, screening: Screening
) -> Iterator[BatchEncoder]:
    """Yield a function from batches of parts to their ids, and to the documents' marks.

    Args:
        info: the tokenizer, which each process loads for itself.
        dtype: dtype of the ids.
        bos: ids at the beginning of each document of text.
        workers: number of encoding processes; 1: this process encodes.
        screening: computes the marks.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        yield partial(_encode_here, _Work(info, dtype, bos, screening))
        return
    # spawn: a fork would copy locks that the caller's threads hold (progress bar, tokenizers' own pool).
    context = multiprocessing.get_context("spawn")
    start = info.path.parent, dtype, bos, screening
    with ProcessPoolExecutor(workers, context, _start_worker, start) as pool:
        try:
            yield partial(_encode_in_pool, pool, _BATCHES_AHEAD * workers)
        except BrokenProcessPool as error:
            raise DataError(
                f"a tokenising process died ({error}); if memory ran out, give fewer --workers; "
                "the same command goes on from the last finished part"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_here(
    work: _Work, batches: Iterable[AnyBatch], style: ChatStyle | None = None
) -> Iterator[tuple[AnyBatch, Encoded, Marks]]:
    for batch in batches:
        yield batch, *work(batch.parts, batch.texts, style)


def _encode_in_pool(
    pool: ProcessPoolExecutor, max_waiting: int, batches: Iterable[AnyBatch], style: ChatStyle | None = None
) -> Iterator[tuple[AnyBatch, Encoded, Marks]]:
    waiting: deque[tuple[AnyBatch, Future[tuple[Encoded, Marks]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_run, batch.parts, batch.texts, style)))
        if len(waiting) >= max_waiting:
            first, done = waiting.popleft()
            yield first, *done.result()
    while waiting:
        first, done = waiting.popleft()
        yield first, *done.result()
