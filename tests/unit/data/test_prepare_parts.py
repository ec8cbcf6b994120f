"""A preparation in parts gives the bytes of the one in a single process, which other tests hold against text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddk_ds.data import block_keys, long_documents, prepare_parts
from ddk_ds.data import prepare as prepare_module
from ddk_ds.data.blocks import deal, plan_blocks
from ddk_ds.data.engines import StageTask
from ddk_ds.data.mds import pack_lengths, write_split
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.prepare_parts import prepare_in_parts
from ddk_ds.data.recipe import Recipe, list_files, load_recipe
from ddk_ds.data.shard_plan import shard_samples
from ddk_ds.errors import DataError
from tests.unit.data.corpus import PLAN, make_texts, write_recipe
from tests.unit.data.test_data_prepare import files_of, write_lines

SHARD_BYTES = 3000


class Here:
    """An engine that runs the parts in this process; `failing` parts end before their work, once each."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = list(failing)
        self.runs: list[tuple[str, list[int]]] = []

    def run(self, task: StageTask, logs: Path, parts: int) -> None:
        """Run all parts without a mark."""
        ranks = [rank for rank in range(parts) if not (logs / f"completions/{rank:05}").exists()]
        self.runs.append((logs.name, ranks))
        for rank in ranks:
            if rank in self.failing:
                self.failing.remove(rank)
                continue
            try:
                task(None, rank, parts)
            except DataError:
                continue  # the executors note it and go on


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write many shards, compare few keys at a time, and cut documents into short parts."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(prepare_parts, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(block_keys, "BUCKET_KEYS", 50)
    monkeypatch.setattr(long_documents, "PART_CHARS", 200)


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_any_number_of_parts_gives_the_bytes_of_one_process(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, parts: int
) -> None:
    recipe = load_recipe(recipe_path)
    prepare(recipe, tokenizer_dir, tmp_path / "one", PLAN)
    prepare_in_parts(recipe, tokenizer_dir, tmp_path / "parts", PLAN, Here(), parts, block_bytes=4000)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "one")
    assert len(list((tmp_path / "one/large/train").iterdir())) > 9, "several groups of shards"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "parts"]


def made_up(root: Path, seed: int) -> tuple[Recipe, Plan]:
    """Return a recipe of three domains with copies, nulls, blank and broken lines, empty files, and limits."""
    source = random.Random(seed)
    texts = make_texts(seed, 90)
    domains = {}
    for name in ("a", "b", "c"):
        for number in range(source.randint(1, 6)):
            lines = [json.dumps({"text": source.choice(texts)}) for _ in range(source.randint(0, 40))]
            lines += [source.choice(['{"text": null}', "{broken", '{"text": "  "}', ""]) for _ in range(8)]
            source.shuffle(lines)
            (root / f"{name}{number}.jsonl").write_text("\n".join(lines))
        write_lines(root / f"{name}7.jsonl", [f"{name} {text}" for text in make_texts(seed + 7, 30)])
        (root / f"{name}8.jsonl").write_text('{"text": null}\n' * source.randint(0, 2))
        domains[name] = {"sources": [f"{name}*.jsonl"], "skip_bad_lines": 100, "min_chars": source.choice([1, 150])}
        if source.random() < 0.6:
            domains[name]["max_bytes"] = source.randint(4000, 12000)
    plan = Plan(16, validation_fraction=0.2) if seed % 2 else Plan(16, validation_samples=3, seed=seed)
    return load_recipe(write_recipe(root / "r.yaml", domains)), plan


@pytest.mark.parametrize("seed", range(5))
def test_copies_limits_and_broken_lines_are_counted_as_by_one_process(
    tokenizer_dir: Path, tmp_path: Path, seed: int
) -> None:
    recipe, plan = made_up(tmp_path, seed)
    one = prepare(recipe, tokenizer_dir, tmp_path / "one", plan)
    parts = prepare_in_parts(recipe, tokenizer_dir, tmp_path / "parts", plan, Here(), 3, block_bytes=1500)
    assert parts.domains == one.domains
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "one")


@pytest.mark.parametrize(("after", "missing"), [([], 4), (["  "], 0)])
def test_a_limit_that_ends_with_a_file_counts_what_one_process_meets_before_it_stops(
    tokenizer_dir: Path, tmp_path: Path, after: list[str], missing: int
) -> None:
    """One process stops at the text after the one that reaches the limit, blank or not: it counts nulls before it."""
    texts = make_texts(1, 60)
    limit = sum(len(text.encode()) for text in texts)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["*.jsonl"], "max_bytes": limit}}))
    for name in ("x", "y", "z"):
        (tmp_path / f"{name}.jsonl").touch()
    first, second, third = (file.path for file in list_files(recipe)["a"])  # by a hash of their names
    write_lines(first, texts + after)
    second.write_text('{"text": null}\n' * 3)
    third.write_text('{"text": null}\n{"text": "more"}\n{"text": null}\n')
    plan = Plan(16, validation_samples=1)
    one = prepare(recipe, tokenizer_dir, tmp_path / "one", plan)
    parts = prepare_in_parts(recipe, tokenizer_dir, tmp_path / "parts", plan, Here(), 2, block_bytes=1)
    assert parts.domains == one.domains and one.domains["a"].dropped.missing == missing


def test_failed_parts_run_again_and_finished_units_never(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    recipe, engine = load_recipe(recipe_path), Here(failing=(1, 1, 2))
    prepare(recipe, tokenizer_dir, tmp_path / "one", PLAN)
    prepare_in_parts(recipe, tokenizer_dir, tmp_path / "parts", PLAN, engine, 3, block_bytes=4000)
    assert engine.runs == [
        *[("keys", [0, 1, 2]), ("keys", [1, 2]), ("keys", [1])],
        *[("tokens", [0, 1, 2]), ("shards", [0, 1, 2])],
    ]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "one")


