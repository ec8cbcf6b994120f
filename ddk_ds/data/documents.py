"""The documents of a domain: the texts of its files, within the domain's limits and without exact duplicates.

Every format and compression of a file is read here; errors name the file.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

import pyarrow
import zstandard

from ddk_ds.data.columns import Values, parquet_values
from ddk_ds.data.conversations import conversation_text, parquet_conversations
from ddk_ds.data.hf_datasets import saved_values
from ddk_ds.data.recipe import Chat, Domain, Format, SourceFile
from ddk_ds.data.remote import downloaded
from ddk_ds.data.tars import tar_samples
from ddk_ds.data.zstd_frames import ZstdFrames
from ddk_ds.errors import DataError

T = TypeVar("T")
_DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError, pyarrow.ArrowException)
_BLOCK_END = re.compile(r"<\s*(?:/(?:p|li|ul|ol|dl|dd|dt|h\d|div|tr|table|note)|br\s*/?)\s*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]+>")
_BLANK_LINES = re.compile(r"\s*\n\s*")
_READ_BYTES = 1 << 17
_HASHED_CHARS = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30
"""Size of the largest document, or line of a jsonl file, that is read.

Memory holds it twice, or five times with a curly quote in it, nine times with an emoji: Python stores all characters of
a text as wide as its widest. The document before it is still there meanwhile.
"""


@dataclass(frozen=True)
class Document:
    """One text with its size in UTF-8; `digest` (16 bytes) depends on the text and the seed alone."""

    text: str
    num_bytes: int
    digest: bytes


@dataclass
class Position:
    """The place up to which a domain is read; reading can continue there.

    All files before number `file` are read, and `texts` texts of that file; the documents so far have `num_bytes`
    bytes.
    """

    file: int = 0
    texts: int = 0
    num_bytes: int = 0


@dataclass
class Dropped:
    """Numbers of documents that were left out or changed, and `tail_tokens`, the tokens that fill no sample.

    `missing` texts are null and `undecodable` ones are not UTF-8; documents `cut` at max_chars are kept. `bad_lines` of
    jsonl files hold no text and are skipped. `control_tokens` that a text spells are split into others or dropped.
    Long documents are encoded in parts: at `unproven_cuts` places between two parts a token may differ from that of the
    complete document. `near_duplicates` are those that MinHash finds (near_duplicates.py). Conversations are left out
    if the template `refused` them, `no_target` is in them, a message spells a control token (`spelled_controls`), or
    they are `too_long`.
    """

    duplicates: int = 0
    undecodable: int = 0
    too_short: int = 0
    cut: int = 0
    tail_tokens: int = 0
    missing: int = 0
    bad_lines: int = 0
    control_tokens: int = 0
    unproven_cuts: int = 0
    near_duplicates: int = 0
    refused: int = 0
    no_target: int = 0
    spelled_controls: int = 0
    too_long: int = 0


@dataclass
class Meter:
    """Number of bytes read from files, compressed as they are on the disk."""

    disk_bytes: int = 0


class Seen(Protocol):
    """Digests of all documents so far: a set, or a database where memory cannot hold it."""

    def __contains__(self, digest: object, /) -> bool: ...

    def add(self, digest: bytes, /) -> None: ...


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
    """Yield the documents of one domain in the order of its files; `dropped` counts what is left out.

    Args:
        seed: keys the digests, and so decides which documents are held out.
        seen: digests of the documents so far; grows. All domains of a preparation share it, so that a text stays in
            the first domain that has it.
        position: the place to begin at, after the last document of an earlier call; kept up to date.
        meter: counts the bytes read.
        scratch: directory that holds a remote file while it is read.

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
    file: SourceFile, num_read: int, dropped: Dropped, meter: Meter | None, scratch: Path | None
) -> Iterator[str]:
    """Yield the texts of a file after the first `num_read`, which were counted when they were read."""
    counted = Dropped(**vars(dropped))
    if num_read:
        dropped.bad_lines = 0  # those of the texts that were read are met again, and do not count twice
    for number, text in enumerate(read_texts(file, dropped, meter=meter, scratch=scratch), 1):
        if number > num_read:
            yield text
        elif number == num_read:
            vars(dropped).update(vars(counted))


def _make_document(text: str, domain: Domain, key: bytes, dropped: Dropped) -> Document | None:
    if len(text) < domain.min_chars or text.isspace():
        dropped.too_short += 1
        return None
    if domain.max_chars is not None and len(text) > domain.max_chars:
        text = text[: domain.max_chars]
        dropped.cut += 1
    digest, num_bytes = hashlib.blake2b(digest_size=16, key=key), 0
    try:
        for begin in range(0, len(text), _HASHED_CHARS):
            data = text[begin : begin + _HASHED_CHARS].encode()
            digest.update(data)
            num_bytes += len(data)
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no text
        dropped.undecodable += 1
        return None
    return Document(text, num_bytes, digest.digest())


