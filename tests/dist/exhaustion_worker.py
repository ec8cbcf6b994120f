"""Function for every rank of test_exhaustion_run.py: runs with limited domains, one with another micro-batch later."""

from __future__ import annotations

from ddk_ds.config import load_config
from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.loop import train
from ddk_ds.train.run_dir import check_run_dir, run_identity
from tests.dist.resume_worker import BreakOff, prepare


def limited_runs(runtime: Runtime, config_path: str, other_path: str, stop_path: str, lines: int) -> list[str]:
    """Run `whole`; `moved`, broken off after that many ledger lines and resumed with another batch; and `stopped`.

    Return the reasons for which they ended.
    """
    reasons = [train(prepare(runtime, config_path, "whole", None))["reason"]]
    try:
        train(prepare(runtime, config_path, "moved", lines))
    except BreakOff:
        config = load_config(other_path, ["name=moved"])
        check_run_dir(config, run_identity(config, check_inputs(config, runtime.comm).fingerprints))
        reasons.append(train(prepare(runtime, other_path, "moved", None))["reason"])
    reasons.append(train(prepare(runtime, stop_path, "stopped", None))["reason"])
    return reasons
