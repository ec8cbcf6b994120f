"""A preparation puts no text on both sides, is the same for any worker count, and leaves nothing half-written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.data import prepare as prepare_module
from ddk_ds.data import reading as reading_module
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import open_split
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import DataError
from tests.unit.data.corpus import PLAN, make_texts, write_recipe


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def documents_on(root: Path, split: str, tokenizer_dir: Path) -> list[str]:
    """Return the split's documents, decoded; the last one is cut where the dropped tail begins."""
    info = load_tokenizer(tokenizer_dir)
    opened = open_split(LocalStore(root), split)
    ids = np.concatenate([opened.tokens(i) for i in range(len(opened))])
    ends = np.flatnonzero(ids == info.eos_token_id)
    return [info.tokenizer.decode(part[part != info.eos_token_id].tolist()) for part in np.split(ids, ends + 1)]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_document_comes_back_on_one_side_and_no_duplicate_on_any(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = make_texts(5, 80)
    write_lines(tmp_path / "a.jsonl", texts + texts[::3])
    write_lines(tmp_path / "b.jsonl", make_texts(6, 40) + texts[::2])
    recipe = write_recipe(tmp_path / "r.yaml", {name: {"sources": [f"{name}.jsonl"]} for name in ("a", "b")})
    out = tmp_path / "out"
    manifest = prepare(load_recipe(recipe), tokenizer_dir, out, PLAN)
    sides = {
        (name, split): documents_on(out / name, split, tokenizer_dir)
        for name in ("a", "b")
        for split in ("train", "validation")
    }
    # A dropped tail is shorter than a document, so it cuts at most the last one of a split.
    complete = {side: found[:-1] for side, found in sides.items()}
    everything = [text for found in complete.values() for text in found]
    assert len(everything) == len(set(everything))
    assert set(everything) <= {*texts, *make_texts(6, 40)}
    counts = {side: getattr(manifest.domains[side[0]], side[1]).documents for side in sides}
    assert sum(counts.values()) == 80 + 40
    assert all(counts[side] - len(found) in (0, 1) for side, found in complete.items())
    assert manifest.domains["a"].dropped.duplicates == len(texts[::3])
    assert manifest.domains["b"].dropped.duplicates == len(texts[::2])
    positions = [texts.index(text) for text in complete["a", "train"]]
    assert positions == sorted(positions)


def test_the_borders_are_those_of_the_documents_also_where_the_end_of_text_stands_inside_one(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Documents that begin with the BOS, which is the EOS of this tokenizer too."""
    texts = make_texts(5, 60)
    write_lines(tmp_path / "a.jsonl", texts)
    recipe = write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a.jsonl"]}})
    recipe.write_text(recipe.read_text() + "tokenizer:\n  add_bos: true\n")
    manifest = prepare(load_recipe(recipe), tokenizer_dir, tmp_path / "out", PLAN)
    info = load_tokenizer(tokenizer_dir)
    assert manifest.borders and manifest.bos == (info.eos_token_id,)
    split = open_split(LocalStore(tmp_path / "out"), "a/train")
    packed = [split.packed(i) for i in range(len(split))]
    found: list[list[int]] = []
    for tokens, lengths, _ in packed:
        assert lengths is not None and int(lengths.sum()) == len(tokens) == PLAN.sequence_length
        found += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    documents: list[list[int]] = []
    for part in found:  # a part that does not begin a document goes on with that of the sample before
        if (documents and documents[-1][-1] != info.eos_token_id) or (documents and len(documents[-1]) == 1):
            documents[-1] += part
        else:
            documents.append(part)
    expected = [[info.eos_token_id, *info.text.encode(text), info.eos_token_id] for text in texts]
    assert len(documents) > 20
    assert all(document in expected for document in documents[:-1]) and documents[-1] != []


def test_the_manifest_counts_what_the_shards_hold(prepared: Path, tokenizer_dir: Path) -> None:
    manifest = load_manifest(prepared)
    info = load_tokenizer(tokenizer_dir)
    assert manifest.tokenizer_fingerprint == info.fingerprint
    assert (manifest.vocab_size, manifest.eos_token_id, manifest.dtype) == (400, 0, "uint16")
    assert list(manifest.domains) == ["small", "tree", "large"]
    assert [domain.train.documents + domain.validation.documents for domain in manifest.domains.values()] == [
        60,
        80,
        200,
    ]
    for seed, name, count in ((0, "small", 60), (1, "large", 200), (2, "tree", 80)):
        texts = make_texts(seed, count)
        domain = manifest.domains[name]
        ids = sum(len(info.tokenizer.encode(text).ids) + 1 for text in texts)
        assert domain.train.tokens + domain.validation.tokens + domain.dropped.tail_tokens == ids
        assert domain.train.bytes + domain.validation.bytes == sum(len(text.encode()) for text in texts)
        assert domain.validation.samples >= 7
        for split in (domain.train, domain.validation):
            assert split.tokens == split.samples * PLAN.sequence_length


def test_two_workers_write_the_same_bytes_as_one(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "BATCH_BYTES", 500)
    prepare(load_recipe(recipe_path), tokenizer_dir, tmp_path / "two", replace(PLAN, workers=2))
    assert files_of(tmp_path / "two") == files_of(prepared)


def test_the_seed_moves_the_split_and_a_fraction_holds_out_about_that_share(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    held_out = []
    for seed in (0, 1):
        plan = Plan(sequence_length=32, validation_fraction=0.25, seed=seed)
        manifest = prepare(load_recipe(recipe_path), tokenizer_dir, tmp_path / f"{seed}", plan)
        assert 30 <= manifest.domains["large"].validation.documents <= 70
        held_out.append(set(documents_on(tmp_path / f"{seed}/large", "validation", tokenizer_dir)))
    assert held_out[0] != held_out[1]


def test_progress_ends_at_the_size_of_the_files(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "BATCH_BYTES", 500)
    reported: dict[str, list[tuple[int, int]]] = {}
    recipe = load_recipe(recipe_path)
    prepare(
        recipe,
        tokenizer_dir,
        tmp_path / "out",
        PLAN,
        progress=lambda name, done, total: reported.setdefault(name, []).append((done, total)),
    )
    for name, files in list_files(recipe).items():
        size = sum(file.path.stat().st_size for file in files)
        assert reported[name][-1] == (size, size)
        assert reported[name] == sorted(reported[name])
        assert reported[name][0][0] == 0
    assert len({done for done, _ in reported["tree"]}) > 10


def test_progress_of_a_capped_domain_is_of_its_cap(recipe_path: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    recipe = load_recipe(recipe_path, ["domains.large.max_bytes=9000"])
    progress = lambda name, done, total: reported.append((done, total)) if name == "large" else None  # noqa: E731
    prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN, progress=progress)
    assert reported[-1] == (9000, 9000)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"min_chars": 10_000}, "domain 'b' is empty: no document .*too_short 40.*min_chars"),
        ({"max_bytes": 200}, "domain 'b' has too little text: .*7 and 1 are needed: add text"),
    ],
)
def test_a_domain_with_too_little_text_is_named(
    tokenizer_dir: Path, tmp_path: Path, domain: dict[str, int], message: str
) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(5, 80))
    write_lines(tmp_path / "b.jsonl", make_texts(6, 40))
    recipe = write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a.jsonl"]}, "b": {"sources": ["b.jsonl"], **domain}})
    with pytest.raises(DataError, match=message):
        prepare(load_recipe(recipe), tokenizer_dir, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_directory_never_has_the_final_name(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def look(*_arguments: object) -> None:
        names.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "write_manifest", look)
    with pytest.raises(KeyboardInterrupt):
        prepare(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN)
    assert names == [".out.partial"]
    monkeypatch.undo()
    prepare(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_overwritten(recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare(load_recipe(recipe_path), tokenizer_dir, prepared, PLAN)
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(DataError, match="is not an empty directory"):
            prepare(load_recipe(recipe_path), tokenizer_dir, out, PLAN)
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "x"


def test_a_tokenizer_without_eos_is_refused(recipe_path: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="names no EOS token"):
        prepare(load_recipe(recipe_path), tmp_path, tmp_path / "out", PLAN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0, "validation_samples": 1}, "sequence length is 0"),
        ({"sequence_length": 8, "validation_samples": 0}, "validation samples is 0"),
        ({"sequence_length": 8, "validation_samples": 1, "workers": 0}, "workers is 0"),
        ({"sequence_length": 8, "validation_samples": 1, "seed": -1}, "seed is -1"),
        ({"sequence_length": 8, "validation_fraction": 1.0}, "fraction is 1.0"),
        ({"sequence_length": 8}, "either a number"),
        ({"sequence_length": 8, "validation_samples": 1, "validation_fraction": 0.1}, "either a number"),
    ],
)
def test_invalid_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Plan(**options)