def test_parts_that_never_end_well_are_named_with_their_log(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    engine = Here(failing=(2,) * 9)
    with pytest.raises(DataError, match=r"1 of 3 parts of the pass of keys ended 3 times .*keys/logs/task_00002\.log"):
        prepare_in_parts(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN, engine, 3, block_bytes=4000)
    done = {path.name for path in (tmp_path / ".out.partial/keys").iterdir()}
    prepare_in_parts(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN, Here(), 7, block_bytes=4000)
    assert done and (tmp_path / "out").is_dir()


def test_what_a_user_can_mend_is_said_by_the_task_that_met_it(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Broken lines beyond skip_bad_lines too, which is a domain's: with file and line, as one process says it."""
    for number in range(3):
        write_lines(tmp_path / f"a{number}.jsonl", make_texts(number, 40))
        with (tmp_path / f"a{number}.jsonl").open("a") as stream:
            stream.write("{broken\n")
    domain = {"sources": ["a*.jsonl"], "skip_bad_lines": 2}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {"a": domain}))
    messages = []
    for out in ("one", "parts"):
        with pytest.raises(DataError, match=r"a2\.jsonl, line 41 is not JSON .*skip_bad_lines of the domain is 2") as e:
            if out == "one":
                prepare(recipe, tokenizer_dir, tmp_path / out, PLAN)
            else:
                prepare_in_parts(recipe, tokenizer_dir, tmp_path / out, PLAN, Here(), 3, block_bytes=1)
        messages.append(str(e.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("later", [make_texts(2, 90), make_texts(1, 90)[:80]])
def test_text_that_changes_between_the_passes_is_refused(tokenizer_dir: Path, tmp_path: Path, later: list[str]) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(1, 90))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a.jsonl"]}}))

    class Changing(Here):
        def run(self, task: StageTask, logs: Path, parts: int) -> None:
            if logs.name == "tokens":
                write_lines(tmp_path / "a.jsonl", later)
            super().run(task, logs, parts)

    with pytest.raises(DataError, match=r"domain 'a': a text of .*a\.jsonl .* changed while"):
        prepare_in_parts(recipe, tokenizer_dir, tmp_path / "out", PLAN, Changing(), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: write_lines(root / "a.jsonl", ["other"]), "domain 'a', file 'a.jsonl' is changed, gone or new"),
        (lambda root: write_lines(root / "a1.jsonl", ["new"]), "domain 'a', file 'a1.jsonl' is changed, gone or new"),
        (lambda root: write_recipe(root / "r.yaml", {"b": {"sources": ["a.jsonl"]}}), "domain 'a' had .* now 'b' has"),
    ],
)
def test_an_unfinished_preparation_of_other_text_is_refused(
    tokenizer_dir: Path, tmp_path: Path, change: object, message: str
) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(1, 90))
    path = write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a*.jsonl"]}})
    with pytest.raises(DataError, match="3 times"):
        prepare_in_parts(load_recipe(path), tokenizer_dir, tmp_path / "out", PLAN, Here((0,) * 3), 1)
    change(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"\.out\.partial holds .*{message}.*--start-anew"):
        prepare_in_parts(load_recipe(path), tokenizer_dir, tmp_path / "out", PLAN, Here(), 1)


def test_best_fit_is_refused(recipe_path: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, packing="best_fit")
    with pytest.raises(DataError, match="packs by documents of a window, in one process: leave out --engine"):
        prepare_in_parts(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", plan, Here(), 2)


def test_the_planned_shards_are_those_that_are_written(tmp_path: Path) -> None:
    """Samples of one document and of more than 255, whose borders take more bytes."""
    source = np.random.default_rng(0)
    lengths = [source.integers(1, most, 400) for most in (3, 2000, 2, 30)]
    samples = list(pack_lengths(lengths, 512))
    assert max(map(len, samples)) > 255 and min(map(len, samples)) == 1
    zeros = (np.zeros(512, np.uint16) for _ in samples)
    write_split(tmp_path / "d", zeros, sequence_length=512, dtype="uint16", shard_bytes=20_000, lengths=samples)
    written = [entry["samples"] for entry in json.loads((tmp_path / "d/index.json").read_text())["shards"]]
    for chunk in (400, 7):
        joined = np.concatenate(lengths)
        chunks: Iterator[np.ndarray] = (joined[i : i + chunk] for i in range(0, len(joined), chunk))
        assert list(shard_samples(chunks, sequence_length=512, dtype="uint16", shard_bytes=20_000)) == written


def test_work_is_dealt_evenly_and_once() -> None:
    weights = [5, 1, 9, 9, 0, 2, 7, 3]
    for parts in (1, 3, 8, 11):
        dealt = deal(weights, parts)
        assert sorted(unit for units in dealt for unit in units) == list(range(8)) and len(dealt) == parts
        loads = [sum(weights[unit] for unit in units) for units in dealt]
        assert max(loads) <= 4 / 3 * max(sum(weights) / parts, max(weights))  # Graham 1969


def test_blocks_are_runs_of_files_of_one_domain(recipe_path: Path) -> None:
    files = list_files(load_recipe(recipe_path))
    blocks = plan_blocks(files, 3000)
    found = {
        name: [file for b in blocks if b.domain == name for file in files[name][b.first : b.end]] for name in files
    }
    assert found == files and [block.number for block in blocks] == list(range(len(blocks)))
    tree = [block for block in blocks if block.domain == "tree"]
    assert len(tree) > 3 and all(block.num_bytes >= 3000 for block in tree[:-1])
