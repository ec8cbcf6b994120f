"""A made-up Hugging Face hub: a web server on this machine with the few routes that datasets and huggingface_hub ask.

It is no hub: it knows commits as directories, has no large-file storage, and gives a file without signed addresses.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """The server. `root`/OWNER/NAME/COMMIT holds the files of a commit; `branches` maps a revision to its commit."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.branches: dict[str, str] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def served(root: Path) -> Iterator[Hub]:
    """Yield a hub that answers from a thread until the block ends."""
    with Hub(root) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        self.server.asked.append(f"{self.command} {unquote(url.path)}")
        if parts[:2] == ["api", "datasets"]:
            name, kind, revision, inner = "/".join(parts[2:4]), *[*parts[4:6], "", ""][:2], "/".join(parts[6:])
        elif parts[0] == "datasets" and len(parts) > 4:
            name, kind, revision, inner = "/".join(parts[1:3]), parts[3], parts[4], "/".join(parts[5:])
        else:
            return self._refuse(404, "")
        commit = self.server.branches.get(revision or "main", revision)
        if not (self.server.root / name).is_dir():
            return self._refuse(404, "RepoNotFound")
        if name in self.server.gated and kind in ("resolve", "tree", "paths-info"):
            return self._refuse(403, "GatedRepo")
        root = self.server.root / name / commit
        if not root.is_dir():
            return self._refuse(404, "RevisionNotFound")
        if kind == "resolve":
            return self._file(root / inner, commit)
        if kind == "tree":
            found: Any = [_entry(root, path) for path in sorted((root / inner).glob("*"))]
            return self._json(found) if found else self._refuse(404, "EntryNotFound")
        if kind == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([_entry(root, root / path) for path in wanted if (root / path).exists()])
        files = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
        return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_POST = do_GET

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, reason: str) -> None:
        self._send(code, b"{}", {"X-Error-Code": reason, "X-Error-Message": reason})

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        data, headers = path.read_bytes(), {"ETag": f'"{commit}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        span = self.headers.get("Range")
        if span is None:
            return self._send(200, data, headers)
        begin, _, end = span.removeprefix("bytes=").partition("-")
        first, last = int(begin), min(int(end or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name, size = str(path.relative_to(root)), path.stat().st_size if path.is_file() else 0
    return {"type": "file" if path.is_file() else "directory", "oid": "0" * 40, "size": size, "path": name}
