"""Two ranks without a launcher, as srun starts them, so that each one's exit code and output are seen."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ddk_ds.commands import distill_rank
from ddk_ds.launcher import free_port
from tests.dist.ranks import SERVER
from tools.bench.forked import code_of, rank_environment, redirect


class Ranks:
    """Two ranks of a run, each with an output of its own, forked from a server that has imported what they need."""

    def __init__(
        self, config: Path, folder: Path, second: Mapping[str, str] | None = None, *, anew: bool = False
    ) -> None:
        """Start them; `second` are further variables of rank 1, `anew`: new interpreters, which import DeepSpeed now.

        SLOW_FILE delays it by SLOW_S when it opens a file whose path has that in it, as a slow disk does; only the
        first time with SLOW_ONCE.
        """
        self.outputs = [folder / f"rank-{rank}.out" for rank in range(2)]
        self.processes: list[BaseProcess] = []
        context: Any = multiprocessing.get_context("spawn") if anew else SERVER
        port = free_port()
        for rank, path in enumerate(self.outputs):
            variables = rank_environment(rank, 2, port) | {"OMP_NUM_THREADS": "1"} | dict(second or {} if rank else {})
            path.touch()
            self.processes.append(context.Process(target=_rank, args=(config, os.environ | variables, path)))
            self.processes[-1].start()

    def wait(self, timeout_s: float) -> list[int | None]:
        """Wait for their ends, and end what is left after the time; the exit codes, None of those that had no end."""
        end = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(1.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    @property
    def text(self) -> str:
        """All that they have printed."""
        return "\n".join(path.read_text() for path in self.outputs)


def _rank(config: Path, environment: dict[str, str], output: Path) -> None:
    redirect(output)
    os.environ.clear()
    os.environ.update(environment)
    if "SLOW_FILE" in environment:
        sys.addaudithook(_slow)
    os._exit(code_of(partial(distill_rank.main, ["--config", str(config)])))


def _slow(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and os.environ.get("SLOW_FILE", "\0") in str(arguments[0]):
        if "SLOW_ONCE" in os.environ:
            del os.environ["SLOW_FILE"]
        print("waits for the disk", file=sys.stderr, flush=True)
        time.sleep(float(os.environ["SLOW_S"]))
