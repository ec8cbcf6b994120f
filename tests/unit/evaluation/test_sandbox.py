"""Generated code, shut in: what each program tries, and that it does not get there."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddk_ds.errors import ConfigError
from ddk_ds.evaluation import jail, sandbox
from ddk_ds.evaluation.sandbox import Limits, Outcome, check_sandbox, run_program, run_programs

TIGHT = Limits(cpu_s=2, wall_s=1.0, memory_bytes=256 << 20, processes=16)


def run(source: str) -> Outcome:
    return run_program(source, TIGHT)


MARK = f"ddk{os.getpid()}"
BE_MARKED = f"import ctypes\nctypes.CDLL(None).prctl(15, {MARK.encode()!r})\n"
"""Gives a program and what it forks a name (PR_SET_NAME) that no other test's has."""


def marked() -> list[Path]:
    """Processes of this machine that have the name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [path] if path.read_text().strip() == MARK else []
        except OSError:
            continue
    return found


def test_a_program_passes_by_coming_to_its_end() -> None:
    assert run("import math\nassert math.gcd(6, 4) == 2\n") == Outcome(True, "", check_sandbox())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "ended early"),
        ("import os; os._exit(0)", "ended early"),
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
    assert marked() == []


def test_a_daemon_does_not_outlive_its_program() -> None:
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)\nos.wait()\n"
    )
    assert run(BE_MARKED + daemon).passed
    assert marked() == []


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
    # Below /tmp, where permissions alone would let any user do it.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        kept = Path(directory) / "kept.txt"
        kept.write_text("as it was")
        kept.chmod(0o666)
        assert not run(f"import os\npath = {str(kept)!r}\n{attempt}\n").passed
        assert kept.read_text() == "as it was"
        assert [path.name for path in Path(directory).iterdir()] == ["kept.txt"]


def test_there_is_no_network() -> None:
    walls = check_sandbox()
    if not walls.network:
        pytest.skip("this machine permits no network namespace, which check_sandbox says")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        port = server.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert "Network is unreachable" in outcome.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_it_sees_no_environment_and_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    assert run("import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ").passed
    seen = "import os\nassert [n for n in os.listdir('/proc') if n.isdigit()] in (['1'], []), os.listdir('/proc')"
    assert run(seen).passed or not check_sandbox().network


def test_it_is_not_root_and_has_no_rights() -> None:
    assert run(
        "import os\nassert os.getuid() != 0\nstatus = open('/proc/self/status').read()\n"
        "assert 'CapEff:\\t0000000000000000' in status and 'NoNewPrivs:\\t1' in status, status"
    ).passed


def test_many_run_beside_one_another() -> None:
    outcomes = run_programs([f"assert {number} % 3" for number in range(6)], TIGHT)
    assert [outcome.passed for outcome in outcomes] == [False, True, True, False, True, True]


def in_child(action: Callable[[], object]) -> int:
    """Exit code of a fork that runs `action`: 0, or 1 where it raises OSError."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_landlock_keeps_files_where_namespaces_are_not_permitted(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("as it was")
    if in_child(lambda: jail.restrict_writes(str(inside))):
        pytest.skip("this kernel has no Landlock")

    def restricted(action: Callable[[], object]) -> int:
        return in_child(lambda: (jail.restrict_writes(str(inside)), action()))

    assert restricted(lambda: (inside / "new").write_text("new")) == 0
    assert (inside / "new").read_text() == "new"
    assert restricted(outside.read_text) == 0
    assert restricted(outside.unlink) == 1
    assert restricted(lambda: outside.write_text("changed")) == 1
    assert restricted(lambda: (tmp_path / "other").mkdir()) == 1
    assert outside.read_text() == "as it was"


def test_where_no_wall_stands_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "jail.py"
    source = Path(jail.__file__).read_text()
    broken.write_text(source.replace("version < 1", "True").replace('options["namespaces"] and', "False and"))
    monkeypatch.setattr(sandbox, "_JAIL", broken)
    with pytest.raises(ConfigError, match=r"permits no walls.*neither namespaces nor Landlock"):
        run_program("open('/tmp/ddk-was-run', 'w')")
