"""A check's result, the results of all ranks as one, and the limit of a wait."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from ddk_ds.comm import announce, missing_ranks
from ddk_ds.errors import UserError

EXIT_FAILED = 2
Status = Literal["pass", "warn", "fail"]
_SEVERITY: dict[str, int] = {"pass": 0, "warn": 1, "fail": 2}
# What the rank that reports a wait without an end is ahead of the others: the launcher ends all when one is gone.
_REPORT_S = 2.0


@dataclass(frozen=True)
class Row:
    """What one check found, and what to do about it."""

    name: str
    status: Status
    found: str
    fix: str = ""


def judged(name: str, found: str, *, fail: bool, warn: bool = False, fix: str = "") -> Row:
    """A row by its two conditions; the fix is shown where one of them holds."""
    status: Status = "fail" if fail else "warn" if warn else "pass"
    return Row(name, status, found, fix if status != "pass" else "")


def attempt(name: str, check: Callable[..., Row], *arguments: Any) -> Row:
    """The row of check(*arguments); an error is a row too, so that the checks after it are still made."""
    try:
        return check(*arguments)
    except UserError as error:
        return Row(name, "fail", str(error))
    except Exception as error:
        return Row(name, "fail", f"{type(error).__name__}: {error}", "mend or replace what this names")


def merge(by_rank: Sequence[Sequence[Row]], hosts: Sequence[str]) -> list[Row]:
    """One row for each check: the worst, and on which ranks it is so."""
    merged: dict[str, Row] = {}
    names = dict.fromkeys(row.name for rows in by_rank for row in rows)
    for name in names:
        found = [(rank, row) for rank, rows in enumerate(by_rank) for row in rows if row.name == name]
        rank, worst = max(found, key=lambda item: (_SEVERITY[item[1].status], -item[0]))
        alike = sum(row.status == worst.status for _, row in found)
        if worst.status != "pass" and any(row != worst for _, row in found):
            more = f" and {alike - 1} more" if alike > 1 else ""
            worst = replace(worst, found=f"rank {rank} on {hosts[rank]}{more}: {worst.found}")
        merged[name] = worst
    return list(merged.values())


def failed(rows: Sequence[Row]) -> bool:
    """Whether a run must not start."""
    return any(row.status == "fail" for row in rows)


@contextmanager
def deadline(place: str, seconds: float) -> Iterator[None]:
    """Where the body takes longer, say which ranks never came to `place`, and end this process with EXIT_FAILED.

    A collective that hangs cannot be left otherwise: it is a thread that ends the process.
    """
    announce(place)
    timer = threading.Timer(seconds, _give_up, (place, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(place: str, seconds: float) -> None:
    rank, size = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
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
        why = "every rank came to it; look at the network between the nodes (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME)"
    reporter = min(set(range(size)) - set(missing or []), default=rank)
    if rank == reporter:
        print(f"preflight: {place}: fail: no answer within {seconds:g} s: {why}", file=sys.stderr, flush=True)
    else:
        time.sleep(_REPORT_S)
    os._exit(EXIT_FAILED)
