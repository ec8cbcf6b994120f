"""Run a function in several gloo processes on this machine, as the DeepSpeed launcher would start them.

    result = run_ranks("tests.dist.parity_worker:compare", world=2, tied=True)

calls `tests/dist/parity_worker.py`'s `compare(runtime, tied=True)` on each rank and returns rank 0's value. A run
beyond its time is ended, and the failure shows every rank's stacks.

Ranks are forked from a server that has imported DeepSpeed and Transformers once: that takes each rank five seconds.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ddk_ds.launcher import free_port
from tools.bench.forked import rank_environment

# The server's imports look for GPUs, after which a process that it forks cannot use them.
SERVER = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
SERVER.set_forkserver_preload(["ddk_ds.train.setup", "tests.dist.imported"])


def run_ranks(
    function: str, world: int, *, per_node: int | None = None, timeout_s: float = 240.0, **arguments: Any
) -> Any:
    """Rank 0's JSON-able result of `module:name` on `world` ranks; fails with all output if any rank fails.

    `per_node`: ranks that are told to be on one node; None: all.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = _start(function, world, Path(folder), arguments, per_node)
        failed = _wait(workers, timeout_s)
        assert not failed, f"{function} on {world} ranks: {failed}\n{_texts(Path(folder))}"
        return json.loads((Path(folder) / "result.json").read_text())


def killed_ranks(function: str, world: int, kill: Callable[[], bool], **arguments: Any) -> bool:
    """Start a function as `run_ranks` does, and kill its ranks, one after the other, when `kill` returns True.

    Return False if they came to their end before. Fails if a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = _start(function, world, Path(folder), arguments)
        end = time.monotonic() + 240
        while not kill():
            time.sleep(0.005)
            codes = [worker.exitcode for worker in workers]
            if all(code == 0 for code in codes):
                return False
            assert not any(codes) and time.monotonic() < end, f"{function}, {codes}\n{_texts(Path(folder))}"
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        return any(worker.exitcode == -signal.SIGKILL for worker in workers)


def _start(
    function: str, world: int, folder: Path, arguments: dict[str, Any], per_node: int | None = None
) -> list[BaseProcess]:
    port = free_port()
    workers: list[BaseProcess] = []
    for rank in range(world):
        env = os.environ | rank_environment(rank, world, port, per_node) | {"OMP_NUM_THREADS": "1"}
        workers.append(SERVER.Process(target=_rank, args=(function, arguments, env, folder)))
        workers[-1].start()
    return workers


def _texts(folder: Path) -> str:
    return "\n".join(f"--- {path.stem}\n{path.read_text()[-6000:]}" for path in sorted(folder.glob("rank*.txt")))


def _wait(workers: Sequence[BaseProcess], timeout_s: float) -> str:
    """Empty if all ended well; else why not, with every worker gone."""
    end = time.monotonic() + timeout_s
    reason = ""
    while not reason and any(worker.exitcode is None for worker in workers):
        time.sleep(0.05)
        if any(worker.exitcode not in (None, 0) for worker in workers):
            time.sleep(2.0)  # the others may be about to say why
            reason = "a rank failed"
        elif time.monotonic() > end:
            reason = f"not done after {timeout_s} s"
    for worker in workers:
        if worker.exitcode is None:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGABRT)  # faulthandler prints the stacks
    for worker in workers:
        worker.join()
    codes = [worker.exitcode for worker in workers]
    return f"{reason or 'not well'}; exit codes {codes}" if any(codes) else reason


def _rank(function: str, arguments: dict[str, Any], env: dict[str, str], folder: Path) -> None:
    """One rank, with the environment of the test that asks."""
    with (folder / f"rank{env['RANK']}.txt").open("w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(env)
    from ddk_ds.comm import destroy
    from ddk_ds.engine.runtime import start_runtime
    from ddk_ds.lifeline import follow_launcher

    follow_launcher()
    runtime = start_runtime()
    module, name = function.split(":")
    value = getattr(importlib.import_module(module), name)(runtime, **arguments)
    runtime.comm.barrier()
    if runtime.comm.rank == 0:
        (folder / "result.json").write_text(json.dumps(value))
    destroy()
