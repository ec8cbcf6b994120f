"""A headless Chromium that a test drives over its DevTools protocol, through tornado's WebSocket client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
]
_QUIET = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
_TIMEOUT_S = 60.0


class Browser:
    """One browser with one page; `complaints` are its console's errors, `requests` the addresses it asked for."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        command = [CHROMIUM, *_OPTIONS, *_QUIET, f"--user-data-dir={folder}", "about:blank"]
        self.complaints: list[str] = []
        self.requests: list[str] = []
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **quiet, start_new_session=True)
        self._loop = asyncio.new_event_loop()
        self._socket: WebSocketClientConnection | None = None
        self._number, self._session = 0, ""
        try:
            self._connect(folder)
        except BaseException:
            self.close()
            raise

    def _connect(self, folder: Path) -> None:
        port, path = self._address(folder / "DevToolsActivePort")
        self._socket = self._loop.run_until_complete(_connected(f"ws://127.0.0.1:{port}{path}"))
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _address(self, path: Path) -> list[str]:
        end = time.monotonic() + _TIMEOUT_S
        while not path.is_file() or path.read_text().count("\n") < 1:
            assert time.monotonic() < end and self._process.poll() is None, "chromium does not start"
            time.sleep(0.05)
        return path.read_text().split("\n")[:2]

    def call(self, method: str, **parameters: Any) -> Any:
        """Send one command of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._loop.run_until_complete(self._send(json.dumps(message)))
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    async def _send(self, text: str) -> None:
        assert self._socket is not None
        await self._socket.write_message(text)

    async def _next(self) -> str | bytes | None:
        assert self._socket is not None
        return await asyncio.wait_for(self._socket.read_message(), _TIMEOUT_S)

    def _receive(self) -> dict[str, Any]:
        text = self._loop.run_until_complete(self._next())
        assert text is not None, "chromium closed the connection"
        answer: dict[str, Any] = json.loads(text)
        method, parameters = answer.get("method"), answer.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"])[:500])
        if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"])[:500])
        if method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        return answer

    def open(self, url: str, width: int = 1400) -> None:
        """Show a page on a light screen of this width, and forget what was complained about and asked for before."""
        self.resize(width)
        self.colours(dark=False)
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def resize(self, width: int) -> None:
        """Give the page a window of this width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def colours(self, dark: bool, media: str = "screen") -> None:
        """Show the page as on a light or dark screen, or on paper."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true; one that fails, as on a page being loaded, is not."""
        end = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(f"(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() < end, f"{expression} did not become true; {self.complaints}"
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, buttons: int = 0) -> None:
        """Move, press or release the left button of the mouse at a place of the window."""
        button = "none" if kind == "mouseMoved" and not buttons else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def click(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window, and press its left button once."""
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, 1)
        self.mouse("mouseReleased", x, y)

    def close(self) -> None:
        """End the browser with all of its processes."""
        try:
            if self._socket is not None:
                self._socket.close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # all that it needs on disk is a profile for this test
            self._process.wait(30)
            self._loop.close()


async def _connected(url: str) -> WebSocketClientConnection:
    return await websocket_connect(url, max_message_size=1 << 28)
