"""Files on object stores and web servers: fetch a file to a local path, list files, download text while it is read.

`Fetcher` uses mosaicml-streaming's downloaders and adds patience, a time limit and verification.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from ddk_ds.data.patience import PATIENCE_S, Unavailable, http_status, never, patiently, refused
from ddk_ds.data.store import Damaged, Shard, verify
from ddk_ds.errors import DISK_FULL, DataError, UserError
from ddk_ds.redact import redact

_Result = TypeVar("_Result")
_DAMAGED_ATTEMPTS = 5
# Codes of a store's error that another attempt does not mend.
_GONE = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
# Codes of an answer with status 400 that time may mend.
_MENDABLE = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}


class Missing(DataError):
    """A file that the remote does not have."""


class Refused(DataError):
    """An answer of the store that neither time nor another file mends."""


class Fetcher:
    """Fetches files below a location: a URL that mosaicml-streaming downloads from, or a directory."""

    def __init__(self, location: str, *, timeout_s: float, patience_s: float) -> None:
        self.location = location.rstrip("/")
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self.give_up: Callable[[], bool] = never
        """Looked at while the store fails: True ends the patience. A process that is started has its own."""
        self._downloaders: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_downloaders": {}, "give_up": never}

    def fetch(self, name: str, path: Path, shard: Shard | None = None, since: float | None = None) -> None:
        """Write the file `name` to `path`, replacing it, and verify it if `shard` is given.

        `since` is the time (time.monotonic) from which the patience counts; None: from now on.

        Raises:
            TemporaryError: the store failed for `patience_s`; names the last attempt's error.
            Missing: the remote has no such file.
            DataError: access is denied, or the file came damaged again and again.
            OSError: `path` cannot be written.
        """
        domain = f" of domain {shard.domain!r}" if shard is not None else ""
        what, damaged = f"{self.location}/{name}{domain}", 0

        def attempt() -> None:
            nonlocal damaged
            path.unlink(missing_ok=True)
            try:
                self._download(name, path)
                if shard is not None:
                    verify(shard, path)
            except Damaged as error:
                damaged += 1
                failure = str(error).replace(str(path), f"{self.location}/{name}")
                if damaged == _DAMAGED_ATTEMPTS:
                    raise Damaged(f"{what} cannot be fetched, {damaged} attempts: {failure}") from None
                raise Unavailable(failure) from None
            except TimeoutError:
                failure = f"nothing came of it within data.download_timeout_s, {self.timeout_s:g} s"
                raise Unavailable(failure) from None
            except Exception as error:  # every kind of store has errors of its own
                raise_final(error, f"{self.location}/{name}", path.parent, "read it")
                raise Unavailable(describe(error)) from None

        patiently(attempt, what, self.patience_s, since=since, give_up=self.give_up)

    def _download(self, name: str, path: Path) -> None:
        address = f"{self.location}/{name}"
        try:
            in_time(lambda: self._downloader().download(address, str(path), self.timeout_s), self.timeout_s, address)
        except TimeoutError:
            self._downloaders.clear()  # the next attempt gets a client that does not hang
            raise

    def _downloader(self) -> Any:
        """Return this process's downloader: a client cannot be used after a fork."""
        downloader = self._downloaders.get(os.getpid())
        if downloader is None:
            # Importing it takes seconds, which local data need not wait for.
            from streaming.base.storage.download import CloudDownloader

            downloader = self._downloaders[os.getpid()] = CloudDownloader.get(self.location)
        return downloader


