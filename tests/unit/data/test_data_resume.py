"""An interrupted preparation continues without repeating finished parts, and ends as an uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.data import prepare as prepare_module
from ddk_ds.data import reading as reading_module
from ddk_ds.data.encoding import TextEncoder
from ddk_ds.data.long_documents import Part
from ddk_ds.data.prepare import prepare
from ddk_ds.data.reading import Spool
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.workdir import WorkDir, open_work
from ddk_ds.errors import DataError
from tests.unit.data.corpus import PLAN, make_texts, write_recipe
from tests.unit.data.test_data_prepare import files_of, write_lines

BATCH_BYTES = 500  # about three documents
ROOT = Path(__file__).parents[3]
KILLED = """
import os, signal, sys, time
from pathlib import Path
from ddk_ds.data import reading
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.workdir import WorkDir

recipe, tokenizer, out, workers, commits = sys.argv[1:]
reading.BATCH_BYTES, reading.PART_SECONDS = 500, 0.0
commit, done = WorkDir.commit, []

def counted(*arguments):
    commit(*arguments)
    done.append(None)
    if len(done) == int(commits):
        print("committed", flush=True)
        time.sleep(60)

WorkDir.commit = counted
prepare(load_recipe(Path(recipe)), Path(tokenizer), Path(out), Plan(32, validation_samples=7, workers=int(workers)))
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finish a part after every batch."""
    monkeypatch.setattr(reading_module, "BATCH_BYTES", BATCH_BYTES)
    monkeypatch.setattr(reading_module, "PART_SECONDS", 0.0)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the list of all texts that are encoded in this process."""
    texts: list[str] = []
    encode = TextEncoder.__call__

    def counted(self: TextEncoder, batch: list[Part]) -> Any:
        texts.extend(part.text for part in batch)
        return encode(self, batch)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    yield texts


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("workers", "commits"),
    [(2, 45), pytest.param(1, 30, marks=pytest.mark.long("an interpreter; two workers have all parts of one"))],
)
def test_a_killed_preparation_continues_and_leaves_no_process(
    recipe_path: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    prepared: Path,
    encoded: list[str],
    workers: int,
    commits: int,
) -> None:
    arguments = [str(recipe_path), str(tokenizer_dir), str(tmp_path / "out"), str(workers), str(commits)]
    command = [sys.executable, "-c", KILLED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "committed\n"
        children = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
    assert len(children) >= (2 if workers == 2 else 0)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive a killed preparation"
        time.sleep(0.05)
    finished = 0
    with open_work(tmp_path / ".out.partial") as work:
        finished = sum(work.reading(name).documents for name in ("small", "tree", "large"))
    assert finished >= commits
    prepare(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN)
    assert len(encoded) == 340 - finished
    assert files_of(tmp_path / "out") == files_of(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("place", "count"),
    [
        *((place, count) for place in ("append", "keep", "commit") for count in (1, 30)),
        *(("write_split", count) for count in (1, 5)),
        *(("finish", count) for count in (1, 3)),
        ("write_manifest", 1),
    ],
)
def test_an_error_anywhere_costs_only_unfinished_parts(
    recipe_path: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoded: list[str],
    place: str,
    count: int,
) -> None:
    owner: Any = {"append": Spool, "keep": WorkDir, "commit": WorkDir, "finish": WorkDir}.get(place, prepare_module)
    original, calls = getattr(owner, place), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    recipe = load_recipe(recipe_path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    assert files_of(tmp_path / "out") == files_of(prepared)
    again = len(encoded) - len(set(encoded))
    assert again <= (4 if place in ("append", "keep", "commit") else 0)


def interrupted(recipe: Path, tokenizer_dir: Path, out: Path, commits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a preparation that is interrupted after `commits` parts."""
    commit, calls = WorkDir.commit, []

    def failing(*arguments: Any) -> None:
        commit(*arguments)
        calls.append(None)
        if len(calls) == commits:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, "commit", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(load_recipe(recipe), tokenizer_dir, out, PLAN)


@pytest.fixture
def two_domains(tmp_path: Path) -> Path:
    """Write a recipe with the domains `a` (two files of 80 documents each) and `b` (one of 60)."""
    for seed, name, count in ((5, "a0", 80), (6, "a1", 80), (7, "b", 60)):
        write_lines(tmp_path / f"{name}.jsonl", make_texts(seed, count))
    return write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a*.jsonl"]}, "b": {"sources": ["b*.jsonl"]}})


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("commits", "change", "message"),
    [
        (
            35,
            lambda root: write_lines(root / "a0.jsonl", ["other"]),
            "domain 'a', file 'a0.jsonl' was read and is chan",
        ),
        (35, lambda root: (root / "a0.jsonl").unlink(), "domain 'a', file 'a0.jsonl' was read and is changed, gone"),
        (3, lambda root: write_lines(root / "a-first.jsonl", ["x"]), "file 'a0.jsonl' was read and is .*not in turn"),
        (80, lambda root: write_lines(root / "a2.jsonl", ["x"]), "domain 'a' has a new file 'a2.jsonl'"),
        (3, lambda root: edit(root / "r.yaml", "  a:", "  a:\n    min_chars: 9"), "domain 'a' had .*min_chars"),
        (3, lambda root: edit(root / "r.yaml", "  a:", "  c:"), "domain number 1 was 'a'"),
    ],
)
def test_changed_files_and_limits_are_named(
    two_domains: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commits: int,
    change: Any,
    message: str,
) -> None:
    interrupted(two_domains, tokenizer_dir, tmp_path / "out", commits, monkeypatch)
    change(tmp_path)
    with pytest.raises(DataError, match=rf"\.out\.partial holds .*{message}.*--start-anew"):
        prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN, start_anew=True)


def test_another_plan_is_refused_and_named(
    two_domains: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(two_domains, tokenizer_dir, tmp_path / "out", 3, monkeypatch)
    with pytest.raises(DataError, match="seed was 0, now 1"):
        prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", replace(PLAN, seed=1))
    prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", replace(PLAN, workers=2))


def test_a_damaged_file_is_named_and_earlier_parts_are_kept(
    two_domains: Path, tokenizer_dir: Path, tmp_path: Path, encoded: list[str]
) -> None:
    with (tmp_path / "b1.jsonl").open("w") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match=r"b1\.jsonl, line 1 is not JSON"):
        prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    write_lines(tmp_path / "b1.jsonl", make_texts(8, 20))
    prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    assert len(encoded) == len(set(encoded)) == 240


def test_duplicates_of_an_earlier_run_are_found(
    two_domains: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "b.jsonl", make_texts(7, 60) + make_texts(5, 30) + make_texts(7, 9))
    interrupted(two_domains, tokenizer_dir, tmp_path / "out", 60, monkeypatch)
    manifest = prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    assert manifest.domains["b"].dropped.duplicates == 39
    assert manifest.domains["b"].train.documents + manifest.domains["b"].validation.documents == 60


def test_one_preparation_at_a_time(two_domains: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    with open_work(tmp_path / ".out.partial"), pytest.raises(DataError, match="is in use: another preparation"):
        prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)


def test_a_damaged_state_is_named(two_domains: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/state.sqlite").write_text("no database " * 100, encoding="utf-8")
    with pytest.raises(DataError, match=r"state\.sqlite cannot be used .*--start-anew"):
        prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN, start_anew=True)


@pytest.mark.parametrize("place", ["append", "sync"])
def test_a_full_disk_is_named_and_finished_parts_are_kept(
    two_domains: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoded: list[str],
    place: str,
) -> None:
    original, calls = getattr(Spool, place), []

    def failing(*arguments: Any) -> None:
        calls.append(None)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, place, failing)
        with pytest.raises(DataError, match=r"disk that holds .*\.out\.partial is full .*finished parts are kept"):
            prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    prepare(load_recipe(two_domains), tokenizer_dir, tmp_path / "out", PLAN)
    assert len(encoded) - len(set(encoded)) <= 4


@pytest.mark.parametrize("kib", [20, 60, 110])
def test_a_preparation_continues_after_a_full_file_system(
    two_domains: Path, tokenizer_dir: Path, tmp_path: Path, kib: int
) -> None:
    """A tmpfs that is full at the state, the ids or the shards, and then is made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        with pytest.raises(DataError, match="is full"):
            prepare(load_recipe(two_domains), tokenizer_dir, disk / "out", PLAN)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        manifest = prepare(load_recipe(two_domains), tokenizer_dir, disk / "out", PLAN)
        assert json.loads((disk / "out/domains.json").read_text())["domains"].keys() == {"a", "b"}
        assert manifest.domains["a"].train.samples > 10
    finally:
        subprocess.run(["umount", str(disk)], check=True)
