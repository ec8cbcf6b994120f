"""Files that are put on an object store, and the list of those that are there, by mosaicml-streaming's uploaders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddk_ds.data.patience import Unavailable, http_status, never, patiently
from ddk_ds.data.remote import describe, in_time, raise_final


class Uploader:
    """Puts files of a local directory below an address that `teacher.cache.path` takes, and lists what lies there."""

    def __init__(self, location: str, directory: Path, *, timeout_s: float, patience_s: float) -> None:
        """Make it for files of `directory`, which is this process's own."""
        self.location = location.rstrip("/")
        self.directory = directory
        self.give_up: Callable[[], bool] = never
        """Looked at while the store fails: True ends the patience."""
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._uploaders: dict[int, Any] = {}

    def upload(self, name: str) -> None:
        """Put the file `name` of the directory to the same name below the address; a part of it is never seen there.

        Raises TemporaryError if the store failed for the whole patience, DataError if it refuses the file.
        """
        self._patiently(name, "uploaded", lambda: self._uploader().upload_file(name))

    def names(self, prefix: str) -> list[str]:
        """Return the names, from the address on, that begin with `prefix`. Raises as `upload` does."""
        found: list[str] = self._patiently(prefix, "listed", lambda: self._uploader().list_objects(prefix))
        root = urlsplit(self.location).path.strip("/")
        return [name.removeprefix(f"{root}/") if root else name for name in found]

    def _patiently(self, name: str, done: str, work: Callable[[], Any]) -> Any:
        what = f"{self.location}/{name}"

        def attempt() -> Any:
            try:
                return in_time(work, self._timeout_s, what)
            except TimeoutError:
                self._uploaders.clear()  # the next attempt gets a client that does not hang
                failure = f"it took longer than data.download_timeout_s, {self._timeout_s:g} s"
                raise Unavailable(failure) from None
            except Exception as error:  # every kind of store has errors of its own
                cause = error.__context__  # boto3's error of an upload hides the store's answer
                if http_status(error) is None and isinstance(cause, Exception) and http_status(cause) is not None:
                    error = cause
                raise_final(error, what, self.directory, "list and write it")
                raise Unavailable(describe(error)) from None

        return patiently(attempt, what, self._patience_s, done=done, give_up=self.give_up)

    def _uploader(self) -> Any:
        """Return this process's uploader: a client cannot be used after a fork."""
        uploader = self._uploaders.get(os.getpid())
        if uploader is None:
            # Importing it takes seconds, which a local cache need not wait for.
            from streaming.base.storage.upload import CloudUploader

            places = str(self.directory), self.location
            uploader = CloudUploader.get(places, keep_local=True, retry=1, exist_ok=True)
            self._uploaders[os.getpid()] = uploader
        return uploader
