"""A real S3 API on the loopback (moto's server): it counts requests, and can fail every n-th or be down."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "corpus"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "sesame", "AWS_DEFAULT_REGION": "us-east-1"}


class S3Server:
    """`endpoint` is its URL; `got` counts the whole objects that were asked for, by key."""

    def __init__(self) -> None:
        self.got: Counter[str] = Counter()
        self.fail_every = 0
        self.deny = False
        self.deny_writes = False
        self.down = False
        self.breaks_at: str | None = None
        """A part of a key; the first request for such a key takes the server down."""
        self._application = DomainDispatcherApplication(create_backend_app)
        self._requests = 0
        self._counting = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __call__(self, environment: dict[str, Any], respond: Callable[..., Any]) -> Any:
        """A WSGI application around moto's."""
        with self._counting:
            self.down = self.down or (self.breaks_at is not None and self.breaks_at in environment["PATH_INFO"])
            self._requests += 1
            fail = not self.down and self.fail_every and self._requests % self.fail_every == 0
            if environment["REQUEST_METHOD"] == "GET" and not (fail or self.down):
                self.got[environment["PATH_INFO"].removeprefix(f"/{BUCKET}/")] += 1
        if self.down:
            respond("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if self.deny or (self.deny_writes and environment["REQUEST_METHOD"] == "PUT"):
            respond("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        if fail:
            respond("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._application(environment, respond)

    def upload(self, directory: Path, prefix: str) -> str:
        """Put every file of a directory below prefix; the URL of it."""
        client = boto3.client("s3", endpoint_url=self.endpoint)
        client.create_bucket(Bucket=BUCKET)
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(directory)}")
        self.got.clear()
        return f"s3://{BUCKET}/{prefix}"

    @contextmanager
    def running(self) -> Iterator[S3Server]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
