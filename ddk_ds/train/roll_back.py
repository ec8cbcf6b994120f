"""Back to the last checkpoint, past the samples on which the numbers went wrong (as in PaLM, arXiv 2204.02311, 5.1)."""

from __future__ import annotations

import json

from ddk_ds.files import write_text
from ddk_ds.train.restore import find_start
from ddk_ds.train.setup import Run, go_on_from


def roll_back(run: Run, reason: str) -> bool:
    """Restore the last checkpoint and leave out all samples since then, if the configuration allows one more.

    What was done is kept in roll_backs.json, so that a run that is killed before its next checkpoint does the same.
    Returns whether it was done. Collective.
    """
    config, comm = run.config, run.runtime.comm
    path = config.run_dir / "roll_backs.json"
    done = comm.broadcast_object(json.loads(path.read_text()) if comm.rank == 0 and path.is_file() else [])
    if len(done) >= config.guard.roll_backs:
        return False
    failed, skip_until = run.state.step, run.state.position
    run.watchdog.watch("checkpoint", failed)
    start = find_start(config, comm)
    if start is None:
        return False
    if comm.rank == 0:
        entry = {"step": start.manifest.step, "failed_step": failed, "skip_until": skip_until, "reason": reason}
        write_text(path, json.dumps([*done, entry], indent=1))
    comm.barrier()
    go_on_from(run, start)
    run.ledger.event("roll_back", step=run.state.step, failed_step=failed, skip_until=skip_until, reason=reason)
    run.progress.say(
        f"warning: {reason}. Rolled back to step {run.state.step}; the {skip_until - run.state.position:,} samples "
        "since then are left out"
    )
    return True
