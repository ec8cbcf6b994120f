"""The report page served on this machine alone, which reloads itself while the run goes on. It writes no file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.report.page import head, page, sections
from ddk_ds.report.records import read_runs

_HOST = "127.0.0.1"
_FILES = ("ledger.jsonl", "events.jsonl", "summary.json", "run.json")
_MINUTE_S = 60
_SCRIPT = (Path(__file__).parent / "watch.js").read_text(encoding="utf-8")


class ReportServer(ThreadingHTTPServer):
    """Serves `/`, the report on these runs, and `/state`, a text that changes with their files."""

    daemon_threads = True

    def __init__(self, run_dirs: Sequence[Path], port: int, every_s: float) -> None:
        """Listen on 127.0.0.1 at this port, 0 for any free one. Raises ConfigError if it is taken."""
        self._run_dirs, self._every_s = run_dirs, every_s
        self._made: tuple[str, str] = ("", "")
        self._lock = Lock()
        try:
            super().__init__((_HOST, port), _Answers)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port {port}: cannot be listened on ({error}); name another, or 0 for any") from error

    @property
    def address(self) -> str:
        """Return the page's address on this machine, with the port that is served."""
        return f"http://{_HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write nothing about a browser that left before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def state(self) -> str:
        """Return a text that is another one when a file of a run has changed, and each minute: runs fall silent."""
        files = [run_dir / name for run_dir in self._run_dirs for name in _FILES]
        stats = [path.stat() for path in files if path.is_file()]
        changes = "-".join(f"{stat.st_size:x}.{stat.st_mtime_ns:x}" for stat in stats)
        return f"{changes}-{int(time.time() // _MINUTE_S)}"

    def page(self) -> str:
        """Return the page for the runs as they are now; made once for each state."""
        with self._lock:
            state = self.state()
            if self._made[0] != state:
                self._made = (state, self._make(state))
            return self._made[1]

    def _make(self, state: str) -> str:
        script = _SCRIPT.replace("STATE", state).replace("EVERY_MS", f"{1000 * self._every_s:.0f}")
        try:
            runs = read_runs(self._run_dirs)
            return page(runs, sections(runs), {}, script)  # a page that is served runs scripts: no still pictures
        except CheckpointError as error:  # not begun, or a file that is being written
            text = f"<body><h1>No report yet</h1><p>{escape(str(error))}</p><script>{script}</script></body></html>\n"
            return head("waiting for the run", [script]) + text


class _Answers(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (_HOST, "localhost"):  # a foreign page whose name was pointed here may not read the report
            self.send_error(403)
        elif self.path == "/":
            self._send("text/html", self.server.page())
        elif self.path == "/state":
            self._send("text/plain", self.server.state())
        else:
            self.send_error(404)

    def _send(self, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Write nothing: every page asks once in a few seconds."""


def watch(run_dirs: Sequence[Path], port: int, every_s: float) -> None:
    """Serve the report until Ctrl-C. Raises ConfigError if the port is taken."""
    with ReportServer(run_dirs, port, every_s) as server:
        print(f"{server.address} shows the report and follows the run; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
