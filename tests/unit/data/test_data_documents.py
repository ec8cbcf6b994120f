"""Readers of every format, limits, duplicates, and damaged or undecodable input."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from ddk_ds.data import columns, documents, zstd_frames
from ddk_ds.data.documents import Document, Dropped, Meter, Position, read_documents, read_texts
from ddk_ds.data.recipe import Domain, Source, SourceFile, list_files, load_recipe
from ddk_ds.errors import DataError

TEXTS = ["one two three", "Zwei Wörter,\n新しい行", "three\n\nlines"]
LINES = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()


def file_of(path: Path, data: bytes, **options: object) -> SourceFile:
    path.write_bytes(data)
    return SourceFile(path, path.name, Source.model_validate({"path": path.name, **options}))


def documents_of(
    files: list[SourceFile], *, seed: int = 0, seen: set[bytes] | None = None, **limits: int
) -> tuple[list[Document], Dropped]:
    domain = Domain.model_validate({"sources": ["x"], **limits})
    dropped = Dropped()
    seen = set() if seen is None else seen
    found: list[Document] = list(read_documents(domain, files, seed=seed, seen=seen, dropped=dropped))
    return found, dropped


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("frames.jsonl.zst", zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])),
        ("skippable.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(LINES)),
        ("members.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
        ("blank.jsonl", LINES.replace(b"\n", b"\n\n")),
        ("A.JSONL", b"\xef\xbb\xbf" + LINES.rstrip()),
    ],
)
def test_json_lines(tmp_path: Path, name: str, data: bytes) -> None:
    assert list(read_texts(file_of(tmp_path / name, data), Dropped())) == TEXTS


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", TEXTS[1].encode()),
        ("a.py", b"\xef\xbb\xbf" + TEXTS[1].encode()),
        ("a.txt.gz", gzip.compress(TEXTS[1].encode())),
        ("a.md.zst", zstandard.compress(TEXTS[1].encode())),
    ],
)
def test_text_files_are_one_document(tmp_path: Path, name: str, data: bytes) -> None:
    assert list(read_texts(file_of(tmp_path / name, data), Dropped())) == [TEXTS[1]]


def test_large_zst_file_with_a_long_window(tmp_path: Path) -> None:
    text = random.Random(0).randbytes(300_000).hex()
    parameters = zstandard.ZstdCompressionParameters(window_log=28)  # above the decompressor's default of 27
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: no smaller one
    data = stream.compress(json.dumps({"text": text}).encode()) + stream.flush()
    assert list(read_texts(file_of(tmp_path / "a.jsonl.zst", data), Dropped())) == [text]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_column(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array([TEXTS[0], None, *TEXTS[1:]], kind)
    parquet.write_table(pyarrow.table({"body": column, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    file = SourceFile(tmp_path / "a.parquet", "a.parquet", Source(path="a.parquet", text_field="body"))
    assert list(read_texts(file, Dropped())) == TEXTS


@pytest.mark.parametrize(("field", "message"), [("text", "set text_field to one of body, n"), ("n", "int64, no text")])
def test_parquet_wrong_column(tmp_path: Path, field: str, message: str) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    file = SourceFile(tmp_path / "a.parquet", "a.parquet", Source(path="a.parquet", text_field=field))
    with pytest.raises(DataError, match=message):
        list(read_texts(file, Dropped()))


def test_json_strings_at_any_depth_without_html(tmp_path: Path) -> None:
    service = {
        "documentation": "<p>Makes a <code>thing</code> &amp; waits.</p><p>Then <b>stops</b>.</p>",
        "shapes": [{"A": {"documentation": "a &lt; b"}}, {"documentation": {"documentation": "deep"}}],
        "name": "not this",
    }
    data = gzip.compress(json.dumps(service).encode())
    file = file_of(tmp_path / "a.json.gz", data, format="json_strings", text_field="documentation", strip_html=True)
    assert list(read_texts(file, Dropped())) == ["Makes a thing & waits.\nThen stops.", "a < b", "deep"]


def test_plain_json_files_are_text(tmp_path: Path) -> None:
    assert list(read_texts(file_of(tmp_path / "a.json", b'{"k": 1}'), Dropped())) == ['{"k": 1}']


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", LINES + b"{broken\n", r"a\.jsonl, line 4 is not JSON"),
        (
            "a.jsonl",
            LINES + b'{"id": ' + b"7" * 5000 + b', "text": "x"}',
            r"a\.jsonl, line 4 is not JSON \(Exceeds the",
        ),
        ("a.jsonl", LINES + b"[" * 200_000, r"a\.jsonl, line 4 is not JSON \(maximum recursion depth"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', r"line 1 has no text in field 'text' .*content, id"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 has no text in field 'text'"),
        ("a.jsonl", b"[1]\n", r"line 1 .*is not an object"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", LINES, r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-3], r"a\.jsonl\.zst cannot be read: it ends inside"),
        ("a.txt.zst", zstandard.compress(LINES) * 2 + b"\x28", r"a\.txt\.zst cannot be read: it ends inside"),
        ("a.parquet", LINES, r"a\.parquet cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_texts(file_of(tmp_path / name, data), Dropped()))


BAD = [b'{"id": ' + b"7" * 5000 + b', "text": "x"}\n', b"[" * 200_000 + b"\n", b"{broken\n", b'{"text": 3}\n', b"[1]\n"]


def test_bad_lines_are_skipped_up_to_the_number_that_is_allowed(tmp_path: Path) -> None:
    lines = LINES.splitlines(keepends=True)
    files = [
        file_of(tmp_path / "0.jsonl", b"".join((BAD[0], lines[0], BAD[1], BAD[2], lines[1]))),
        file_of(tmp_path / "1.jsonl", b"".join((lines[2], BAD[3], BAD[4]))),
    ]
    found, dropped = documents_of([replace(file, skip_bad_lines=5) for file in files])
    assert [document.text for document in found] == TEXTS
    assert dropped == Dropped(bad_lines=5)
    with pytest.raises(DataError, match=r"1\.jsonl, line 3 .*not an object.*skip_bad_lines of the domain is 4"):
        documents_of([replace(file, skip_bad_lines=4) for file in files])
    for texts, left in ((1, 2), (2, 1)):  # a continued reading counts a line once
        position, dropped = Position(0, texts, 0), Dropped(bad_lines=1 if texts == 1 else 3)
        limited = [replace(file, skip_bad_lines=5) for file in files]
        rest = list(
            read_documents(
                Domain.model_validate({"sources": ["x"]}),
                limited,
                seed=0,
                seen=set(),
                dropped=dropped,
                position=position,
            )
        )
        assert len(rest) == left and dropped.bad_lines == 5


def test_a_recipe_allows_bad_lines(tmp_path: Path) -> None:
    file_of(tmp_path / "a.jsonl", LINES)
    (tmp_path / "r.yaml").write_text("domains: {a: {sources: [a.jsonl], skip_bad_lines: 7}}", encoding="utf-8")
    assert [file.skip_bad_lines for file in list_files(load_recipe(tmp_path / "r.yaml"))["a"]] == [7]


def test_deep_json_strings_are_found_or_refused(tmp_path: Path) -> None:
    for depth in (500, 200_000):
        data = b'{"a":' * depth + b'{"text": "x", "b": [{"text": "y"}]}' + b"}" * depth
        file = file_of(tmp_path / f"{depth}.json", data, format="json_strings")
        if depth == 500:
            assert list(read_texts(file, Dropped())) == ["x", "y"]
        else:
            with pytest.raises(DataError, match=r"200000\.json is not JSON \(maximum recursion depth"):
                list(read_texts(file, Dropped()))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json", "a.parquet"])
def test_a_document_that_memory_would_not_hold_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    lines = json.dumps({"text": "x" * 900}) + "\n" + json.dumps({"text": "y" * 1001}) + "\n"
    data = {"a.txt": b"x" * 1001, "a.txt.gz": gzip.compress(b"x" * 1001), "a.json": b'["' + b"x" * 999 + b'"]'}
    file = file_of(
        tmp_path / name, data.get(name, lines.encode()), **({"format": "json_strings"} if name == "a.json" else {})
    )
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": ["x" * 1000, "y" * 1001]}), file.path)
    where = {"a.jsonl": r"a\.jsonl, line 2", "a.parquet": r"a\.parquet: a row of 'text'"}.get(name, re.escape(name))
    with pytest.raises(DataError, match=f"{where} has more than 1,000 bytes"):
        list(read_texts(file, Dropped()))


def test_a_zst_file_that_grows_30_000_times_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zstandard gives all that one read holds at once: here 27 kB of the disk are 900 MB."""
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    zeros = zstandard.compress(bytes(300_000_000))
    file = file_of(tmp_path / "a.txt.zst", 3 * zeros)
    sizes: list[int] = []
    decompress = zstd_frames._decompress

    def noted(stream: Any) -> Iterator[bytes]:
        for chunk in decompress(stream):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(zstd_frames, "_decompress", noted)
    with pytest.raises(DataError, match=r"a\.txt\.zst has more than 1,000 bytes"):
        list(read_texts(file, Dropped()))
    assert len(sizes) == 1 and sizes[0] < 140_000_000


