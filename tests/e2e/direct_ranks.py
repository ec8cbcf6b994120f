"""Two ranks without a launcher, as srun starts them, so that each one's exit code and output are seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ddk_ds.launcher import free_port
from tools.bench.small_run import ROOT

# Delays a rank by SLOW_S when it opens a file whose path has SLOW_FILE in it, as a slow disk does; only the first time
# with SLOW_ONCE.
_SITE = """
import os, sys, time
def slow(event, arguments):
    if event == "open" and os.environ.get("SLOW_FILE", "\\0") in str(arguments[0]):
        if "SLOW_ONCE" in os.environ:
            del os.environ["SLOW_FILE"]
        print("waits for the disk", file=sys.stderr, flush=True)
        time.sleep(float(os.environ["SLOW_S"]))
if os.environ.get("SLOW_FILE"):
    sys.addaudithook(slow)
"""


class Ranks:
    """Two ranks of a run, each with an output of its own."""

    def __init__(self, config: Path, folder: Path, second: Mapping[str, str] | None = None) -> None:
        """Start them; `second` are further variables of rank 1."""
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(_SITE)
        common = {
            **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.outputs = [folder / f"rank-{rank}.out" for rank in range(2)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, path in enumerate(self.outputs):
            env = (
                os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(second or {} if rank else {})
            )
            command = [sys.executable, "launch/distill.py", "--config", str(config)]
            with path.open("w") as output:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
                )

    def wait(self, timeout_s: float) -> list[int]:
        """Wait for their ends; the exit codes."""
        end = time.monotonic() + timeout_s
        try:
            return [process.wait(max(1.0, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    @property
    def text(self) -> str:
        """All that they have printed."""
        return "\n".join(path.read_text() for path in self.outputs)
