"""The result of a check, the results of all ranks merged into one, and the time limit of a wait."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from ddk_ds.comm import announce, leave, missing_ranks
from ddk_ds.errors import UserError
from ddk_ds.exit_codes import EXIT_TEMPORARY

Status = Literal["pass", "warn", "fail"]
_SEVERITY: dict[str, int] = {"pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Row:
    """Result of one check: its name and status, the finding, and the fix ("" if the check passed)."""

    name: str
    status: Status
    found: str
    fix: str = ""


def judged(name: str, found: str, *, fail: bool, warn: bool = False, fix: str = "") -> Row:
    """Return a row that fails or warns under these conditions; it has the fix only if it does not pass."""
    status: Status = "fail" if fail else "warn" if warn else "pass"
    return Row(name, status, found, fix if status != "pass" else "")


def attempt(name: str, check: Callable[..., Row], *arguments: Any) -> Row:
    """Return the row of check(*arguments), or a failed row if it raises, so that later checks are still made."""
    try:
        return check(*arguments)
    except UserError as error:
        return Row(name, "fail", str(error))
    except Exception as error:
        return Row(name, "fail", f"{type(error).__name__}: {error}", "mend or replace what this names")


def merge(by_rank: Sequence[Sequence[Row]], hosts: Sequence[str]) -> list[Row]:
    """Return one row for each check: the worst of all ranks, with the rank and its host if not all ranks have it.

    Args:
        by_rank: the rows of each rank.
        hosts: the host of each rank.
    """
    merged: dict[str, Row] = {}
    names = dict.fromkeys(row.name for rows in by_rank for row in rows)
    for name in names:
        ranked = [(rank, row) for rank, rows in enumerate(by_rank) for row in rows if row.name == name]
        rank, worst = max(ranked, key=lambda item: (_SEVERITY[item[1].status], -item[0]))
        alike = sum(row.status == worst.status for _, row in ranked)
        if worst.status != "pass" and any(row != worst for _, row in ranked):
            more = f" and {alike - 1} more" if alike > 1 else ""
            worst = replace(worst, found=f"rank {rank} on {hosts[rank]}{more}: {worst.found}")
        merged[name] = worst
    return list(merged.values())


def failed(rows: Sequence[Row]) -> bool:
    """Return True if a check failed, so that the run must not start."""
    return any(row.status == "fail" for row in rows)


@contextmanager
def deadline(place: str, seconds: float) -> Iterator[None]:
    """Limit the time of the body: beyond it, say which ranks did not reach `place`, and end all with EXIT_TEMPORARY.

    A thread ends the process, because a collective that hangs cannot be left otherwise. A slow disk or a start on busy
    nodes is what time may mend; a job is requeued for it only so many times.
    """
    announce(place)
    timer = threading.Timer(seconds, _give_up, (place, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        # If it has begun to end all ranks, it ends this process too. A connection that another rank closes meanwhile is
        # an error in the body, which must not end it first, by another code.
        timer.join()


def _give_up(place: str, seconds: float) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    try:
        missing = missing_ranks(place)
    except Exception:  # the process that keeps the store may be the one that is gone
        missing = None
    if missing is None:
        why = "nor does the first rank's store answer; is that process gone, or its node out of reach?"
    elif missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        why = f"rank {shown} of {size} never came to it; look at its output and its node"
    else:
        why = (
            "every rank came to it; a disk is slow on one of them, or look at the network between the nodes "
            "(NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME)"
        )
    line = f"preflight: {place}: fail: no answer within {seconds:g} s: {why}"
    leave(EXIT_TEMPORARY, lambda: print(line, file=sys.stderr, flush=True))
