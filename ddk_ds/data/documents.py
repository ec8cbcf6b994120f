"""The documents of a recipe's domains: text files of every format, limited, without exact duplicates."""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import zstandard
from pyarrow import parquet

from ddk_ds.data.recipe import Domain, Format, SourceFile
from ddk_ds.errors import DataError

_DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException)
_BLOCK_END = re.compile(r"<\s*(?:/(?:p|li|ul|ol|dl|dd|dt|h\d|div|tr|table|note)|br\s*/?)\s*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]+>")
_BLANK_LINES = re.compile(r"\s*\n\s*")


@dataclass(frozen=True)
class Document:
    """One text. `digest` (16 bytes) depends on the text and the seed alone."""

    text: str
    num_bytes: int
    digest: bytes


@dataclass
class Dropped:
    """What did not come through, counted."""

    duplicates: int = 0
    undecodable: int = 0
    too_short: int = 0
    cut: int = 0
    tail_tokens: int = 0


def read_documents(
    domain: Domain, files: Sequence[SourceFile], *, seed: int, seen: set[bytes], dropped: Dropped
) -> Iterator[Document]:
    """The documents of one domain, in the order of its files; counts what it leaves out in `dropped`.

    Args:
        seed: keys the digests, and so decides which documents are held out.
        seen: digests met so far; grows. Shared by all domains of a preparation, it keeps every text in the
            first domain that has it.

    Raises:
        DataError: a file is damaged, is not of its format, or lacks the text field.
    """
    key = seed.to_bytes(8, "little")
    num_bytes = 0
    for file in files:
        for text in read_texts(file, dropped):
            if domain.max_bytes is not None and num_bytes >= domain.max_bytes:
                return
            document = _make_document(text, domain, key, dropped)
            if document is None:
                continue
            if document.digest in seen:
                dropped.duplicates += 1
                continue
            seen.add(document.digest)
            num_bytes += document.num_bytes
            yield document


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


def read_texts(file: SourceFile, dropped: Dropped) -> Iterator[str]:
    """Every text of one file, whole; undecodable files (jsonl: lines) are skipped and counted.

    Formats: `text`, the file is one document; `jsonl`, one object a line, text in `text_field`;
    `json_strings`, one JSON value, each string under the key `text_field` at any depth is a document;
    `parquet`, one row one document, text in the column `text_field`. All but parquet may be compressed
    (.gz, .zst).

    Raises:
        DataError: names the file, and the line where there is one.
    """
    reader = _READERS[file.source.format or _format_of(file.path)]
    try:
        for text in reader(file, dropped):
            yield _strip_html(text) if file.source.strip_html else text
    except _DAMAGE as error:
        raise DataError(f"{file.path} cannot be read: {error}; repair or exclude it in the recipe") from error


def _format_of(path: Path) -> Format:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return "parquet"
    # Corpora publish .json.gz files of one object a line (C4); a plain .json file is one text like any other.
    lines = (".jsonl", ".ndjson") if name == path.name.lower() else (".jsonl", ".ndjson", ".json")
    return "jsonl" if name.endswith(lines) else "text"


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFrames(path))
    return path.open("rb")


class _ZstdFrames(io.RawIOBase):
    """A .zst file of any number of frames (parallel compressors and appending make several), of long windows.

    zstandard's own stream_reader takes a file that ends inside a frame for a whole one: this raises EOFError.
    """

    def __init__(self, path: Path) -> None:
        self._chunks = _decompress(path)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decompress(path: Path) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    with path.open("rb") as stream:
        while data := stream.read(1 << 17):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a compressed frame")


def _decode(data: bytes, dropped: Dropped) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        dropped.undecodable += 1
        return None


def _read_text(file: SourceFile, dropped: Dropped) -> Iterator[str]:
    with _open(file.path) as stream:
        text = _decode(stream.read(), dropped)
    if text is not None:
        yield text


def _read_jsonl(file: SourceFile, dropped: Dropped) -> Iterator[str]:
    with _open(file.path) as stream:
        for number, data in enumerate(stream, 1):
            line = _decode(data, dropped)
            if line is None or line.isspace():
                continue
            record = _parse_json(line, f"{file.path}, line {number}", "jsonl")
            yield _field(record, file, f"{file.path}, line {number}")


def _read_json_strings(file: SourceFile, dropped: Dropped) -> Iterator[str]:
    with _open(file.path) as stream:
        text = _decode(stream.read(), dropped)
    if text is not None:
        yield from _strings(_parse_json(text, str(file.path), "json_strings"), file.source.text_field)


def _read_parquet(file: SourceFile, dropped: Dropped) -> Iterator[str]:
    column = file.source.text_field
    with parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise DataError(f"{file.path} has no column {column!r}; set text_field to one of {', '.join(names)}")
        kind = table.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{file.path}: column {column!r} holds {kind}, no text; set text_field to another")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


_READERS: dict[Format, Callable[[SourceFile, Dropped], Iterator[str]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json_strings": _read_json_strings,
    "parquet": _read_parquet,
}


def _parse_json(text: str, where: str, kind: Format) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error}); it is read as {kind}: set format in the recipe") from None


def _field(record: Any, file: SourceFile, where: str) -> str:
    text = record.get(file.source.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = f"has the fields {', '.join(record)}" if isinstance(record, dict) else "is not an object"
        raise DataError(f"{where} has no text in field {file.source.text_field!r} (it {has}); set text_field")
    return text


def _strings(value: Any, key: str) -> Iterator[str]:
    """Each string under `key` at any depth, in the document's order."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name == key and isinstance(item, str):
                yield item
            else:
                yield from _strings(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _strip_html(text: str) -> str:
    """The readable text of an HTML fragment: a line for each block, no tags, entities resolved."""
    text = html.unescape(_TAG.sub("", _BLOCK_END.sub("\n", text)))
    return _BLANK_LINES.sub("\n", text).strip()
