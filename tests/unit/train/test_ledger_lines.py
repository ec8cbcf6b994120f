"""The ledger and the events on the disk: whole lines after half a line, and no run that goes on in another's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddk_ds.data.teacher_perplexities import PerplexityCache, measured_in
from ddk_ds.data.teacher_place import LocalPlace
from ddk_ds.errors import CheckpointError
from ddk_ds.run_files import UNREADABLE, read_events
from ddk_ds.train.ledger import Ledger


def ledger_of(run_dir: Path) -> Ledger:
    """Return a ledger that has begun."""
    ledger = Ledger(run_dir, rank=0)
    ledger.rewind(0)
    return ledger


def test_a_full_disks_half_line_spoils_no_other(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    Ledger(tmp_path, rank=0).event("start", world_size=2)
    with events.open("ab") as stream:
        stream.write(b'{"event": "checkpoint", "ti')
    Ledger(tmp_path, rank=0).event("resume", step=4)
    lines = events.read_text().splitlines()
    assert len(lines) == 3 and lines[1] == '{"event": "checkpoint", "ti'
    first, broken, last = read_events(tmp_path)
    assert (first["event"], first["world_size"], last["event"], last["step"]) == ("start", 2, "resume", 4)
    assert broken["event"] == UNREADABLE and broken["text"].startswith("events.jsonl, line 2: damaged")
    assert broken["time_s"] == first["time_s"]


def test_discarded_lines_begin_on_a_line_of_their_own(tmp_path: Path) -> None:
    for _ in range(2):
        ledger = ledger_of(tmp_path)
        ledger.write({"kind": "step", "step": 1})
        with (tmp_path / "ledger.jsonl").open("ab") as stream:
            stream.write(b'{"kind": "st')
    ledger_of(tmp_path)
    whole, half = '{"kind": "step", "step": 1}', '{"kind": "st'
    assert (tmp_path / "ledger.discarded.jsonl").read_text().splitlines() == [whole, half, whole, half]
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


@pytest.mark.parametrize("harm", ["file deleted", "directory deleted", "another in its place", "longer", "shorter"])
def test_a_run_goes_on_in_no_other_files_than_its_own(tmp_path: Path, harm: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    ledger = ledger_of(run_dir)
    ledger.write({"kind": "step", "step": 1})
    path = run_dir / "ledger.jsonl"
    if harm == "file deleted":
        path.unlink()
    elif harm in ("directory deleted", "another in its place"):
        shutil.rmtree(run_dir)
        if harm == "another in its place":
            run_dir.mkdir()
            path.touch()
    else:
        path.write_bytes(path.read_bytes() * 2 if harm == "longer" else b"")
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(CheckpointError, match="was deleted or changed while the run wrote it"):
        ledger.write({"kind": "step", "step": 2})
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("damage", ["empty", "cut", "a list", "a string for the number", "another number", "NUL"])
def test_a_damaged_perplexity_is_measured_again(tmp_path: Path, damage: str) -> None:
    cache = PerplexityCache(LocalPlace(tmp_path / "cache"), {"weights": "w", "dtype": "fp32"})
    cache.write("a", 12.5)
    cache.write("b", 7.25)
    assert [cache.read(key) for key in "abc"] == [12.5, 7.25, None]
    (path,) = (path for path in (tmp_path / "cache").iterdir() if "12.5" in path.read_text())
    text = path.read_text()
    path.write_text(
        {
            "empty": "",
            "cut": text[: len(text) // 2],
            "a list": f"[{text}]",
            "a string for the number": text.replace("12.5", '"12.5"'),
            "another number": text.replace("12.5", "13.5"),
            "NUL": text.replace("fp32", "f\0\0 2"),
        }[damage]
    )
    assert [cache.read(key) for key in "ab"] == [None, 7.25]
    assert [record["perplexity"] for record in measured_in(tmp_path / "cache")] == [7.25]
    cache.write("a", 12.5)
    assert [cache.read(key) for key in "ab"] == [12.5, 7.25]
