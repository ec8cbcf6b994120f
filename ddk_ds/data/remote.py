"""Text on object stores and web servers: list it, and have one file at a time on the disk while it is read."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddk_ds.data.fetch import DISK_FULL, Fetcher
from ddk_ds.errors import DataError

_WEB = ("http", "https")
_TIMEOUT_SECONDS = 60
# Of a whole file, which may be of many GB.
_FILE_SECONDS, _RETRIES = 7200.0, 3
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class RemoteFile:
    """An address; bytes and a stamp that changes with the content, where the store tells them (else 0, "")."""

    url: str
    num_bytes: int = 0
    stamp: str = ""


def is_remote(path: str) -> bool:
    """Whether a path is an address: s3://, gs://, hf://, https://, ..."""
    return "://" in path


def list_remote(url: str) -> list[RemoteFile]:
    """The files that an address or, on s3://, a glob stands for.

    Raises:
        DataError: the store cannot be listed, or has no listing here.
    """
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        return _list_s3(url)
    if scheme not in _WEB and _WILDCARD.search(url):
        raise DataError(
            f"{url}: globs are for files and s3:// only; put the addresses into a file, one a line, and give list:FILE"
        )
    return [RemoteFile(url)]


def _list_s3(url: str) -> list[RemoteFile]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, _, key = url.removeprefix("s3://").partition("/")
    wildcard = _WILDCARD.search(key)
    prefix = key[: wildcard.start()] if wildcard else key
    matches = re.compile(glob_pattern(key) if wildcard else re.escape(key))
    try:
        try:
            objects = _s3_objects(bucket, prefix, signed=True)
        except NoCredentialsError:  # as streaming's downloader does for public buckets
            objects = _s3_objects(bucket, prefix, signed=False)
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{url} cannot be listed: {error}; check the address and the credentials") from error
    return [
        RemoteFile(f"s3://{bucket}/{found['Key']}", int(found["Size"]), str(found["ETag"]))
        for found in objects
        if matches.fullmatch(found["Key"])
    ]


def _s3_objects(bucket: str, prefix: str, *, signed: bool) -> list[dict[str, Any]]:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(read_timeout=_TIMEOUT_SECONDS, **({} if signed else {"signature_version": UNSIGNED}))
    # The variable that streaming's downloader reads too.
    client = boto3.session.Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [found for page in pages for found in page.get("Contents", ())]


def glob_pattern(glob: str) -> str:
    """A regular expression for what pathlib's glob matches: `*` and `?` stay in a directory, `**/` crosses any."""
    pattern = ""
    for part in re.split(r"(\*\*/|\*|\?|\[[^]]+\])", glob):
        if part.startswith("[") and part.endswith("]"):
            pattern += "[^" + part[2:] if part[1] == "!" else part
        else:
            pattern += {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    return pattern


@contextmanager
def downloaded(url: str, directory: Path | None) -> Iterator[Path]:
    """The file of an address, on the disk below `directory` (None: the system's) until the block ends.

    Raises:
        DataError: it cannot be downloaded.
        OSError: the disk is full.
    """
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as scratch:
        path = Path(scratch) / (Path(urlsplit(url).path).name or "file")
        _download(url, path)
        yield path


def _download(url: str, path: Path) -> None:
    try:
        if urlsplit(url).scheme in _WEB:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, path.open("wb") as stream:
                shutil.copyfileobj(response, stream, 1 << 20)
                expected = response.headers["Content-Length"]
            if expected is not None and path.stat().st_size != int(expected):
                raise OSError(f"{path.stat().st_size:,} of {int(expected):,} bytes came")
        else:
            place, _, name = url.rpartition("/")
            Fetcher(place, timeout_s=_FILE_SECONDS, retries=_RETRIES).fetch(name, path)
    except DataError:
        raise
    except Exception as error:  # urllib has several
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise DataError(f"{url} cannot be downloaded: {error}; check address, credentials, and run again") from error
