"""A hub that cannot answer now is an error that time may mend; a name that it does not have is the user's.

The hub is a web server on the loopback that gives one answer, and the client is huggingface_hub's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.utils
import pytest

from ddk_ds.engine.model_files import check_hub_name
from ddk_ds.errors import ConfigError, TemporaryError

# The client keeps its connections; versions 0 and 2 close them by different names.
reset_sessions = getattr(huggingface_hub.utils, "close_session", None) or huggingface_hub.utils.reset_sessions


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[int]]:
    """Answer each of the client's requests with the status in the list."""
    status = [404]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    for module in ("constants", "file_download"):  # of version 2 and of version 0
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, address + "/{repo_id}/{filename}", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # where the environment says otherwise
    reset_sessions()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    yield status
    server.shutdown()
    server.server_close()
    reset_sessions()


@pytest.mark.parametrize(("status", "kind"), [(503, TemporaryError), (429, TemporaryError), (404, ConfigError)])
def test_an_answer_of_the_hub(hub: list[int], status: int, kind: type[Exception]) -> None:
    hub[0] = status
    with pytest.raises(kind, match=r"student\.path: .*owner/model"):
        check_hub_name("owner/model", "student.path")


@pytest.mark.usefixtures("offline_hub")
def test_an_offline_hub_is_named() -> None:
    with pytest.raises(ConfigError, match=r"student\.path: owner/model .*HF_HUB_OFFLINE"):
        check_hub_name("owner/model", "student.path")
