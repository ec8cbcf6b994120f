"""Token shards of other programs: the same samples as prepared ones, from where they lie, and every fault is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.commands import adopt_command, verify_command
from ddk_ds.config import Data
from ddk_ds.data.cache import open_store
from ddk_ds.data.loader import MixtureDataset, interval_loader, validation_batches
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import open_split, write_split
from ddk_ds.data.shard_plan import shards_of
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import ConfigError, DataError
from tests.unit.data.token_shards import write_mds, write_megatron

DOMAINS = ("small", "tree", "large")
SPLITS = ("train", "validation")


def prepared_samples(prepared: Path, domain: str, split: str) -> list[Any]:
    opened = open_split(LocalStore(prepared), f"{domain}/{split}")
    return [opened.packed(number) for number in range(len(opened))]


def documents_of(samples: list[Any], eos: int) -> list[list[int]]:
    """Return the documents of joined samples: each ends with the only EOS in it."""
    ids = np.concatenate([sample.tokens for sample in samples])
    ends = [0, *(np.flatnonzero(ids == eos) + 1).tolist(), len(ids)]
    return [ids[begin:end].tolist() for begin, end in pairwise(ends) if end > begin]


def content_of(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def adopt(*arguments: object) -> int:
    return adopt_command.main([str(argument) for argument in arguments])


WRITERS: dict[str, Callable[[Path, list[Any], int], object]] = {
    "bytes_int64": lambda place, samples, _: write_mds(place, [one.tokens for one in samples]),
    "bytes_int32": lambda place, samples, _: write_mds(place, [one.tokens for one in samples], dtype="int32"),
    "ndarray_int32": lambda place, samples, _: write_mds(
        place, [one.tokens for one in samples], "ndarray:int32", "int32", hashes=["sha1"]
    ),
    "ndarray_shaped": lambda place, samples, _: write_mds(
        place, [one.tokens for one in samples], "ndarray:int64:32", "int64", hashes=["xxh64"]
    ),
    "zstd": lambda place, samples, _: write_mds(
        place, [one.tokens for one in samples], "ndarray:int32", "int32", compression="zstd:3", hashes=["sha1"]
    ),
    "bin_uint16": lambda place, samples, eos: write_megatron(place, documents_of(samples, eos)),
    "bin_int32": lambda place, samples, eos: write_megatron(place, documents_of(samples, eos), "int32", split=2),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("copy", [False, True])
def test_adopted_shards_are_the_prepared_samples(
    prepared: Path, tokenizer_dir: Path, tmp_path: Path, kind: str, copy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if copy and kind in ("bytes_int32", "ndarray_shaped", "bin_uint16"):
        pytest.skip("the copy of its like is tested")
    eos = load_manifest(prepared).eos_token_id
    sources = tmp_path / "sources"
    sources.mkdir()
    places: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for name in DOMAINS:
            places[split].append(sources / f"{name}-{split}")
            WRITERS[kind](places[split][-1], prepared_samples(prepared, name, split), eos)
    before = content_of(sources)
    out = tmp_path / "out"
    arguments: list[object] = [f"{name}={place}" for name, place in zip(DOMAINS, places["train"], strict=True)]
    for place in places["validation"]:
        arguments += ["--validation", place]
    arguments += ["--tokenizer", tokenizer_dir, "--out", out, "--workers", 2]
    arguments += ["--sequence-length", 32] if kind.startswith("bin") else ["--borders", "eos"]
    if kind == "zstd" and not copy:
        assert adopt(*arguments) == 2
        assert "is compressed (zstd:3)" in (error := capsys.readouterr().err) and "--copy" in error
        assert not out.exists()
        return
    assert adopt(*arguments, *(["--copy"] if copy else [])) == 0
    printed = capsys.readouterr().out
    assert content_of(sources) == before, "the originals are as they were"
    assert "warning" not in printed, printed
    if copy:
        tokens = sum(len(prepared_samples(prepared, name, split)) * 32 for name in DOMAINS for split in SPLITS)
        assert f"copies {2 * tokens:,} bytes" in printed
        shutil.rmtree(sources)
        for name in DOMAINS:
            for split in SPLITS:
                made, theirs_made = (root / name / split / "shard.00000.mds" for root in (prepared, out))
                assert made.read_bytes() == theirs_made.read_bytes()
    else:
        assert {path.name for path in out.rglob("*") if path.is_file()} == {"domains.json", "index.json"}

    ours, theirs = (MixtureDataset(root, DOMAINS, masked=True) for root in (prepared, out))
    assert theirs.sizes.tolist() == ours.sizes.tolist()
    orders = [[sizes.tolist() for sizes in dataset.order_sizes] for dataset in (ours, theirs)]
    assert orders[0] == orders[1], "the samples come in the order of prepared ones"
    assert copy or kind.startswith("bin") or len(theirs.shard_sizes[2]) > 3
    for number in range(len(ours)):
        (mine, domain), (others, of) = ours.read(number), theirs.read(number)
        assert domain == of and mine.tokens.dtype == others.tokens.dtype
        assert mine.tokens.tolist() == others.tokens.tolist()
        assert mine.lengths is not None and others.lengths is not None
        assert mine.lengths.tolist() == others.lengths.tolist(), number
    ids = np.random.default_rng(3).integers(0, len(ours), 48)
    batches = [
        [
            {key: value.tolist() for key, value in batch.items() if value is not None}  # type: ignore[attr-defined]
            for batch in interval_loader(dataset, ids, rank=1, world=2, micro_batch=4)
        ]
        for dataset in (ours, theirs)
    ]
    assert batches[0] == batches[1]
    held_out = [
        validation_batches(root, DOMAINS, num_samples=7, rank=0, world=1, micro_batch=4, masked=True)
        for root in (prepared, out)
    ]
    for mine_batches, other_batches in zip(*held_out, strict=True):
        for mine_batch, other_batch in zip(mine_batches, other_batches, strict=True):
            assert all(
                np.array_equal(a, b)
                for a, b in zip(mine_batch, other_batch, strict=True)  # type: ignore[arg-type]
            )
    manifest = load_manifest(out)
    assert manifest.tokenizer_fingerprint == load_manifest(prepared).tokenizer_fingerprint
    largest = [getattr(load_manifest(prepared).domains[name], split).largest_id for name in DOMAINS for split in SPLITS]
    assert largest == [getattr(manifest.domains[name], split).largest_id for name in DOMAINS for split in SPLITS]
    assert verify_command.main([str(out)]) == 0 and " 0 broken" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "limit"), [("uint16", 500), ("uint32", 900)])
def test_the_order_is_that_of_the_shards_that_would_be_written(tmp_path: Path, dtype: str, limit: int) -> None:
    source = np.random.default_rng(0)
    documents = source.integers(1, 100, 50) if limit == 900 else source.integers(1, 9, 50)
    samples = np.zeros((50, 16), dtype)
    for number, counts in enumerate((documents, None)):
        lengths = None if counts is None else [np.ones(count, np.uint32) for count in counts]
        options = {"sequence_length": 16, "dtype": dtype, "shard_bytes": limit}
        write_split(tmp_path / str(number), samples, **options, lengths=lengths)  # type: ignore[arg-type]
        written = open_split(LocalStore(tmp_path), str(number)).shard_sizes.tolist()
        chunks = np.array_split(documents, 3)
        planned = list(shards_of(chunks, **options, borders=counts is not None))  # type: ignore[arg-type]
        assert len(written) > 4 and planned == written


@pytest.fixture
def samples(tokenizer_dir: Path) -> np.ndarray[Any, Any]:
    """Return 40 samples of 16 ids, no two equal, each the beginning of no document."""
    return np.random.default_rng(0).integers(2, load_tokenizer(tokenizer_dir).vocab_size, (40, 16))


def test_held_out_samples_are_cut_off_at_the_end(
    samples: np.ndarray[Any, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    place = write_mds(tmp_path / "web", samples, limit=1024)
    assert adopt(place, "--tokenizer", tokenizer_dir, "--out", tmp_path / "out", "--validation-samples", 9) == 0
    train, held_out = (open_split(LocalStore(tmp_path / "out"), f"web/{split}") for split in SPLITS)
    assert len(train.shard_sizes) > 2 and len(held_out.shard_sizes) > 1, "the cut is inside a shard, and over several"
    np.testing.assert_array_equal([train.tokens(number) for number in range(31)], samples[:31])
    np.testing.assert_array_equal([held_out.tokens(number) for number in range(9)], samples[31:])
    manifest = load_manifest(tmp_path / "out")
    assert manifest.domains["web"].adopted == {"format": "mds", "train": "../web", "held_out": 9, "copied": False}
    assert not manifest.borders and not manifest.masked("auto", "data.documents") and held_out.packed(0).lengths is None
    (tmp_path / "moved").mkdir()
    for name in ("web", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert load_manifest(tmp_path / "moved/out").domains == manifest.domains, "paths are from the data's root"


def test_documents_of_bin_are_held_out_whole(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Two files in a directory: the last documents are held out, over both files, and a file's rest fills no sample."""
    source = np.random.default_rng(1)
    lengths = [[5, 40, 7, 0, 21], [9, 9, 9, 9]]
    files = [[source.integers(2, 300, length).tolist() for length in of_file] for of_file in lengths]
    (tmp_path / "meg").mkdir()
    for number, documents in enumerate(files):
        write_megatron(tmp_path / f"meg/part_{number}", documents, "int64")
    options = ("--tokenizer", tokenizer_dir, "--out", tmp_path / "out", "--sequence-length", 8)
    assert adopt(tmp_path / "meg", *options, "--validation-samples", 6) == 0
    train, held_out = (open_split(LocalStore(tmp_path / "out"), f"meg/{split}") for split in SPLITS)
    # The second file has 4 whole samples; two more need the last document, of 21 ids, of the first one.
    streams = [list(chain(*documents)) for documents in (files[0][:4], files[0][4:], files[1])]
    samples = [[stream[at : at + 8] for at in range(0, len(stream) - 7, 8)] for stream in streams]
    assert [train.tokens(number).tolist() for number in range(len(train))] == samples[0]
    assert [held_out.tokens(number).tolist() for number in range(len(held_out))] == samples[1] + samples[2]
    found = [packed.lengths.tolist() for number in range(6) if (packed := train.packed(number)).lengths is not None]
    assert found == [[5, 3], [8], [8], [8], [8], [5, 3]]
    assert held_out.packed(3).lengths.tolist() == [1, 7] if held_out.packed(3).lengths is not None else False


