"""Files and directories appear complete or not at all: after an error, a kill, and beside another writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ddk_ds import files
from ddk_ds.errors import UserError
from ddk_ds.files import is_leftover, new_directory, new_file, partial_path, remove_leftovers, write_text


def names(directory: Path) -> list[str]:
    """Return the names of everything in a directory, hidden ones too."""
    return sorted(path.name for path in directory.iterdir())


def killed_while_writing(path: Path, function: str) -> None:
    """Let another process write half of `path` by `function` and be killed."""
    code = (
        "import os, pathlib, sys\n"
        f"from ddk_ds.files import {function}\n"
        f"with {function}(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half' if partial.is_dir() else partial).write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path], timeout=60).returncode == -signal.SIGKILL


def test_a_file_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with new_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(error), new_file(path) as partial:
        partial.write_text("new")
        raise error
    with pytest.raises(FileNotFoundError), new_file(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_kill_leaves_the_old_file_and_a_hidden_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    killed_while_writing(path, "new_file")
    assert path.read_text() == "old"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["file"]


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    with new_directory(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text("new")
        assert not path.exists()
    assert (path / "inner/file").read_text() == "new"
    assert names(path) == ["inner"]
    assert names(path.parent) == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_directory(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "directory"
    with pytest.raises(error), new_directory(path) as partial:
        (partial / "file").write_text("new")
        raise error
    assert names(tmp_path) == []


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    killed_while_writing(path, "new_directory")
    assert not path.exists()
    assert partial_path(path).is_dir()
    with new_directory(path) as partial:
        (partial / "file").write_text("new")
    assert names(path) == ["file"]
    assert names(tmp_path) == ["directory"]


def test_a_directory_with_something_in_it_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    with new_directory(path) as partial:  # an empty one is nobody's
        (partial / "old").write_text("old")
    with pytest.raises(OSError), new_directory(path) as partial:
        (partial / "new").write_text("new")
    assert names(path) == ["old"]
    with new_directory(path, replace=True) as partial:
        (partial / "new").write_text("new")
    assert names(path) == ["new"]
    with pytest.raises(ValueError), new_directory(path, replace=True) as partial:
        raise ValueError
    assert names(path) == ["new"]
    assert names(tmp_path) == ["directory"]


def test_two_writers_of_one_directory_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with new_directory(path) as partial:
        (partial / "file").write_text("first")
        with pytest.raises(UserError, match="is being written by another process"), new_directory(path):
            pass
    assert (path / "file").read_text() == "first"


@pytest.mark.parametrize("writer", [new_file, new_directory])
def test_a_full_disk_is_an_error_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), writer(tmp_path / "new") as partial:
        (partial / "file" if partial.is_dir() else partial).write_text("half")
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    killed_while_writing(path, "new_file")
    killed_while_writing(other, "new_file")
    (of_path,) = tmp_path.glob(".file.*")
    (of_other,) = tmp_path.glob(".other.*")
    mine = tmp_path / ".file.mine"
    mine.touch()
    write_text(path, "new")
    assert is_leftover(of_path) and not is_leftover(mine) and not is_leftover(path), "its process may still write"
    os.utime(of_path, (0, 0))
    write_text(path, "newer")
    assert names(tmp_path) == sorted([".file.mine", "file", of_other.name])
    remove_leftovers(tmp_path, age_s=0.0)
    assert names(tmp_path) == [".file.mine", "file"]


def test_a_kill_between_the_two_renames_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with new_directory(path) as partial:
        (partial / "old").write_text("old")
    path.rename(tmp_path / ".replaced-directory")  # the first of the two, of a process that was killed then
    with new_directory(path, replace=True) as partial:
        (partial / "new").write_text("new")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["directory"]


def test_names_are_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(tmp_path / "file", "new")
    assert [path.name for path in synced] == [synced[0].name, tmp_path.name] and synced[0].name.startswith(".file.")
    synced.clear()
    with new_directory(tmp_path / "directory") as partial:
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text("new")
    assert [path.name for path in synced] == ["file", "inner", "directory", tmp_path.name]


@pytest.mark.parametrize("block", [1, 2, 3, 4, 1 << 20])
def test_a_files_hash_is_of_all_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """XXH64 of "", "a" and "abc" with seed 0, as xxHash's authors publish them."""
    monkeypatch.setattr(files, "_BLOCK_BYTES", block)
    path = tmp_path / "file"
    for content, published in ((b"", "ef46db3751d8e999"), (b"a", "d24ec4f1a98c6e5b"), (b"abc", "44bc2cf5ad770999")):
        path.write_bytes(content)
        assert files.size_and_xxh64(path) == (len(content), published)