def read_texts(
    file: SourceFile, dropped: Dropped, *, meter: Meter | None = None, scratch: Path | None = None
) -> Iterator[str]:
    """Yield every text of one file, uncut; undecodable files (jsonl: lines) and nulls are skipped and counted.

    Up to `file.skip_bad_lines` lines of jsonl, or samples of a tar, that hold no text are skipped too.

    Formats: in `text` the file is one document; in `jsonl` each line is an object with its text in `text_field`; in
    `json_strings` the file is one JSON value, and each string under the key `text_field` at any depth is a document; in
    `parquet` and `arrow` (files of datasets' save_to_disk) each row is a document with its text in the column
    `text_field`; in `webdataset` each sample of a tar is one, with its text in the member `text_field` or, for
    `json.FIELD`, in a field of the member `json`. All formats except parquet and arrow can be compressed (.gz, .zst).
    A data set on a hub is read as its stream (hf_datasets.py). Of a file with
    `chat` each text is a conversation as JSON (conversations.py).

    Args:
        meter: counts the bytes read.
        scratch: directory that holds a remote file while it is read; None: the system's temporary directory.

    Raises:
        DataError: names the file, and the line where there is one.
    """
    meter = meter or Meter()
    if file.shard is not None:
        yield from _stripped(_column(file.shard.values(file.source.text_field), 0, file, dropped, meter), file)
    elif file.remote is not None:
        with downloaded(file.remote, scratch) as path:
            yield from _read(path, file, dropped, meter)
    else:
        yield from _read(file.path, file, dropped, meter)


def check_first_texts(files: Sequence[SourceFile]) -> None:
    """Read the first text of each source that has a field for it, so that a wrong field is an error before the work.

    Only files on this machine are read; the columns of a hub's data set were looked at when it was listed.

    Raises DataError as `read_texts` does.
    """
    for file in {id(file.source): file for file in reversed(files)}.values():
        if file.remote is None and (file.source.format or _format_of(file.path)) not in ("text", "json_strings"):
            next(read_texts(file, Dropped()), None)


def _read(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    kind = file.source.format or _format_of(path)
    if file.chat is not None and kind not in ("jsonl", "parquet"):
        raise DataError(f"{file.where}: conversations are read from .jsonl and .parquet: convert it, or set its format")
    reader = _READERS[kind]
    try:
        yield from _stripped(reader(path, file, dropped, meter), file)
    except _DAMAGE as error:
        raise DataError(f"{file.where} cannot be read: {error}; repair or exclude it in the recipe") from error


def _stripped(texts: Iterator[str], file: SourceFile) -> Iterator[str]:
    return map(_strip_html, texts) if file.source.strip_html else texts


_BY_SUFFIX: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


def _format_of(path: Path) -> Format:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    for suffix, kind in _BY_SUFFIX.items():
        if name.endswith(suffix):
            return kind
    # Corpora publish .json.gz files with one object in each line (C4); a plain .json file is read as one text.
    line_suffixes = (".jsonl", ".ndjson") if name == path.name.lower() else (".jsonl", ".ndjson", ".json")
    return "jsonl" if name.endswith(line_suffixes) else "text"


@contextmanager
def _opened(path: Path, meter: Meter) -> Iterator[BinaryIO]:
    """Yield a stream of the uncompressed bytes of a file; the meter counts the compressed bytes that are read."""
    with io.BufferedReader(_Metered(path, meter), _READ_BYTES) as stream:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=stream) as uncompressed:
                yield cast(BinaryIO, uncompressed)
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(ZstdFrames(stream), _READ_BYTES)
        else:
            yield stream


class _Metered(io.RawIOBase):
    """A file whose reads are counted by a meter."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self._stream = path.open("rb", buffering=0)
        self._meter = meter

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._meter.disk_bytes += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _decode(data: bytes | bytearray, dropped: Dropped) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        dropped.undecodable += 1
        return None


def _refuse_longer(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{where} has more than {MAX_DOCUMENT_BYTES:,} bytes, and memory would hold it several times: split it, or "
            "exclude its file in the recipe"
        )


def _contents(path: Path, where: str, dropped: Dropped, meter: Meter) -> str | None:
    """Return the text of a file; None if it is not UTF-8."""
    data = bytearray()
    with _opened(path, meter) as stream:
        while chunk := stream.read(_READ_BYTES):
            data += chunk
            _refuse_longer(len(data), where)
    return _decode(data, dropped)


def _line(stream: BinaryIO, where: str, dropped: Dropped) -> str | None:
    """Return the next line; "" if it is undecodable, None at the file's end."""
    data = bytearray()
    # In pieces: a complete readline keeps them all beside the line, in a heap that the system does not get back.
    while piece := stream.readline(_READ_BYTES):
        data += piece
        _refuse_longer(len(data), where)
        if piece.endswith(b"\n"):
            break
    return (_decode(data, dropped) or "") if data else None


