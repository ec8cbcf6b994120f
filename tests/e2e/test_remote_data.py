"""Runs through the real launcher whose data is in S3, and one whose data breaks while it trains."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import WHOLE
from tests.e2e.test_run import finish, start, wait_for_step
from tests.s3_server import ENVIRONMENT, S3Server
from tools.bench.small_run import without_clock, write_config

pytestmark = pytest.mark.long("two starts of the launcher; tests/unit/data has the faults of a store")


def test_s3_that_fails_every_tenth_request_gives_the_same_run(
    s3: S3Server, workspace: Path, tmp_path: Path, whole: Path
) -> None:
    url = s3.upload(workspace / "shards", "shards")
    s3.fail_every = 10
    remote = {"path": url, "cache_dir": str(tmp_path / "cache"), "cache_limit_gb": 1.0, "num_workers": 1}
    output = finish(write_config(workspace, tmp_path, name="remote", data=remote, **WHOLE))
    runs = tmp_path / "runs"
    assert without_clock(runs / "remote") == without_clock(whole)
    shards = {key: count for key, count in s3.got.items() if key.endswith("mds")}
    assert len(shards) == 6 and set(shards.values()) == {1}, shards
    everything = output + "".join(file.read_text() for file in runs.rglob("*.jsonl"))
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in everything


def test_a_store_that_is_down_is_waited_for_and_then_left_with_the_code_of_what_time_mends(
    s3: S3Server, workspace: Path, tmp_path: Path, whole: Path
) -> None:
    url = s3.upload(workspace / "shards", "shards")
    remote = {"path": url, "cache_dir": str(tmp_path / "cache")}
    # It goes down when the first step reads, and the ranks' patience is short.
    s3.breaks_at = "/train/shard"
    process = start(
        write_config(workspace, tmp_path, name="down", data={**remote, "download_patience_s": 2.0}, **WHOLE)
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 69, output[-3000:]
    assert output.count("error:") == 1 and "503" in output and "Traceback" not in output, output[-3000:]
    # The same command goes on. The store is down until a rank has said that it waits, which is no more than a wait.
    s3.breaks_at = None
    process = start(write_config(workspace, tmp_path, name="down", data=remote, **WHOLE))
    output = ""
    for line in process.stdout or ():
        output += line
        s3.down = s3.down and "cannot be fetched for" not in line
    assert process.wait(timeout=60) == 0, output[-6000:]
    assert "cannot be fetched for" in output and "trying for 900 s" in output
    assert without_clock(tmp_path / "runs/down") == without_clock(whole)


def test_a_shard_that_breaks_in_mid_run_ends_all_ranks_with_one_error(workspace: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(workspace / "shards", data)
    options = {"stop": {"steps": 100_000}, "data": {"path": str(data)}, "mixture": {"interval_steps": 100_000}}
    config = write_config(workspace, tmp_path, name="broken", **options)
    ledger = tmp_path / "runs/broken/ledger.jsonl"
    process = start(config)
    try:
        wait_for_step(process, ledger, 3)
        for file in data.glob("*/train/*.mds"):
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        broken = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - broken < 60
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output[-3000:]
    assert "is damaged: its xxh64 is" in errors[0] and "of domain" in errors[0]
    assert "Traceback" not in output
