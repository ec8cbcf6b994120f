"""A rank that cannot go on ends the others, which wait for it in a collective: one code, and one of them says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddk_ds.launcher import free_port

ROOT = Path(__file__).parents[2]
RANK = """
import sys, traceback
import torch.distributed as dist
from ddk_ds.comm import destroy, hear_leaving, leave
dist.init_process_group("gloo")
hear_leaving()
rank, code = dist.get_rank(), int(sys.argv[1 + dist.get_rank()])
dist.barrier()
if code:
    leave(code, lambda: print(f"rank {rank}: why", flush=True))
try:
    dist.barrier()
except RuntimeError:  # gloo may notice the lost connection first; a run ends like this then
    leave(1, traceback.print_exc)
destroy()
"""


@pytest.mark.parametrize(
    ("codes", "ends"),
    [((2, 0, 0), (2, 2, 2)), ((0, 0, 69), (69, 69, 69)), ((1, 1, 1), (1, 1, 1)), ((0, 0, 0), (0, 0, 0))],
)
def test_all_ranks_end_with_one_code(codes: tuple[int, ...], ends: tuple[int, ...]) -> None:
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, *map(str, codes)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert tuple(rank.returncode for rank in ranks) == ends, outputs
    said = [line for output in outputs for line in output.splitlines() if line.endswith(": why")]
    assert len(said) == any(codes) and "Traceback" not in "".join(outputs), outputs
    assert "recvValue failed" not in "".join(outputs), outputs