def _read_text(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    text = _contents(path, file.where, dropped, meter)
    if text is not None:
        yield text


def _read_jsonl(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    with _opened(path, meter) as stream:
        for number in itertools.count(1):
            where = f"{file.where}, line {number}"
            line = _line(stream, where, dropped)
            if line is None:
                return
            if not line or line.isspace():
                continue
            try:
                record, chat = _parse_json(line, where, "jsonl"), file.chat
                field = file.source.text_field
                text = _field(record, field, where) if chat is None else conversation_text(record, chat, where)
            except DataError as error:
                _skip_bad(error, file, dropped)
                continue
            line, record = "", None  # memory need not hold a long one beside its text
            if text is None:
                dropped.missing += 1
            else:
                yield text


def _read_json_strings(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    text = _contents(path, file.where, dropped, meter)
    if text is not None:
        yield from _strings(_parse_json(text, file.where, "json_strings"), file.source.text_field)


def _read_parquet(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    if file.chat is not None:
        return _read_parquet_chat(path, file.chat, file.where, dropped, meter)
    values = parquet_values(path, file.source.text_field, file.where)
    return _column(values, path.stat().st_size, file, dropped, meter)


def _read_arrow(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    values = saved_values(path, file.source.text_field, file.where)
    return _column(values, path.stat().st_size, file, dropped, meter)


def _column(
    values: Iterator[Values], num_bytes: int, file: SourceFile, dropped: Dropped, meter: Meter
) -> Iterator[str]:
    """Yield the texts of a column; the meter counts a share of the file's `num_bytes`."""
    for batch in _counted(values, num_bytes, meter):
        for data in batch:
            _refuse_longer(len(data or b""), f"{file.where}: a row of {file.source.text_field!r}")
            text = None if data is None else _decode(data, dropped)
            dropped.missing += data is None
            if text is not None:
                yield text


def _counted(batches: Iterator[tuple[float, T]], num_bytes: int, meter: Meter) -> Iterator[T]:
    """Yield batches of rows; the meter counts, of a file's `num_bytes`, the share that is read with each."""
    start = meter.disk_bytes
    for share, batch in batches:
        meter.disk_bytes = start + int(num_bytes * share)
        yield batch
    meter.disk_bytes = start + num_bytes


def _read_webdataset(path: Path, file: SourceFile, dropped: Dropped, meter: Meter) -> Iterator[str]:
    name = file.source.text_field
    member, field = ("json", name.removeprefix("json.")) if name.startswith("json.") else (name, "")
    with _opened(path, meter) as stream:
        for sample, data, members in tar_samples(stream, member, file.where, MAX_DOCUMENT_BYTES):
            where = f"{file.where}, sample {sample!r}"
            if data is None:
                fault = (
                    f"{where} has no member {member!r} (it has {members}); set text_field (json.FIELD: inside .json)"
                )
                _skip_bad(DataError(fault), file, dropped)
                continue
            text = _decode(data, dropped)
            if text is None:
                continue
            if field:
                try:
                    text = _field(_parse_json(text, where, "webdataset"), field, where)
                except DataError as error:
                    _skip_bad(error, file, dropped)
                    continue
            if text is None:
                dropped.missing += 1
            else:
                yield text


def _read_parquet_chat(path: Path, chat: Chat, where: str, dropped: Dropped, meter: Meter) -> Iterator[str]:
    for found in _counted(parquet_conversations(path, chat, where), path.stat().st_size, meter):
        dropped.missing += found.count(None)
        yield from filter(None, found)


_READERS: dict[Format, Callable[[Path, SourceFile, Dropped, Meter], Iterator[str]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json_strings": _read_json_strings,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "webdataset": _read_webdataset,
}


def _parse_json(text: str, where: str, kind: Format) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise DataError(f"{where} is not JSON ({error}); it is read as {kind}: set format in the recipe") from None


def _skip_bad(error: DataError, file: SourceFile, dropped: Dropped) -> None:
    """Count a line or sample that holds no text; raise its error if the domain may skip no more of them."""
    if dropped.bad_lines >= file.skip_bad_lines:
        raise DataError(f"{error}; skip_bad_lines of the domain is {file.skip_bad_lines}") from None
    dropped.bad_lines += 1


def _field(record: Any, name: str, where: str) -> str | None:
    text = record.get(name) if isinstance(record, dict) else None
    if not isinstance(text, str) and not (isinstance(record, dict) and name in record and text is None):
        has = f"has the fields {', '.join(record)}" if isinstance(record, dict) else "is not an object"
        raise DataError(f"{where} has no text in field {name!r} (it {has}); set text_field")
    return text


def _strings(value: Any, key: str) -> Iterator[str]:
    """Yield each string that is the value of `key` in an object at any depth of `value`, in the order of the file."""
    waiting = [(False, value)]
    while waiting:
        named, item = waiting.pop()
        if named and isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += reversed([(name == key, inner) for name, inner in item.items()])
        elif isinstance(item, list):
            waiting += [(False, inner) for inner in reversed(item)]


def _strip_html(text: str) -> str:
    """Return the readable text of an HTML fragment: a line for each block, no tags, entities resolved."""
    text = html.unescape(_TAG.sub("", _BLOCK_END.sub("\n", text)))
    return _BLANK_LINES.sub("\n", text).strip()
