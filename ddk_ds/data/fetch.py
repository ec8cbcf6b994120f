"""One file of a remote directory to a local path: mosaicml-streaming's downloaders, retried, timed and verified."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

from ddk_ds.data.store import Damaged, Shard, verify
from ddk_ds.errors import DataError
from ddk_ds.redact import redact

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
# Words of a store's error that time does not mend.
_GONE = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


class Missing(DataError):
    """The remote has no such file."""


class Fetcher:
    """Fetches files below a location: a URL of mosaicml-streaming's, or a directory."""

    def __init__(self, location: str, *, timeout_s: float, retries: int) -> None:
        self.location = location.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self._downloaders: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_downloaders": {}}

    def fetch(self, name: str, path: Path, shard: Shard | None = None) -> None:
        """Write `name` to `path`, verified where a shard describes it; what was there is replaced.

        Raises:
            Missing: the remote has no such file.
            DataError: access is denied; or what the last of 1 + `retries` attempts failed of.
            OSError: `path` cannot be written.
        """
        for attempt in range(self.retries + 1):
            path.unlink(missing_ok=True)
            try:
                self._download(name, path)
                if shard is not None:
                    verify(shard, path)
                return
            except Damaged as error:
                failure = str(error).replace(str(path), f"{self.location}/{name}")
            except TimeoutError:
                failure = f"nothing came of it within data.download_timeout_s, {self.timeout_s:g} s"
            except Exception as error:  # every kind of store has errors of its own
                self._raise_final(error, name, path)
                failure = _describe(error)
            if attempt < self.retries:
                time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt))
        domain = f" of domain {shard.domain!r}" if shard is not None else ""
        raise DataError(
            f"{self.location}/{name}{domain} cannot be fetched, {self.retries + 1} attempts: {failure}; "
            "check the address and the store, then start again: what was fetched is kept"
        )

    def _download(self, name: str, path: Path) -> None:
        """In a thread, which is left behind when the time is over: some stores' clients wait for ever."""
        outcome: list[BaseException | None] = []

        def work() -> None:
            try:
                self._downloader().download(f"{self.location}/{name}", str(path), self.timeout_s)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=work, name=f"fetch {name}", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not outcome:
            self._downloaders.clear()  # the next attempt gets a client that does not hang
            raise TimeoutError
        if outcome[0] is not None:
            raise outcome[0]

    def _downloader(self) -> Any:
        """One a process: clients do not outlive a fork."""
        found = self._downloaders.get(os.getpid())
        if found is None:
            from streaming.base.storage.download import CloudDownloader  # seconds, which local data need not wait for

            found = self._downloaders[os.getpid()] = CloudDownloader.get(self.location)
        return found

    def _raise_final(self, error: Exception, name: str, path: Path) -> None:
        """Raise what another attempt would not mend."""
        code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
        if isinstance(error, FileNotFoundError) or code in _GONE:
            raise Missing(f"{self.location}/{name} does not exist; check the address") from None
        if isinstance(error, PermissionError) or code in _DENIED or type(error).__name__ == "NoCredentialsError":
            raise DataError(
                f"{self.location}/{name}: access is denied ({code or type(error).__name__}); give this process "
                "credentials that may read it"
            ) from None
        if isinstance(error, OSError) and error.errno is not None and not path.parent.is_dir():
            raise error
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise error
        if isinstance(error, ImportError | ValueError):
            raise DataError(f"{self.location}: {_describe(error)}") from None


def _describe(error: BaseException) -> str:
    """Type and message on one line, without what may be a credential."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {redact(text)}"
