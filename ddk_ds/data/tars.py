"""Samples of WebDataset's tar files: members in a row whose names are equal up to the first dot are one sample.

Python's tarfile takes a file that ends early, or has a damaged header inside, for a complete one. Here both are errors.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

from ddk_ds.errors import DataError

_READ_BYTES = 1 << 17
_ABOUT_THE_TAR = re.compile(r"__[^/]*__(?:$|/)")
"""Names of members that belong to no sample, as WebDataset skips them."""


class _Header(tarfile.TarInfo):
    """A member's header whose damage ends the reading."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) < tarfile.BLOCKSIZE:
            raise EOFError("it ends before the mark of a tar's end")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.count(b"\0") == len(buf):
                raise
            raise OSError(f"a member's header is damaged ({error})") from None


def tar_samples(stream: BinaryIO, member: str, where: str, max_bytes: int) -> Iterator[tuple[str, bytes | None, str]]:
    """Yield name, content of the member `member` and names of all members of each sample.

    The content is None if the sample lacks the member. Names of members are what follows the sample's name and a dot.

    Raises:
        DataError: a sample has the member twice, or it has more than `max_bytes` bytes; `where` names the tar.
        OSError, EOFError, TarError: the tar is damaged or ends early.
    """
    name: str | None = None
    content: bytes | None = None
    members: list[str] = []
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all
            directory, slash, file = entry.name.rpartition("/")
            begin, dot, rest = file.partition(".")
            if not entry.isfile() or not dot or _ABOUT_THE_TAR.match(entry.name):
                continue
            sample = directory + slash + begin
            if sample != name:
                if name is not None:
                    yield name, content, ", ".join(members)
                name, content, members = sample, None, []
            if rest in members:
                raise DataError(f"{where}, sample {sample!r} has {rest!r} twice: exclude it, or write the tar again")
            members.append(rest)
            if rest == member:
                content = _content(tar, entry, f"{where}, sample {sample!r}", max_bytes)
        if name is not None:
            yield name, content, ", ".join(members)
        assert tar.fileobj is not None, "it was given"
        while rest_of_it := tar.fileobj.read(_READ_BYTES):
            if rest_of_it.count(b"\0") != len(rest_of_it):
                raise OSError("it goes on behind the mark of a tar's end, as if joined from several")


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo, where: str, max_bytes: int) -> bytes:
    if entry.size > max_bytes:
        raise DataError(f"{where} has more than {max_bytes:,} bytes: exclude its tar in the recipe")
    content = tar.extractfile(entry)
    assert content is not None, "it is a file"
    data = content.read()
    if len(data) != entry.size:
        raise EOFError(f"it ends inside sample {entry.name!r}")
    return data