def in_time(work: Callable[[], _Result], timeout_s: float, name: str) -> _Result:
    """Return what `work` does in a thread that is abandoned after the time: some stores' clients wait for ever.

    Raises TimeoutError after it, and what `work` raises.
    """
    outcome: list[tuple[_Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return cast("_Result", result)


def raise_final(error: Exception, address: str, directory: Path, right: str) -> None:
    """Raise the errors of a store that another attempt would not mend; return after all others.

    Args:
        directory: the local one that is read or written.
        right: the words for what the credentials must allow.
    """
    response = getattr(error, "response", None)
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    code = code or str(http_status(error) or "")
    if isinstance(error, FileNotFoundError) or code in _GONE:
        raise Missing(f"{address} does not exist; check the address") from None
    if isinstance(error, PermissionError) or code in _DENIED or type(error).__name__ == "NoCredentialsError":
        raise Refused(
            f"{address}: access is denied ({code or type(error).__name__}); give this process credentials that may "
            f"{right}"
        ) from None
    if refused(error) and code not in _MENDABLE:
        raise Refused(f"{address}: the store refuses it: {describe(error)}") from None
    if isinstance(error, OSError) and error.errno is not None and not directory.is_dir():
        raise error
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise error
    if isinstance(error, ImportError | ValueError):
        raise Refused(f"{address}: {describe(error)}") from None


def describe(error: BaseException) -> str:
    """Return type and message of an error on one line, with credentials removed."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {redact(text)}"


_WEB = ("http", "https")
_TIMEOUT_SECONDS = 60
# Time limit of one file of text, which can have many GB.
_FILE_SECONDS = 7200.0
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class RemoteFile:
    """An address, with the file's bytes and a stamp that changes with its content (0 and "" where unknown)."""

    url: str
    num_bytes: int = 0
    stamp: str = ""


def list_remote(url: str) -> list[RemoteFile]:
    """Return the files that an address matches; on s3:// it can be a glob.

    Raises:
        DataError: the store cannot be listed, or `url` is a glob on a store other than s3://.
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

    def attempt() -> list[dict[str, Any]]:
        try:
            return _s3_objects(bucket, prefix, signed=True)
        except NoCredentialsError:  # a public bucket; streaming's downloader does the same
            return _s3_objects(bucket, prefix, signed=False)

    try:
        objects = patiently(_mendable(attempt, (BotoCoreError, ClientError)), url, PATIENCE_S)
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{url} cannot be listed: {error}; check the address and the credentials") from error
    return [
        RemoteFile(f"s3://{bucket}/{entry['Key']}", int(entry["Size"]), str(entry["ETag"]))
        for entry in objects
        if matches.fullmatch(entry["Key"])
    ]


def _mendable(attempt: Callable[[], _Result], kinds: tuple[type[Exception], ...]) -> Callable[[], _Result]:
    """Return `attempt` with `Unavailable` in place of errors of these kinds, unless the store has refused it."""

    def run() -> _Result:
        try:
            return attempt()
        except kinds as error:
            if refused(error) or getattr(error, "errno", None) in DISK_FULL:
                raise
            raise Unavailable(describe(error)) from error

    return run


def _s3_objects(bucket: str, prefix: str, *, signed: bool) -> list[dict[str, Any]]:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(read_timeout=_TIMEOUT_SECONDS, **({} if signed else {"signature_version": UNSIGNED}))
    # Streaming's downloader reads the same variable.
    client = boto3.session.Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get("Contents", ())]


def glob_pattern(glob: str) -> str:
    """Return a regular expression that matches as pathlib's glob: only `**/` crosses directories, not `*` or `?`."""
    pattern = ""
    for part in re.split(r"(\*\*/|\*|\?|\[[^]]+\])", glob):
        if part.startswith("[") and part.endswith("]"):
            pattern += "[^" + part[2:] if part[1] == "!" else part
        else:
            pattern += {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    return pattern


@contextmanager
def downloaded(url: str, directory: Path | None) -> Iterator[Path]:
    """Yield the path of the downloaded file, which is deleted when the block ends.

    Args:
        directory: the file is below it; None: below the system's temporary directory.

    Raises:
        DataError: it cannot be downloaded.
        OSError: the disk is full.
    """
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as scratch:
        path = Path(scratch) / (Path(urlsplit(url).path).name or "file")
        _download_text(url, path)
        yield path


def _download_text(url: str, path: Path) -> None:
    try:
        if urlsplit(url).scheme in _WEB:
            patiently(_mendable(lambda: _download_page(url, path), (OSError, HTTPException)), url, PATIENCE_S)
        else:
            location, _, name = url.rpartition("/")
            Fetcher(location, timeout_s=_FILE_SECONDS, patience_s=PATIENCE_S).fetch(name, path)
    except UserError:
        raise
    except Exception as error:  # urllib raises several types
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise DataError(f"{url} cannot be downloaded: {error}; check address, credentials, and run again") from error


def _download_page(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, path.open("wb") as stream:
        shutil.copyfileobj(response, stream, 1 << 20)
        expected = response.headers["Content-Length"]
    if expected is not None and path.stat().st_size != int(expected):
        raise OSError(f"{path.stat().st_size:,} of {int(expected):,} bytes came")