def test_large_rows_of_parquet_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number}{'x' * 5000}" for number in range(40)]
    table = pyarrow.table({"other": [{"a": 1, "b": 2}] * 40, "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    sizes: list[int] = []
    iterate = parquet.ParquetFile.iter_batches

    def noted(self: parquet.ParquetFile, *, batch_size: int, columns: list[str]) -> Any:
        sizes.append(batch_size)
        return iterate(self, batch_size=batch_size, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    file = SourceFile(tmp_path / "a.parquet", "a.parquet", Source(path="a.parquet"))
    assert list(read_texts(file, Dropped())) == texts
    monkeypatch.setattr(columns, "_PARQUET_BYTES", 11_000)
    assert list(read_texts(file, Dropped())) == texts
    assert sizes == [128, 2]


def test_undecodable_text_is_skipped_and_counted(tmp_path: Path) -> None:
    files = [
        file_of(tmp_path / "latin.txt", "né".encode("latin-1")),
        file_of(tmp_path / "a.jsonl", b'{"text": "\xff"}\n' + rb'{"text": "half \ud83d pair"}' + b"\n" + LINES),
    ]
    found, dropped = documents_of(files)
    assert [document.text for document in found] == TEXTS
    assert dropped == Dropped(undecodable=3)


def test_exact_duplicates_are_dropped_here_and_in_later_domains(tmp_path: Path) -> None:
    first = file_of(tmp_path / "a.jsonl", LINES + LINES[: LINES.index(b"\n") + 1])
    seen: set[bytes] = set()
    found, dropped = documents_of([first], seen=seen)
    assert [document.text for document in found] == TEXTS
    assert dropped.duplicates == 1
    again, dropped = documents_of([file_of(tmp_path / "b.txt", TEXTS[2].encode())], seen=seen)
    assert again == []
    assert dropped.duplicates == 1


def test_short_documents_are_dropped_and_long_ones_cut(tmp_path: Path) -> None:
    texts = ["x", "  \n ", "a" * 30, "b" * 10, "c" * 10, "ä" * 10]
    file = file_of(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    found, dropped = documents_of([file], min_chars=3, max_chars=20, max_bytes=40)
    assert [document.text for document in found] == ["a" * 20, "b" * 10, "c" * 10]
    assert (dropped.too_short, dropped.cut) == (2, 1)
    found, _ = documents_of([file], min_chars=3, max_chars=20, max_bytes=41)
    assert found[-1].num_bytes == 20


def test_the_seed_keys_the_digests(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.jsonl", LINES)
    digests = [[document.digest for document in documents_of([file], seed=seed)[0]] for seed in (0, 0, 1)]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_reading_continues_at_any_position_with_the_same_counts(tmp_path: Path) -> None:
    null = b'{"text": null}\n'
    bad = b'{"text": "\xff"}\n'
    files = [
        file_of(tmp_path / "0.jsonl", bad + LINES + null + LINES),
        file_of(tmp_path / "1.jsonl", b""),
        file_of(tmp_path / "2.jsonl", null + LINES.replace(b"hree", b"HREE") + bad),
        file_of(tmp_path / "3.txt", b"last"),
    ]
    domain = Domain.model_validate({"sources": ["x"], "min_chars": 5})
    whole, account = Dropped(), []
    position, seen = Position(), set[bytes]()
    for document in read_documents(domain, files, seed=0, seen=seen, dropped=whole, position=position):
        account.append((document.text, Position(**vars(position)), Dropped(**vars(whole)), set(seen)))
    assert len(account) == 5
    assert (whole.missing, whole.undecodable, whole.duplicates, whole.too_short) == (2, 2, 4, 1)
    for number, (_, begin, dropped, met) in enumerate(account):
        rest = read_documents(domain, files, seed=0, seen=met, dropped=dropped, position=begin)
        assert [document.text for document in rest] == [text for text, *_ in account[number + 1 :]]
        assert dropped == whole


def test_undecodable_parquet_text_is_skipped_and_counted(tmp_path: Path) -> None:
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ab\xff\xfe")]
    )
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    dropped = Dropped()
    file = SourceFile(tmp_path / "a.parquet", "a.parquet", Source(path="a.parquet"))
    assert list(read_texts(file, dropped)) == ["ab"]
    assert dropped == Dropped(undecodable=1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_the_meter_counts_the_bytes_of_the_file(tmp_path: Path, name: str) -> None:
    texts = [f"{number} {'x' * 5000}" for number in range(300)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name)
        data = (tmp_path / name).read_bytes()
    else:
        data = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)(lines)
    meter = Meter()
    counts = [meter.disk_bytes for _ in read_texts(file_of(tmp_path / name, data), Dropped(), meter=meter)]
    assert counts == sorted(counts)
    assert meter.disk_bytes == len(data)
    if name in ("a.jsonl", "a.parquet"):
        assert counts[0] < len(data) // 2
