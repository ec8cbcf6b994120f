"""Samples of WebDataset's tars: as webdataset groups them, and never fewer than were written."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.data.documents import Dropped, read_texts
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.errors import DataError
from tests.unit.data.corpus import make_texts, write_recipe


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def read(folder: Path, dropped: Dropped | None = None, skip: int = 0, **source: Any) -> list[str]:
    domain = {"sources": [{"path": "*.tar*", **source}], "skip_bad_lines": skip}
    recipe = load_recipe(write_recipe(folder / "r.yaml", {"a": domain}))
    return [text for file in list_files(recipe)["a"] for text in read_texts(file, dropped or Dropped())]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_each_sample_gives_its_member_or_a_field_of_its_json(tmp_path: Path, name: str) -> None:
    texts = make_texts(1, 30)
    members = [("__meta__/shard.json", b"{}")]
    for number, text in enumerate(texts):
        image = (f"dir.v1/{number}.jpg", bytes(999))
        fields = (f"dir.v1/{number}.json", json.dumps({"text": text.upper()}).encode())
        members += [image, (f"dir.v1/{number}.en.txt", b"no"), (f"dir.v1/{number}.txt", text.encode()), fields]
    write_tar(tmp_path / name, members)
    assert read(tmp_path, text_field="txt") == texts
    assert read(tmp_path, text_field="en.txt") == ["no"] * 30
    assert read(tmp_path, text_field="json.text") == [text.upper() for text in texts]
    with pytest.raises(DataError, match=r"sample 'dir.v1/0' has no member 'text' \(it has jpg, en.txt, txt, json\)"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"sample 'dir.v1/0' has no text in field 'body' \(it has the fields text\)"):
        read(tmp_path, text_field="json.body")


def test_samples_without_text_are_skipped_when_allowed_and_counted(tmp_path: Path) -> None:
    members = [("a.txt", b"one"), ("b.jpg", b""), ("c.txt", b"\xff"), ("d.txt", b"two"), ("e.json", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    dropped = Dropped()
    assert read(tmp_path, dropped, skip=2, text_field="txt") == ["one", "two"]
    assert (dropped.bad_lines, dropped.undecodable) == (2, 1)
    with pytest.raises(DataError, match=r"sample 'e' has no member 'txt'.*skip_bad_lines of the domain is 1"):
        read(tmp_path, skip=1, text_field="txt")
    write_tar(tmp_path / "a.tar", [("a.txt", b"one"), ("a.txt", b"two")])
    with pytest.raises(DataError, match="sample 'a' has 'txt' twice"):
        read(tmp_path, text_field="txt")


def test_a_tar_that_is_damaged_anywhere_is_no_shorter_tar(tmp_path: Path) -> None:
    """Python's tarfile ends in silence at a cut between members and at a damaged header."""
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{number}.txt", b"x" * 700) for number in range(9)])
    whole = path.read_bytes()
    assert len(read(tmp_path, text_field="txt")) == 9
    member = 512 + 1024
    damaged = whole[: 4 * member] + b"\xff" * 512 + whole[4 * member + 512 :]
    faults = {whole[: 4 * member + more]: "before the mark of a tar's end" for more in (0, 100)}
    faults |= {whole[: 4 * member + 600]: "unexpected end of data", b"": "before the mark of a tar's end"}
    for data, fault in {**faults, damaged: "header is damaged", whole + whole: "goes on behind the mark"}.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.tar cannot be read: .*{fault}"):
            read(tmp_path, text_field="txt")
