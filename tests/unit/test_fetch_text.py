"""Text from packages: the readers' results, the written files, and the errors; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddk_ds.data.documents import Dropped, read_texts
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.errors import ConfigError, DataError
from tools.bench import fetch_text, packages
from tools.bench.package_text import cjk_lines, read_text, split_documents, strip_html
from tools.bench.packages import Package, PackageStore, parse_package

ROOT = Path(__file__).parents[2]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# The readers


def test_html_gives_what_a_page_shows() -> None:
    page = """<html><head><title>T</title><style>p {}</style></head><body><nav>menu <nav>sub</nav> end</nav>
    <div class="toc note"><div>contents</div></div><p>One &amp;
    two<br/>three<sup>2</sup></p><script>if (a<b) {}</script><pre>x =  1
    y</pre></body></html>"""
    lines = [line.rstrip() for line in strip_html(page).splitlines() if line.strip()]
    assert lines == ["One & two", "three2", "x =  1", "    y"]


def test_an_article_is_all_that_is_taken_of_a_page() -> None:
    assert strip_html("<p>bar</p><main id=m><p>text</p></main><p>foot</p>").split() == ["text"]


def test_indentation_after_a_blank_line_stays(tmp_path: Path) -> None:
    code = "def f():\n    a = 1  \n \n\n\n    return a\n"
    assert read_text(write(tmp_path / "x.py", code), "text") == "def f():\n    a = 1\n\n    return a"


def test_manual_pages_lose_their_macros(tmp_path: Path) -> None:
    page = '.\\" comment\n.TH LS 1\n.SH "NAME"\nls \\- \\fBlist\\fP\n.PP\na \\(aqb\\(aq \\es\n'
    path = write(tmp_path / "ls.1.gz", gzip.compress(page.encode()))
    text = read_text(path, "man")
    assert text is not None
    assert text.split("\n\n") == ["NAME\nls - list", "a 'b' \\s"]


def test_strings_of_an_r_database(tmp_path: Path) -> None:
    def vector(*lines: bytes | None) -> bytes:
        parts = [struct.pack(">ii", 0x8009, -1 if line is None else len(line)) + (line or b"") for line in lines]
        return b"X\n" + bytes(12) + struct.pack(">ii", 16, len(lines)) + b"".join(parts) + b"attributes"

    # a string that holds what looks like another string's head
    objects = [vector(b"It is a truth", b"", None, b"a\x00\x04\x00\x09b"), vector("caf\u00e9".encode())]
    data = b"".join(struct.pack(">i", len(block)) + zlib.compress(block) for block in objects)
    assert read_text(write(tmp_path / "x.rdb", data), "r_data") == "It is a truth\n\na\x00\x04\x00\x09b\n\ncaf\u00e9"


def test_a_bible_of_compressed_blocks(tmp_path: Path) -> None:
    verse = b'<chapter osisID="Gen.1"/><w lemma="x">In</w> the<note>or: a</note> beginning<div type="x-p"/>God'
    data = zlib.compress(b"<milestone/>") + b"\0x\x9c\0" + zlib.compress(verse)
    assert read_text(write(tmp_path / "ot.bzz", data), "sword") == "In the  beginning\n\nGod"


def test_json_in_the_order_of_its_keys(tmp_path: Path) -> None:
    poems: Any = [{"author": "Li", "paragraphs": ["a", "b"], "title": "T", "id": "no"}, {"title": "U", "author": "Wu"}]
    assert read_text(write(tmp_path / "p.json", json.dumps(poems)), "json", ["title", "author", "paragraphs"]) == (
        "T\nLi\na\nb\n\nU\nWu"
    )
    nested: Any = {"Land": {"Area": {"text": "<b>9</b> km", "x": 1}}, "Empty": {"y": "z"}}
    assert read_text(write(tmp_path / "n.json", json.dumps(nested)), "json", ["text"]) == "Land\nArea\n9 km"


def test_proofs_are_dropped(tmp_path: Path) -> None:
    text = "$( Id. $)\nid $p |- ( ph -> ph ) $=\n ( a1i\n ) ABC $.\nax $a |- x $.\n"
    assert read_text(write(tmp_path / "s.mm", text), "metamath") == "$( Id. $)\nid $p |- ( ph -> ph ) $.\nax $a |- x $."


def test_other_encodings_and_damage(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "x.txt", b"caf\xe9"), "text") is None
    with pytest.raises(DataError, match=r"x\.txt\.gz cannot be read"):
        read_text(write(tmp_path / "x.txt.gz", gzip.compress(b"text" * 99)[:20]), "text")
    with pytest.raises(DataError, match=r"x\.json is not JSON"):
        read_text(write(tmp_path / "x.json", "{"), "json")


def test_chinese_lines_are_kept_by_their_share() -> None:
    text = "保护 a b\nProtect 文\n\n文文文aaaaaaaaa\n文文文aaaaaaaaaa"
    assert cjk_lines(text, 0.25) == "保护 a b\n\n文文文aaaaaaaaa"


@pytest.mark.parametrize("text", ["aa\n\nbbb\n\nc", "a" * 35 + "\n\n" + "b\n" * 17, "x" * 101, "\n\n \n\n"])
def test_documents_keep_every_word_within_the_limit(text: str) -> None:
    pieces = list(split_documents(text, 1, 10))
    assert all(0 < len(piece) <= 10 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert list(split_documents(text, 5, 10)) == [piece for piece in pieces if len(piece) >= 5]


# Sampling and the domain's file


def test_a_sample_is_a_part_of_the_whole_in_its_order_and_the_same_each_time() -> None:
    documents = [f"document {i}" for i in range(100)] + ["document 7"]
    kept = fetch_text.sample(documents, 300)
    assert kept == fetch_text.sample(documents, 300)
    assert 250 < sum(map(len, kept)) <= 300
    assert kept == sorted(kept, key=documents.index)
    assert kept != documents[: len(kept)]
    assert fetch_text.sample(documents, float("inf")) == documents[:100]


def spec(**changes: Any) -> dict[str, Any]:
    english = {"packages": ["debian:books"], "files": ["usr/*.txt*"], "exclude": ["*/no.txt"], "licence": "CC0-1.0"}
    web = {"packages": ["pypi:pages==1.0"], "files": ["**/*.html"], "format": "html", "licence": "MIT"}
    domains = {
        "book": {"stands_for": "Books", "max_bytes": 10_000, "sources": [english]},
        "c4": {"stands_for": "C4", "max_bytes": 10_000, "sources": [web]},
    }
    return {"min_chars": 5, "max_chars": 40, "domains": domains} | changes


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, list[str]]:
    """Return a directory with a list and two unpacked packages, and the arguments that use them."""
    books, pages = tmp_path / "packages/debian/books@2:1.0-1", tmp_path / "packages/pypi/pages@1.0"
    write(books / "usr/b.txt", "second book\n" * 9)
    write(books / "usr/a.txt.gz", gzip.compress(b"first book"))
    write(books / "usr/no.txt", "left out, left out")
    (books / "usr/link.txt").symlink_to("/etc/os-release")
    write(pages / "pages/x.html", "<p>a page of text</p>")
    write(tmp_path / "list.yaml", yaml.safe_dump(spec()))
    names = ["--out", "text", "--list", "list.yaml", "--packages", "packages"]
    return tmp_path, [name if name.startswith("-") else str(tmp_path / name) for name in names]


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_domains_are_written_with_their_sources(world: tuple[Path, list[str]]) -> None:
    place, arguments = world
    assert fetch_text.main(arguments) == 0
    book = place / "text/book.jsonl"
    assert documents(book)[:2] == ["first book", "second book\nsecond book\nsecond book"]
    assert documents(place / "text/c4.jsonl") == ["a page of text"]
    entry = json.loads((place / "text/SOURCES.json").read_text())["book"]
    assert entry["sha256"] == hashlib.sha256(book.read_bytes()).hexdigest()
    assert entry["text_bytes"] == sum(map(len, documents(book)))
    assert entry["sources"][0]["packages"] == ["debian:books 2:1.0-1"]
    assert (entry["sources"][0]["licence"], entry["sources"][0]["files"]) == ("CC0-1.0", 2)
    assert sorted(path.name for path in (place / "text").iterdir()) == ["SOURCES.json", "book.jsonl", "c4.jsonl"]


def test_what_is_there_is_not_fetched_again(
    world: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, arguments = world
    assert fetch_text.main([*arguments, "--only", "book"]) == 0
    assert not (place / "text/c4.jsonl").exists()
    shutil.rmtree(place / "packages/debian")
    assert fetch_text.main(arguments) == 0
    # another list, or a file that was changed, is fetched anew: the package is gone, and no client is here
    monkeypatch.setenv("PATH", "")
    (place / "list.yaml").write_text(yaml.safe_dump(spec(max_chars=30)))
    assert fetch_text.main(arguments) == 2
    assert capsys.readouterr().err.startswith("fetch_text: debian:books needs apt-get, which is not installed")
    (place / "list.yaml").write_text(yaml.safe_dump(spec()))
    assert fetch_text.main(arguments) == 0
    write(place / "text/book.jsonl", "{}\n")
    assert fetch_text.main(arguments) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_chars": "8"}, "max_chars: Input should be a valid integer"),
        ({"domians": {}}, "domians: Extra inputs are not permitted"),
        ({"domains": {"a": {"stands_for": "A", "max_bytes": 1, "sources": []}}}, "domains.a.sources"),
    ],
)
def test_a_wrong_list_is_one_line(
    world: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    place, arguments = world
    (place / "list.yaml").write_text(yaml.safe_dump(spec(**change)))
    assert fetch_text.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_package_without_the_files_is_named(
    world: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    place, arguments = world
    (place / "packages/pypi/pages@1.0/pages/x.html").unlink()
    assert fetch_text.main(arguments) == 2
    assert "pypi:pages==1.0 1.0 has no file **/*.html" in capsys.readouterr().err
    assert not (place / "text/c4.jsonl").exists()
    assert fetch_text.main([*arguments, "--only", "c5"]) == 2
    assert "--only c5" in capsys.readouterr().err


# Packages


def test_packages_are_written_in_one_way() -> None:
    assert parse_package("pypi:a-b==1.0") == Package("pypi", "a-b", "1.0")
    assert parse_package("npm:x@2.0.1") == Package("npm", "x", "2.0.1")
    for text in ("debian:golang-1.19-src", "pypi:a==1", "npm:a@1"):
        assert str(parse_package(text)) == text
    for wrong in ("golang", "pypi:a", "npm:a", "debian:", "debian:-o", "debian:../a", "rpm:a", "pypi:a==../x"):
        with pytest.raises(ConfigError, match="write it as"):
            parse_package(wrong)


class Clients:
    """A replacement of the registries' clients that writes an archive or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "") -> None:
        self.commands: list[list[str]] = []
        self.error = error
        monkeypatch.setattr(packages.subprocess, "run", self.run)
        monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")

    def run(self, command: list[str], *, cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        if "pip" in command:
            with zipfile.ZipFile(cwd / "p-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("p/data.txt", "text")
        elif command[0] == "apt-get":
            (cwd / "q_1%3a2.0-1_all.deb").write_bytes(b"")
        elif command[0] == "dpkg":
            (cwd / command[2]).read_bytes()
            write(cwd / command[3] / "usr/q.txt", "text")
        return subprocess.CompletedProcess(command, 0, "", "")


def test_a_package_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clients, store = Clients(monkeypatch), PackageStore(Path("packages"))
    for _ in range(2):
        assert (store.get(parse_package("pypi:p==1.0")).root / "p/data.txt").read_text() == "text"
        unpacked = store.get(parse_package("debian:q"))
        assert (unpacked.version, (unpacked.root / "usr/q.txt").read_text()) == ("1:2.0-1", "text")
    pip, apt, dpkg = clients.commands
    assert pip[-1] == "p==1.0" and "--no-deps" in pip
    assert apt == ["apt-get", "--quiet", "download", "q"] and dpkg[:2] == ["dpkg", "-x"]
    assert sorted(path.name for path in tmp_path.rglob("*@*")) == ["p@1.0", "q@1:2.0-1"]


def test_a_package_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, store = Clients(monkeypatch, "W: slow\nE: Unable to locate package q\n"), PackageStore(tmp_path)
    with pytest.raises(DataError, match="debian:q cannot be fetched: E: Unable to locate package q; apt-get update"):
        store.get(parse_package("debian:q"))
    clients.error = ""
    with pytest.raises(DataError, match="npm:r@1: its client left 0 archives"):
        store.get(parse_package("npm:r@1"))
    assert [path.name for kind in tmp_path.iterdir() for path in kind.iterdir()] == []


# What is shipped


def test_the_shipped_list_has_the_recipes_domains(tmp_path: Path) -> None:
    listed = fetch_text.load_list(fetch_text.LIST)
    assert len(listed.domains) == 10
    for domain in listed.domains.values():
        assert all(map(parse_package, (package for source in domain.sources for package in source.packages)))
    for name in listed.domains:
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": f"text of {name}"}) + "\n")
    recipe = load_recipe(ROOT / "configs/data/ten_domains.yaml", [f"root={tmp_path}"])
    files = list_files(recipe)
    assert set(files) == set(listed.domains)
    for name, (file,) in files.items():
        assert list(read_texts(file, Dropped())) == [f"text of {name}"]
