"""Back to the last checkpoint, past the samples on which the numbers went wrong (as in PaLM, arXiv 2204.02311, 5.1)."""

from __future__ import annotations

import json

from ddk_ds.files import write_text
from ddk_ds.train.restore import ROLL_BACKS, find_start, read_roll_backs
from ddk_ds.train.setup import Run, go_on_from


def roll_back(run: Run, reason: str) -> bool:
    """Restore the last checkpoint and leave out all samples since then, if the configuration allows one more.

    What was done is kept in roll_backs.json, so that a run that is killed before its next checkpoint does the same.
    Returns whether it was done. Collective.
    """
    config, comm = run.config, run.runtime.comm
    done = read_roll_backs(config.run_dir, comm)
    if len(done) >= config.guard.roll_backs:
        return False
    failed, skip_until = run.state.step, run.state.position
    run.watchdog.watch("checkpoint", failed)
    start = find_start(config, comm)
    if start is None:
        return False
    if comm.rank == 0:
        entry = {"step": start.manifest.step, "failed_step": failed, "skip_until": skip_until, "reason": reason}
        write_text(config.run_dir / ROLL_BACKS, json.dumps([*done, entry], indent=1))
    comm.barrier()
    go_on_from(run, start)
    run.ledger.event("roll_back", step=run.state.step, failed_step=failed, skip_until=skip_until, reason=reason)
    run.progress.say(
        f"warning: {reason}. Rolled back to step {run.state.step}; the {skip_until - run.state.position:,} samples "
        "since then are left out"
    )
    return True