@pytest.mark.parametrize("copy", [False, True])
def test_borders_by_the_bos(tokenizer_dir: Path, tmp_path: Path, copy: bool) -> None:
    """In GPT-2's way the BOS is the EOS: the user says on which side of it a document ends."""
    bos = load_tokenizer(tokenizer_dir).eos_token_id
    assert bos is not None
    sample = [bos, 5, 6, bos, 7, 8, 9, bos]
    write_mds(tmp_path / "web", [sample] * 3 + [[5, 6, 7, 8, 9, 5, bos, 8]])
    for side, wanted in (("bos", [[3, 4, 1], [6, 2]]), ("eos", [[1, 3, 4], [7, 1]])):
        out = tmp_path / side
        options = ("--tokenizer", tokenizer_dir, "--out", out, "--validation-samples", 1, "--borders", side)
        assert adopt(tmp_path / "web", *options, *(["--copy"] if copy else [])) == 0
        found = [open_split(LocalStore(out), f"web/{split}").packed(0).lengths for split in SPLITS]
        assert [lengths.tolist() for lengths in found if lengths is not None] == wanted


def test_a_held_out_sample_that_is_trained_on_is_told(
    samples: np.ndarray[Any, Any], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mds(tmp_path / "web", [*samples, samples[3], samples[17]])
    options = ("--tokenizer", tokenizer_dir, "--out", tmp_path / "out", "--validation-samples", 5)
    assert adopt(tmp_path / "web", *options) == 0
    assert "warning: web: 2 held-out samples are also trained on" in capsys.readouterr().out


def test_another_tokenizer_is_suspected(
    samples: np.ndarray[Any, Any], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mds(tmp_path / "web", samples)
    options = ("--tokenizer", tokenizer_dir, "--out", tmp_path / "out", "--validation-samples", 5)
    assert adopt(tmp_path / "web", *options) == 0
    assert "another tokenizer than" in capsys.readouterr().out, "ids by chance are no text of any tokenizer"


def change(name: str, key: str, value: object) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        content = json.loads((root / name).read_text())
        content["shards"][0][key] = value
        (root / name).write_text(json.dumps(content))

    return edit


def flip(root: Path) -> None:
    path = root / "web/shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[-16] ^= 1
    path.write_bytes(content)


def cut(name: str, by: int = 1) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size - by)


def with_samples(*rows: Any, **options: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        shutil.rmtree(root / "web")
        write_mds(root / "web", rows, **options)

    return write


def bin_of(documents: list[list[int]], **options: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        shutil.rmtree(root / "web")
        write_megatron(root / "web", documents, **options)

    return write


LONG = list(range(2, 18))


@pytest.mark.parametrize(
    ("damage", "more", "message"),
    [
        (with_samples(LONG, [*LONG[:15], 400], LONG), (), "sample 1 has the id 400 at 15, the vocabulary of"),
        (with_samples(LONG, [-1, *LONG[1:]], LONG, encoding="ndarray:int32", dtype="int32"), (), "has the id -1 at 0"),
        (with_samples(LONG, LONG[:9], LONG), (), "sample 1 has 9 ids, others have 16"),
        (with_samples([70000] * 16, LONG, dtype="int32"), (), "sample 0 has the id 70000 at 0"),
        (lambda root: None, ("--sequence-length", 17), "--sequence-length is 17, the samples of .* have 16 ids"),
        (lambda root: None, ("--validation-samples", 40), "gives 0 samples of 16 ids to train on and 40"),
        (lambda root: None, ("--validation", "{root}/nothing"), "nothing/index.json cannot be read"),
        (lambda root: None, ("--borders", "eos"), "no sample of .* holds the EOS"),
        (flip, (), "shard .*00000.mds is damaged: its sha1 is"),
        (cut("web/shard.00001.mds"), (), r"00001\.mds has [\d,]+ bytes, its index says"),
        (lambda root: (root / "web/shard.00001.mds").unlink(), (), r"00001\.mds is missing"),
        (change("web/index.json", "column_names", ["text"]), (), "none is tokens; text goes to ddk prepare"),
        (change("web/index.json", "column_encodings", ["str"]), (), "tokens are 'str'"),
        (change("web/index.json", "version", 1), (), "format mds 1, only mds 2"),
        (lambda root: (root / "web/index.json").write_text("{}"), (), "is no index of MDS shards"),
        (lambda root: (root / "web/index.json").unlink(), (), "neither index.json .* nor .idx"),
        (bin_of([LONG] * 9), (), r"are cut into samples: give --sequence-length"),
        (bin_of([LONG, [2, 399, 400]] * 9), ("--sequence-length", 8), "has the id 400 at"),
        (bin_of([LONG] * 9, modes=b"\0" * 9), ("--sequence-length", 8), "multimodal"),
        (
            lambda root: (bin_of([LONG] * 9)(root), cut("web.bin", 2)(root)),
            ("--sequence-length", 8),
            r"web\.bin has 286 bytes, web\.idx says 288",
        ),
        (
            lambda root: (bin_of([LONG] * 9)(root), cut("web.idx", 8)(root)),
            ("--sequence-length", 8),
            "web.idx has .* its header says",
        ),
        (
            lambda root: (bin_of([LONG] * 9)(root), (root / "web.idx").write_bytes(b"x" * 90)),
            ("--sequence-length", 8),
            "is no .idx of Megatron-LM",
        ),
    ],
)
def test_what_cannot_be_adopted_is_named(
    samples: np.ndarray[Any, Any],
    tokenizer_dir: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_mds(tmp_path / "web", samples, limit=2048, hashes=["sha1"])
    damage(tmp_path)
    options: list[object] = ["--tokenizer", tokenizer_dir, "--out", tmp_path / "out"]
    options += [str(value).replace("{root}", str(tmp_path)) for value in more]
    options += [] if "--validation-samples" in more or "--validation" in more else ["--validation-samples", 1]
    assert adopt(tmp_path / "web", *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a=web", "a=web"), "domain 'a' is given twice"),
        (("ü=web",), "domain 'ü': it names a directory"),
        (("a=web", "b=web", "--validation", "web"), "--validation is given 1 times for 2 domains"),
    ],
)
def test_domains_are_named_once(
    samples: np.ndarray[Any, Any],
    tokenizer_dir: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_mds(tmp_path / "web", samples)
    given = [argument.replace("web", str(tmp_path / "web")) for argument in arguments]
    assert adopt(*given, "--tokenizer", tokenizer_dir, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_pickled_columns_are_never_read(
    samples: np.ndarray[Any, Any], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from streaming import MDSWriter

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    with MDSWriter(out=str(tmp_path / "web"), columns={"tokens": "ndarray:int64", "more": "pkl"}) as writer:
        for sample in samples:
            writer.write({"tokens": sample, "more": Evil()})
    assert adopt(tmp_path / "web", "--tokenizer", tokenizer_dir, "--out", tmp_path / "out") == 2
    assert "column more is pickled" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_shards_that_change_later_end_the_reading(
    samples: np.ndarray[Any, Any], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mds(tmp_path / "web", samples)
    write_megatron(tmp_path / "meg", samples.tolist(), "int32")
    options = ("--tokenizer", tokenizer_dir, "--out", tmp_path / "out", "--validation-samples", 4)
    assert adopt(tmp_path / "web", tmp_path / "meg", *options, "--sequence-length", 16) == 0
    flip(tmp_path)
    for name in ("meg.idx", "meg.bin"):
        content = bytearray((tmp_path / name).read_bytes())
        content[100] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} of domain 'meg' is damaged"):
            open_split(LocalStore(tmp_path / "out"), "meg/train").tokens(0)
        content[100] ^= 1
        (tmp_path / name).write_bytes(content)
    assert verify_command.main([str(tmp_path / "out")]) == 1
    assert "web/shard.00000.mds of domain 'web' is damaged" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=r"were adopted: their shards lie elsewhere .* adopt them with --copy"):
        load_manifest(open_store(Data(path=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))))
