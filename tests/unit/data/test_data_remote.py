"""Text on object stores and web servers: globs, lists, one file at a time on the disk, errors."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ddk_ds.data import reading as reading_module
from ddk_ds.data.documents import Dropped, read_texts
from ddk_ds.data.prepare import prepare
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.data.remote import downloaded, glob_pattern
from ddk_ds.errors import DataError
from tests.unit.data.corpus import PLAN, make_texts, write_recipe
from tests.unit.data.test_data_prepare import files_of


def lines(seed: int, count: int) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in make_texts(seed, count)).encode()


FILES = {
    "a/0.jsonl": lines(0, 60),
    "a/deep/er/1.jsonl.gz": gzip.compress(lines(1, 20), mtime=0),
    "a/notes.md": b"not of the corpus",
    "b/x+y [1].jsonl": lines(2, 60),
}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Write FILES to the disk and return their directory."""
    for name, data in FILES.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "local"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put FILES into a bucket below corpus/ and yield the address."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="text")
        for name, data in FILES.items():
            client.put_object(Bucket="text", Key=f"corpus/{name}", Body=data)
        yield "s3://text/corpus"
    finally:
        server.stop()


@pytest.fixture
def web(local: Path) -> Iterator[str]:
    """Serve FILES on a web server and yield its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(local)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


DOMAINS = {"a": {"sources": ["a/**/*.jsonl*"]}, "b": {"sources": ["b/*"]}}


def test_a_root_on_s3_gives_the_same_data_as_the_files(
    s3: str, local: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "PART_SECONDS", 0.0)
    recipe = write_recipe(tmp_path / "r.yaml", DOMAINS)
    there = load_recipe(recipe, [f"root={s3}"])
    found = list_files(there)["a"]
    assert [(file.where, file.name) for file in found] == [
        (f"{s3}/a/0.jsonl", "a/0.jsonl"),
        (f"{s3}/a/deep/er/1.jsonl.gz", "a/deep/er/1.jsonl.gz"),
    ]
    assert [file.num_bytes for file in found] == [len(FILES[file.name]) for file in found]
    on_disk: set[int] = set()

    def look(*_progress: Any) -> None:
        on_disk.add(len([path for path in tmp_path.rglob("download-*/*") if path.is_file()]))

    prepare(there, tokenizer_dir, tmp_path / "there", PLAN, progress=look)
    prepare(load_recipe(recipe, [f"root={local}"]), tokenizer_dir, tmp_path / "here", PLAN)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    assert on_disk <= {0, 1}


def test_a_list_of_addresses(web: str, tokenizer_dir: Path, tmp_path: Path, local: Path) -> None:
    (tmp_path / "urls.txt").write_text(f"# of a\n{web}/a/0.jsonl\n\nlocal/a/deep/**/*.gz\n", encoding="utf-8")
    domains = {"a": {"sources": ["list:urls.txt"]}, "b": {"sources": [f"{web}/b/x%2By%20%5B1%5D.jsonl"]}}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", domains))
    manifest = prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    here = load_recipe(write_recipe(tmp_path / "here.yaml", DOMAINS), [f"root={local}"])
    assert manifest.domains == prepare(here, tokenizer_dir, tmp_path / "here", PLAN).domains


def test_missing_and_denied_files_are_named(s3: str, web: str, tmp_path: Path) -> None:
    def texts(path: str) -> list[str]:
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {"a": {"sources": [path]}}))
        return [text for file in list_files(recipe)["a"] for text in read_texts(file, Dropped())]

    for path, message in (
        (f"{s3}/a/none.jsonl", f"source '{s3}/a/none.jsonl' matches no file"),
        ("s3://nowhere/x/*.jsonl", r"s3://nowhere/x/\*\.jsonl cannot be listed: .*NoSuchBucket"),
        (f"{web}/none.jsonl", f"{web}/none.jsonl cannot be downloaded: HTTP Error 404"),
        ("gs://bucket/*.jsonl", r"gs://bucket/\*\.jsonl: globs are for files and s3:// only; .*list:FILE"),
        ("what://x/y.jsonl", r"what://x/y\.jsonl: ValueError: Unsupported remote path"),
        ("list:none.txt", r"the list .*none\.txt cannot be read"),
        (f"{web}/a/notes.md.gz", "cannot be downloaded"),
    ):
        with pytest.raises(DataError, match=message):
            texts(path)


def test_a_damaged_remote_file_is_named_by_its_address(web: str, local: Path, tmp_path: Path) -> None:
    (local / "a/bad.jsonl.gz").write_bytes(FILES["a/deep/er/1.jsonl.gz"][:-9])
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {"a": {"sources": [f"{web}/a/bad.jsonl.gz"]}}))
    with pytest.raises(DataError, match=f"{web}/a/bad.jsonl.gz cannot be read"):
        list(read_texts(list_files(recipe)["a"][0], Dropped()))


def test_a_download_is_deleted_after_it_is_read(web: str, tmp_path: Path) -> None:
    with downloaded(f"{web}/a/0.jsonl", tmp_path / "scratch") as path:
        assert path.read_bytes() == FILES["a/0.jsonl"]
        assert path.suffix == ".jsonl"
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("a/*.txt", ["a/x.txt", "a/xx.txt"]),
        ("a/**/*.txt", ["a/x.txt", "a/b/x.txt", "a/b/c/x.txt", "a/xx.txt"]),
        ("a/?.t[wx]t", ["a/x.txt"]),
        ("a/[!y].txt", ["a/x.txt"]),
        ("*/b/*", ["a/b/x.txt"]),
        ("a+(1)/x.txt", ["a+(1)/x.txt"]),
    ],
)
def test_globs_match_as_pathlib_does(tmp_path: Path, glob: str, names: list[str]) -> None:
    every = ["a/x.txt", "a/b/x.txt", "a/b/c/x.txt", "a/xx.txt", "a/y.md", "a+(1)/x.txt"]
    assert [name for name in every if re.fullmatch(glob_pattern(glob), name)] == names
    for name in every:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(glob) if path.is_file())
    assert files == sorted(names)
