"""A ledger as tables has the numbers of its lines, which `json` alone reads here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddk_ds import load_ledger
from ddk_ds.errors import CheckpointError
from ddk_ds.report.ledger_table import LedgerTable
from tests.unit.report.made_run import DOMAINS, make_run

HEAVY = ("torch", "transformers", "deepspeed", "numpy", "pydantic", "matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with continuations of a prompt."""
    run = make_run(tmp_path_factory.mktemp("ledger"))
    sample = {"name": "python", "prompt": "<b>", "student": "x" * 99, "teacher": None}
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"kind": "samples", "step": 60, "samples": [sample], "clock": {}}) + "\n")
    return run


def lines(run: Path, *kinds: str) -> list[dict[str, object]]:
    records = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] in kinds]


def test_steps(run: Path) -> None:
    ledger, raw = load_ledger(run), lines(run, "step")
    assert len(ledger) == len(raw) == 60
    assert ledger["step"].dtype == np.int64
    for name in ("step", "loss", "ce", "learning_rate"):
        assert ledger[name].tolist() == [line[name] for line in raw]
    assert ledger["clock/step_s"].tolist() == [line["clock"]["step_s"] for line in raw]  # type: ignore[index]
    for at, name in enumerate(DOMAINS):
        expected = [line["domain_tokens"][at] for line in raw]  # type: ignore[index]
        assert ledger["domain_tokens"][name].tolist() == ledger[f"domain_tokens/{name}"].tolist() == expected


def test_measurements(run: Path) -> None:
    measured, raw = load_ledger(str(run)).measurements, lines(run, "interval", "end")
    assert measured["kind"].tolist() == [line["kind"] for line in raw]
    assert measured["ratio"].columns == list(DOMAINS)
    for name in DOMAINS:
        assert measured["ratio"][name].tolist() == [line["ratio"][name] for line in raw]  # type: ignore[index]
    shares = measured["proportions"]["cpp"]
    assert shares[:-1].tolist() == [line["proportions"]["cpp"] for line in raw[:-1]]  # type: ignore[index]
    assert np.isnan(shares[-1]), "the run's end begins no interval"


def test_samples(run: Path) -> None:
    assert load_ledger(run).samples[0] == {"step": 60, **lines(run, "samples")[0]["samples"][0]}  # type: ignore[index]


def test_rows_and_slices(run: Path) -> None:
    ledger = load_ledger(run)
    assert ledger[-1]["loss"] == lines(run, "step")[-1]["loss"] and type(ledger[-1]["loss"]) is float
    assert [row["step"] for row in ledger[2:5].rows()] == [3, 4, 5]
    low = ledger[ledger["loss"] < np.median(ledger["loss"])]
    assert len(low) == 30 and low["loss"].max() < np.median(ledger["loss"])
    assert ledger[[0, -1]]["step"].tolist() == [1, 60]
    assert "loss" in ledger and next(iter(ledger)) == "step"
    with pytest.raises(KeyError, match=r"'los': no such column; there are step, "):
        ledger["los"]
    with pytest.raises(IndexError):
        ledger[60]


def test_what_a_notebook_shows(run: Path) -> None:
    ledger = load_ledger(run)
    text = repr(ledger[:20])
    assert text.splitlines()[1].split()[:2] == ["0", "1"] and "20 rows x" in text and len(text.splitlines()) == 13
    page = ledger.samples._repr_html_()
    assert "&lt;b&gt;" in page and "x" * 38 not in page, "escaped, and cut"
    assert repr(LedgerTable([])).endswith("0 rows x 0 columns")


def test_pandas(run: Path) -> None:
    pytest.importorskip("pandas")
    frame = load_ledger(run).to_pandas()
    assert frame["loss"].iloc[3] == lines(run, "step")[3]["loss"] and len(frame) == 60


def test_a_run_without_a_teacher(tmp_path: Path) -> None:
    measured = load_ledger(make_run(tmp_path, teacher=False)).measurements
    assert measured["ratio"].tolist() == [None] * len(measured)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_ledger(tmp_path)


def test_the_import_is_light() -> None:
    """`import ddk_ds` imports nothing else; the table only numpy and what reads a ledger."""
    script = (
        f"import sys, ddk_ds; heavy = {HEAVY}; assert not [m for m in heavy if m in sys.modules]; "
        "ddk_ds.load_ledger; assert [m for m in heavy if m in sys.modules] == ['numpy']; "
        "ddk_ds.distil; assert 'torch' not in sys.modules; assert set(ddk_ds.__all__) <= set(dir(ddk_ds))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
