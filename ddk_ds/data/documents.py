"""The documents of a domain: its texts, limited, without exact duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ddk_ds.data.formats import Dropped, Meter, read_texts
from ddk_ds.data.recipe import Domain, SourceFile

__all__ = ["Document", "Dropped", "Position", "Seen", "read_documents", "read_texts"]


class Seen(Protocol):
    """Digests met so far: a set, or what stands for one that memory would not hold."""

    def __contains__(self, digest: object, /) -> bool: ...

    def add(self, digest: bytes, /) -> None: ...


@dataclass(frozen=True)
class Document:
    """One text. `digest` (16 bytes) depends on the text and the seed alone."""

    text: str
    num_bytes: int
    digest: bytes


@dataclass
class Position:
    """How far a domain is read: enough to go on from there.

    `texts` texts of file number `file` are taken, and all of the files before it; the documents so far have
    `num_bytes` bytes.
    """

    file: int = 0
    texts: int = 0
    num_bytes: int = 0


def read_documents(
    domain: Domain,
    files: Sequence[SourceFile],
    *,
    seed: int,
    seen: Seen,
    dropped: Dropped,
    position: Position | None = None,
    meter: Meter | None = None,
    scratch: Path | None = None,
) -> Iterator[Document]:
    """The documents of one domain, in the order of its files; counts what it leaves out in `dropped`.

    Args:
        seed: keys the digests, and so decides which documents are held out.
        seen: digests met so far; grows. Shared by all domains of a preparation, it keeps every text in the
            first domain that has it.
        position: where to begin, after the last document that came from there; kept up to date.
        meter: counts the bytes read.
        scratch: where a remote file lies while it is read.

    Raises:
        DataError: a file is damaged, is not of its format, lacks the text field, or cannot be downloaded.
    """
    key = seed.to_bytes(8, "little")
    position = position or Position()
    for number in range(position.file, len(files)):
        if number != position.file:
            position.file, position.texts = number, 0
        for text in _texts_from(files[number], position.texts, dropped, meter, scratch):
            if domain.max_bytes is not None and position.num_bytes >= domain.max_bytes:
                return
            position.texts += 1
            document = _make_document(text, domain, key, dropped)
            if document is None:
                continue
            if document.digest in seen:
                dropped.duplicates += 1
                continue
            seen.add(document.digest)
            position.num_bytes += document.num_bytes
            yield document


def _texts_from(
    file: SourceFile, taken: int, dropped: Dropped, meter: Meter | None, scratch: Path | None
) -> Iterator[str]:
    """The texts of a file after the first `taken`, which were counted when they were taken."""
    counted = Dropped(**vars(dropped))
    for number, text in enumerate(read_texts(file, dropped, meter=meter, scratch=scratch), 1):
        if number > taken:
            yield text
        elif number == taken:
            vars(dropped).update(vars(counted))


def _make_document(text: str, domain: Domain, key: bytes, dropped: Dropped) -> Document | None:
    if len(text) < domain.min_chars or text.isspace():
        dropped.too_short += 1
        return None
    if domain.max_chars is not None and len(text) > domain.max_chars:
        text = text[: domain.max_chars]
        dropped.cut += 1
    try:
        data = text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no text
        dropped.undecodable += 1
        return None
    return Document(text, len(data), hashlib.blake2b(data, digest_size=16, key=key).digest())
