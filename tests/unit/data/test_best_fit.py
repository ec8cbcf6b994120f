"""Best-fit packing: documents are cut only where they must be, and padding is never text."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.commands.cut_student_work import _from_shards
from ddk_ds.commands.prepare_command import shares
from ddk_ds.data import encoding
from ddk_ds.data import prepare as prepare_module
from ddk_ds.data import reading as reading_module
from ddk_ds.data.best_fit import best_fit, pack_best_fit
from ddk_ds.data.encoding import Encoded, TextEncoder
from ddk_ds.data.loader import MixtureDataset, interval_loader, validation_batches
from ddk_ds.data.long_documents import Part
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.prepare import prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.screening import Marks
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import DataError
from ddk_ds.methods import IGNORE_INDEX, next_token_labels
from tests.unit.data.corpus import PLAN, make_texts, write_recipe
from tests.unit.data.test_data_prepare import files_of

BEST_FIT = replace(PLAN, packing="best_fit")


def test_items_that_fill_all_bins_do() -> None:
    # 7 + 3, 6 + 4 and 5 + 5 fill three bins of 10; in the order given, 5 + 3 would leave the 7 and the other 5 alone.
    assert best_fit(np.array([5, 3, 6, 4, 7, 5, 10]), 10) == [[0, 5], [1, 4], [2, 3], [6]]
    assert best_fit(np.array([4]), 10) == [[0]]


def test_it_is_best_fit_decreasing() -> None:
    """The fills are those of the definition: each item, the longest first, where the least space is left."""
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 65, 300)
        left: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [number for number, space in enumerate(left) if space >= length]
            if not fitting:
                left.append(64 - length)
                continue
            left[min(fitting, key=lambda number: left[number])] -= length
        found = best_fit(lengths, 64)
        assert sorted(64 - int(lengths[items].sum()) for items in found) == sorted(left)
        assert sorted(item for items in found for item in items) == list(range(300))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_documents_are_whole_but_those_longer_than_a_sample(size: int) -> None:
    lengths = np.array([3, 25, 7, 1, 9, 2])
    ids = np.arange(100, 147, dtype=np.uint16)
    pieces = [ids[first : first + size] for first in range(0, 47, size)]
    chunks = [lengths[first : first + size] for first in range(0, 6, size)]
    found = list(pack_best_fit(pieces, chunks, 10, 0))
    a, b, c, d, e, f = (document.tolist() for document in np.split(ids, np.cumsum(lengths)[:-1]))
    # By size: twice ten of the long one; 9 and 1; 7 and 3; its remainder of 5, and 2.
    assert [sample.tokens.tolist() for sample in found] == [a + c, b[:10], b[10:20], b[20:] + f + [0, 0, 0], d + e]
    parts = [[3, 7], [10], [10], [5, 2, 1, 1, 1], [1, 9]]
    assert [sample.lengths.tolist() for sample in found if sample.lengths is not None] == parts
    # One window after the other: 3 and 25, whose remainder takes the 3; 7 and 1 and 9, 2.
    windows = [sample.tokens.tolist() for sample in pack_best_fit(pieces, chunks, 10, 0, window=17)]
    assert windows == [a + b[20:] + [0, 0], b[:10], b[10:20], [*c, 0, 0, 0], d + e, f + [0] * 8]


def prepared_by(plan: Any, folder: Path, tokenizer_dir: Path) -> Path:
    texts = [*make_texts(5, 60, num_words=14), *make_texts(6, 6, num_words=90)]
    if not (folder / "a.jsonl").exists():
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = write_recipe(folder / "r.yaml", {"a": {"sources": ["a.jsonl"]}})
    prepare(load_recipe(recipe), tokenizer_dir, folder / "out", plan)
    return folder / "out"


def test_all_documents_are_in_the_data_and_padding_has_no_labels(tokenizer_dir: Path, tmp_path: Path) -> None:
    root = prepared_by(BEST_FIT, tmp_path, tokenizer_dir)
    info = load_tokenizer(tokenizer_dir)
    manifest, length = load_manifest(root), BEST_FIT.sequence_length
    documents = [
        [*info.tokenizer.encode(json.loads(line)["text"]).ids, info.eos_token_id]
        for line in (tmp_path / "a.jsonl").read_text().splitlines()
    ]
    domain = manifest.domains["a"]
    splits = domain.train, domain.validation
    assert sum(split.documents for split in splits) == len(documents)
    assert sum(split.tokens for split in splits) == sum(map(len, documents)) and domain.dropped.tail_tokens == 0
    assert sum(split.cut_documents for split in splits) == sum(len(one) > length for one in documents) > 0
    parts = [one[first : first + length] for one in documents for first in range(0, len(one), length)]
    found, padding, labels = [], 0, 0
    for split in ("train", "validation"):
        dataset = MixtureDataset(root, ["a"], split, masked=True)
        assert len(dataset) == getattr(domain, split).samples
        for batch in interval_loader(dataset, np.arange(len(dataset)), rank=0, world=1, micro_batch=1):
            positions, ids = batch["positions"], batch["input_ids"]
            assert positions is not None
            labels += int((next_token_labels(ids, positions) != IGNORE_INDEX).sum())
            for part in np.split(ids[0].numpy(), np.flatnonzero(positions[0] == 0)[1:]):
                found.append(part.tolist())
    # A document of nothing but EOS would be an empty text, which is none: those are padding.
    padding = found.count([info.eos_token_id]) - parts.count([info.eos_token_id])
    assert sorted(one for one in found if len(one) > 1) == sorted(one for one in parts if len(one) > 1)
    assert padding == sum(split.padding_tokens for split in splits) > 0
    assert labels == sum(len(part) - 1 for part in parts)
    places, cut = length * sum(split.samples for split in splits), sum(len(one) > length for one in documents)
    assert shares(manifest, ["a"]).endswith(f": a {padding / places:.2%} and {cut / len(documents):.2%}")
    [held_out] = validation_batches(root, ["a"], num_samples=7, rank=0, world=1, micro_batch=7, masked=True)
    assert held_out[0].positions is not None and bool(held_out[0].real.all())


def test_several_workers_write_the_same_bytes_as_one(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand in for the processes, whose start takes seconds; batches end in another order than they begin."""
    made = [tmp_path / name for name in ("one", "three")]
    for folder in made:
        folder.mkdir()
    monkeypatch.setattr(reading_module, "BATCH_BYTES", 300)
    one = prepared_by(BEST_FIT, made[0], tokenizer_dir)
    encoder, ended = TextEncoder(load_tokenizer(tokenizer_dir), "uint16", ()), []

    def encode(parts: list[Part], _texts: list[str], _style: None) -> tuple[Encoded, Marks]:
        time.sleep(0.0 if parts[0].text.startswith("5/1") else 0.01)
        ended.append(parts[0].text)
        return encoder(parts), Marks([], [])

    monkeypatch.setattr(encoding, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(encoding, "_run", encode)
    three = prepared_by(replace(BEST_FIT, workers=3), made[1], tokenizer_dir)
    texts = [json.loads(line)["text"] for line in (made[1] / "a.jsonl").read_text().splitlines()]
    assert ended != sorted(ended, key=texts.index), "all batches ended in turn"
    assert files_of(three) == files_of(one)


def test_padded_samples_are_not_joined(tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = load_manifest(prepared_by(BEST_FIT, tmp_path, tokenizer_dir))
    assert manifest.masked("auto", "data.documents") and manifest.masked("masked", "data.documents")
    message = r"data.documents is joined, and the samples of .* are padded .*: set data.documents to auto, or prepare"
    with pytest.raises(DataError, match=message):
        manifest.masked("joined", "data.documents")
    options = Namespace(shards=tmp_path / "out", samples=1, sequence_length=8)
    with pytest.raises(DataError, match=r"--shards are read without the borders .* are padded .*: give --text, or"):
        _from_shards(options, load_tokenizer(tokenizer_dir))


def test_a_preparation_goes_on_with_the_packing_that_it_began_with(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = prepared_by(BEST_FIT, tmp_path / "whole", tokenizer_dir)
    write = prepare_module.write_split

    def killed(directory: Path, *arguments: Any, **options: Any) -> Any:
        written = write(directory, *arguments, **options)
        if directory.name == "train":
            raise KeyboardInterrupt
        return written

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_split", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared_by(BEST_FIT, tmp_path, tokenizer_dir)
    with pytest.raises(DataError, match=r'differs: packing was "best_fit", now "cut"'):
        prepared_by(PLAN, tmp_path, tokenizer_dir)
    out = prepared_by(BEST_FIT, tmp_path, tokenizer_dir)
    assert files_of(whole) == files_of(out)
