"""The directory of a teacher's cache: full, not writable, not readable, and written by two processes at once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddk_ds.data.teacher_cache import TeacherCache, make_cache
from ddk_ds.data.teacher_place import PARTS, LocalPlace, check_room
from ddk_ds.errors import CheckpointError, ConfigError, DataError
from tests.unit.data.test_teacher_cache import CONDITIONS, SHAS, VOCAB, equal, filled, opened, said
from tests.unit.mounts import tmpfs

NOBODY = 65_534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that other users of this machine can enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@contextmanager
def without_rights() -> Iterator[None]:
    """Let this process be a user whom the modes of files bind."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def only_read(path: Path) -> TeacherCache:
    return TeacherCache(LocalPlace(path), CONDITIONS, SHAS, VOCAB)


def test_a_full_disk_is_named_and_nothing_half_counts(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=256k") as small:
        cache = opened(small / "cache")
        cache.add("code", 0, said(0))
        cache.publish()
        filler = small / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small).free - 16_384))
        for number in range(200):
            cache.add("web", number, said(number))
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device; make room, then start"):
            cache.publish()
        assert len(list((small / "cache" / PARTS).iterdir())) == 1
        again = opened(small / "cache")
        assert again.known("code").tolist() == [0] and len(again.known("web")) == 0
        filler.unlink()
        cache.publish()
        again.refresh()
        assert all(equal(again.read("web", number), said(number)) for number in range(200))


def test_a_read_only_file_system_is_read_and_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        filled(disk / "cache")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert equal(only_read(disk / "cache").read("web", 3), said(0))
        with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
            opened(disk / "cache")


def test_a_directory_of_another_user(shared: Path) -> None:
    part = filled(shared / "cache")
    for path in (shared / "cache", part.parent, part):
        path.chmod(0o555)
    with without_rights():
        assert equal(only_read(shared / "cache").read("web", 3), said(0))
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            opened(shared / "cache")
    (part / "shard.00000.mds").chmod(0)
    with without_rights(), pytest.raises(DataError, match=f"{part} cannot be read: Permission denied") as error:
        only_read(shared / "cache").read("web", 3)
    assert "delete" not in str(error.value)
    for path in (shared / "cache", part.parent, part):
        path.chmod(0o755)


def test_a_cache_that_another_process_begins_meanwhile_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins between this one's two looks, with the same conditions and with others."""
    is_empty = LocalPlace.is_empty
    for name, changes in (("same", {}), ("other", {"teacher": "def"})):
        place = LocalPlace(tmp_path / name)

        def late(self: LocalPlace, changes: dict[str, str] = changes) -> bool:
            monkeypatch.setattr(LocalPlace, "is_empty", is_empty)
            make_cache(self, {**CONDITIONS, **changes})
            return self.is_empty()

        monkeypatch.setattr(LocalPlace, "is_empty", late)
        if changes:
            with pytest.raises(ConfigError, match="computed with teacher 'def', the run has 'abc'"):
                make_cache(place, CONDITIONS)
        else:
            make_cache(place, CONDITIONS)


def write_many(path: Path, writer: int, meet: multiprocessing.synchronize.Barrier) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddk_ds.data.teacher_cache.PART_BYTES", 2000)
        meet.wait()
        cache = opened(path)
        for number in range(40 * writer, 40 * writer + 80):  # 40 that the other one writes too
            cache.add("web", number, said(number))
            if number % 10 == 0:
                cache.refresh()
        cache.publish()


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    meet = fork.Barrier(2)
    writers = [fork.Process(target=write_many, args=(tmp_path / "cache", number, meet)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    cache = opened(tmp_path / "cache")
    assert cache.known("web").tolist() == list(range(120)), "nothing lost, nothing twice"
    assert all(equal(cache.read("web", number), said(number)) for number in range(120))
    assert len(list((tmp_path / "cache" / PARTS).iterdir())) > 10


def test_samples_that_may_not_fit_are_refused_before_they_are_computed(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=256k") as small:
        check_room(LocalPlace(small / "cache"), 200_000.0)
        with pytest.raises(ConfigError, match=r"has 0\.000262 GB free, and the samples to compute take up to 1 GB"):
            check_room(LocalPlace(small / "cache"), 1e9)
