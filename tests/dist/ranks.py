"""Run a function in several gloo processes on this machine, as the DeepSpeed launcher would start them.

    result = run_ranks("tests.dist.parity_worker:compare", world=2, tied=True)

calls `tests/dist/parity_worker.py`'s `compare(comm, device, tied=True)` on each rank and returns rank 0's value.
A run beyond its time is ended, and the failure shows every rank's stacks.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: str, world: int, *, timeout_s: float = 240.0, **arguments: Any) -> Any:
    """Rank 0's JSON-able result of `module:name` on `world` ranks; fails with all output if any rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-X", "faulthandler", __file__, function, json.dumps(arguments), str(result)]
        workers = []
        for rank in range(world):
            output = (Path(folder) / f"rank{rank}.txt").open("w+")
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            workers.append((subprocess.Popen(command, env=env, stdout=output, stderr=output), output))
        failed = _wait([worker for worker, _ in workers], timeout_s)
        texts = []
        for rank, (_, output) in enumerate(workers):
            output.seek(0)
            texts.append(f"--- rank {rank}\n{output.read()[-6000:]}")
            output.close()
        assert not failed, f"{function} on {world} ranks: {failed}\n" + "\n".join(texts)
        return json.loads(result.read_text())


def _wait(workers: list[subprocess.Popen[bytes]], timeout_s: float) -> str:
    """Empty if all ended well; else why not, with every worker gone."""
    import time

    end = time.monotonic() + timeout_s
    reason = ""
    while not reason and any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
        if any(worker.poll() not in (None, 0) for worker in workers):
            time.sleep(1.0)  # the others may be about to say why
            reason = "a rank failed"
        elif time.monotonic() > end:
            reason = f"not done after {timeout_s} s"
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
    codes = [worker.wait() for worker in workers]
    return reason or (f"exit codes {codes}" if any(codes) else "")


def _main() -> None:
    function, arguments, result = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    from ddk_ds.engine.runtime import start_runtime

    runtime = start_runtime()
    module, name = function.split(":")
    value = getattr(importlib.import_module(module), name)(runtime, **json.loads(arguments))
    runtime.comm.barrier()
    if runtime.comm.rank == 0:
        Path(result).write_text(json.dumps(value))
    from ddk_ds.comm import destroy

    destroy()


if __name__ == "__main__":
    _main()
