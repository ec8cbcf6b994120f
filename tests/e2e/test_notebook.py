"""The example notebook runs on small models, in a fresh interpreter; what it shows is what the run's files hold.

Its cells are taken out of the file and run as IPython would: that needs no kernel, whose packages are twenty.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.terminal import hear_signals
from tools.bench.small_run import ROOT, without_clock, write_config

NOTEBOOK = ROOT / "docs/notebook.ipynb"
# Runs the cells in one namespace, and shows the value of a cell's last expression as HTML where it has that.
RUNNER = """
import ast, json, sys
import matplotlib; matplotlib.use("agg")
names = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell["id"], "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
        print(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
"""


def python(folder: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a fresh interpreter in `folder`, as a kernel is one: in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="module")
def folder(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with my.yaml, a run of ten steps."""
    folder = tmp_path_factory.mktemp("notebook")
    write_config(workspace, folder, name="my")
    return folder


@pytest.mark.long("a start of the launcher; test_run.py has the others")
def test_the_example(folder: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), "commit it without outputs"
    output = finish(python(folder, RUNNER, str(NOTEBOOK)))
    run = folder / "runs/my"
    summary = json.loads((run / "summary.json").read_text())
    assert "interval 0: " in output and "finished: 10 steps done" in output, "the run's own output is shown"
    for domain in summary["domains"]:
        assert f"{domain['name']:>12}  {domain['ratio_before']:.3f} -> {domain['ratio_after']:.3f}" in output
    largest = max(domain["ratio_after"] for domain in summary["domains"])
    assert f"largest{' ' * 11}{largest:.3f}" in output
    last = [line for line in without_clock(run) if line["kind"] == "step"][-1]
    assert f"<td>{last['loss']:.6g}</td>" in output
    assert "def main(" in output, "the export generates"


@pytest.mark.long("three starts of the launcher; tests/e2e/test_interruption.py has the signals themselves")
def test_interrupt_continue_and_errors(folder: Path) -> None:
    """An interrupt of the kernel saves the run, the same call continues it, and errors are exceptions."""
    script = (
        "from ddk_ds import *\ntry:\n    print(distil('my.yaml', 'name=cut', 'stop.steps=40', ranks=2, quiet=True))\n"
        "except Exception as error:\n    print(repr(error))"
    )
    first, ledger, end = python(folder, script), folder / "runs/cut/ledger.jsonl", time.monotonic() + 200
    while '"step": 3,' not in (ledger.read_text() if ledger.is_file() else ""):
        assert first.poll() is None and time.monotonic() < end, "the run did not come to step 3"
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    assert finish(first).startswith("RunInterrupted("), "and without a traceback"
    assert not (folder / "runs/cut/summary.json").exists()
    assert "40 steps done" in finish(python(folder, script))
    assert [line["step"] for line in without_clock(folder / "runs/cut") if line["kind"] == "step"] == [*range(1, 41)]
    other = finish(python(folder, script.replace("steps=40", "steps=41")))
    assert other.startswith("UserError("), other
    assert "holds another run: stop.steps was 40, is 41" in other
