"""DDK through the real launcher: a kill, resume, export, reload. What it is compared with needs no launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_ds.data.loader import validation_batches
from tools.bench.forked import ForkedJob
from tools.bench.small_run import ROOT, without_clock, write_config

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


def start(config: Path) -> subprocess.Popen[str]:
    """Start a run on two ranks, in a process group of its own."""
    port = str(20000 + os.getpid() % 20000)
    command = [DEEPSPEED, "--num_gpus", "2", "--master_port", port, "launch/distill.py", "--config", str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(config: Path) -> str:
    """Run to the end; returns what was printed."""
    process = start(config)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-6000:]
    return output


def forked(config: Path) -> str:
    """Run to the end without a launcher, by ranks that have imported all before; returns what was printed."""
    job = ForkedJob(config, config.parent / "runs" / config.stem, 2)
    assert job.run() == 0, job.output()[-6000:]
    return job.output()


def wait_for_step(process: subprocess.Popen[str], ledger: Path, step: int) -> None:
    """Until the run's ledger has that step."""
    end = time.monotonic() + 200
    while f'"step": {step},' not in (ledger.read_text() if ledger.is_file() else ""):
        assert process.poll() is None and time.monotonic() < end, "the run did not come to the step"
        time.sleep(0.02)


def kill_at_step(config: Path, ledger: Path, step: int) -> None:
    """SIGKILL every process of the run as soon as its ledger has that step."""
    process = start(config)
    try:
        wait_for_step(process, ledger, step)
    finally:
        # The launcher starts ranks in its own process group, which is the session's.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_cpt_then_ddk_killed_and_resumed(workspace: Path, tmp_path: Path) -> None:
    cpt = {"method": "cpt", "teacher": None, "mixture": {"controller": "by_size", "ratio_cap": None}}
    teacher = {"student": {"path": str(workspace / "teacher")}, "stop": {"steps": 30}}
    options = {"checkpoint": {"every_steps": 30}, "mixture": {**cpt["mixture"], "interval_steps": 30}}
    forked(write_config(workspace, tmp_path, name="teacher", **{**cpt, **teacher, **options}))
    trained = {"teacher": {"path": str(tmp_path / "runs" / "teacher" / "export")}}

    forked(write_config(workspace, tmp_path, name="whole", **trained))
    killed = write_config(workspace, tmp_path, name="killed", **trained)
    runs = tmp_path / "runs"
    kill_at_step(killed, runs / "killed" / "ledger.jsonl", 8)
    assert not (runs / "killed" / "summary.json").exists()
    resumed = finish(killed)
    assert all(words in resumed for words in ("resumed from", "finished: 10 steps done", "mathematics"))
    assert "is finished" in forked(killed)
    assert without_clock(runs / "killed") == without_clock(runs / "whole")
    happened = [json.loads(line)["event"] for line in (runs / "killed" / "events.jsonl").read_text().splitlines()]
    assert [kind for kind in happened if kind != "checkpoint"] == ["start", "resume", "end"]

    check_ledger(runs / "killed")
    check_summary(runs / "killed")
    check_export(runs / "killed" / "export")


@pytest.mark.long("one start of the launcher; tests/unit/train/test_ledger_lines.py has the decision")
def test_a_run_whose_directory_goes_away_fails(workspace: Path, tmp_path: Path) -> None:
    config = write_config(workspace, tmp_path, name="gone", stop={"steps": 2000})
    run_dir = tmp_path / "runs/gone"
    process = start(config)
    try:
        wait_for_step(process, run_dir / "ledger.jsonl", 2)
        run_dir.rename(tmp_path / "runs/moved")
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and "finished" not in output
    assert "ledger.jsonl was deleted or changed while the run wrote it" in output
    assert not run_dir.exists() or not (run_dir / "ledger.jsonl").exists()


def check_ledger(run_dir: Path) -> None:
    """Eq. 1 and 2 hold between the lines, and the counts drawn follow the proportions."""
    records = without_clock(run_dir)
    intervals = [record for record in records if record["kind"] == "interval"]
    assert [record["step"] for record in intervals] == [0, 4, 8]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 11))
    previous = None
    for record in intervals:
        ratio = np.minimum(np.array(list(record["ratio"].values())), 10.0)
        proportions = np.array(list(record["proportions"].values()))
        if previous is None:
            softmax = np.exp(ratio) / np.exp(ratio).sum()
            expected = 0.05 + (1 - 3 * 0.05) * softmax
        else:
            psi = previous * np.exp(ratio)
            expected = 0.5 * psi / psi.sum() + 0.5 / 3
        np.testing.assert_allclose(proportions, expected, rtol=1e-12)
        counts = np.array(list(record["counts"].values()))
        assert counts.sum() == (32 if record["step"] < 8 else 16)
        assert (np.abs(counts - proportions * counts.sum()) < 1).all()
        previous = proportions
    tokens = np.sum([record["domain_tokens"] for record in steps], axis=0)
    drawn = np.sum([list(record["counts"].values()) for record in intervals], axis=0)
    np.testing.assert_array_equal(tokens, drawn * 63)


def check_summary(run_dir: Path) -> None:
    """summary.json has what is promised, and the run has learnt."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["tokens"] == 10 * 8 * 63 and summary["wall_s"] > 0
    assert summary["mean_ratio_after"] < summary["mean_ratio_before"]
    assert [domain["name"] for domain in summary["domains"]] == ["python", "cpp", "mathematics"]
    for domain in summary["domains"]:
        assert domain["student_ppl_after"] < domain["student_ppl_before"]
        assert domain["ratio_after"] == domain["student_ppl_after"] / domain["teacher_ppl"]
    assert abs(sum(domain["token_share"] for domain in summary["domains"]) - 1) < 1e-12


def check_export(export: Path) -> None:
    """Plain transformers loads the student, gives the run's own numbers back, and generates."""
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer("def main():", return_tensors="pt").input_ids
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > ids.shape[1]
    names = ["python", "cpp", "mathematics"]
    summary = json.loads((export.parent / "summary.json").read_text())
    config = (export.parent / "config.yaml").read_text()
    data = next(line.split(": ")[1] for line in config.splitlines() if "shards" in line)
    for name, [(batch, *_)] in zip(
        names, validation_batches(data, names, num_samples=12, rank=0, world=1, micro_batch=12), strict=True
    ):
        with torch.no_grad():
            loss = model(batch, labels=batch).loss
        expected = next(d for d in summary["domains"] if d["name"] == name)["student_ppl_after"]
        np.testing.assert_allclose(float(loss.exp()), expected, rtol=1e-5)
