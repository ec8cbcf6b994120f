"""Data sets of the library datasets: a made-up hub's (hub_server.py), and what save_to_disk really wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from ddk_ds.data.documents import Dropped, check_first_texts, read_texts
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.prepare import prepare
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.errors import ConfigError, DataError
from tests.unit.data.corpus import PLAN, make_texts, write_recipe
from tests.unit.data.hub_server import Hub, served
from tests.unit.data.test_data_prepare import documents_on, write_lines

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served(tmp_path / "hub") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", server.address)
        template = f"{server.address}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
        monkeypatch.setattr("datasets.config.HUB_DATASETS_URL", template)
        yield server


def publish(hub: Hub, commit: str, texts: list[str], name: str = "me/texts", shards: int = 3) -> None:
    """Put the texts into parquet files of a commit, which main then is."""
    directory = hub.root / name / commit / "data"
    directory.mkdir(parents=True)
    for number in range(shards):
        part = texts[len(texts) * number // shards : len(texts) * (number + 1) // shards]
        columns = {"id": list(range(len(part))), "text": part}
        parquet.write_table(pyarrow.table(columns), directory / f"train-{number:05d}-of-{shards:05d}.parquet")
    hub.branches["main"] = commit


def recipe_of(folder: Path, **source: Any) -> Any:
    return load_recipe(write_recipe(folder / "r.yaml", {"a": {"sources": [source]}}))


def texts_of(recipe: Any, commits: dict[str, str] | None = None) -> list[str]:
    return [text for file in list_files(recipe, commits)["a"] for text in read_texts(file, Dropped())]


def test_a_hubs_texts_come_in_order_from_its_main_branch_or_from_what_is_pinned(hub: Hub, tmp_path: Path) -> None:
    old, new = make_texts(1, 20), make_texts(2, 30)
    publish(hub, FIRST, old)
    publish(hub, SECOND, new)
    commits: dict[str, str] = {}
    assert texts_of(recipe_of(tmp_path, path="hf://datasets/me/texts"), commits) == new
    assert commits == {"hf://datasets/me/texts": SECOND}
    assert texts_of(recipe_of(tmp_path, path=f"hf://datasets/me/texts@{FIRST}")) == old
    # A commit that is known is not asked for again.
    assert texts_of(recipe_of(tmp_path, path="hf://datasets/me/texts"), {"hf://datasets/me/texts": FIRST}) == old
    names = [file.name for file in list_files(recipe_of(tmp_path, path="hf://datasets/me/texts"))["a"]]
    assert names == [f"me/texts/train/{number:05d}-of-00003" for number in range(3)]


def test_lines_of_a_subset_and_another_split(hub: Hub, tmp_path: Path) -> None:
    root = hub.root / "me/lines" / FIRST
    (root / "b").mkdir(parents=True)
    write_lines(root / "b/test.jsonl", make_texts(3, 5))
    write_lines(root / "a.jsonl", make_texts(4, 5))
    configs = "- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  data_files:\n  - {split: test, path: b/*}\n"
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    hub.branches["main"] = FIRST
    assert texts_of(recipe_of(tmp_path, path="hf://datasets/me/lines", subset="y", split="test")) == make_texts(3, 5)
    with pytest.raises(DataError, match=r"hf://datasets/me/lines at commit 1+ cannot be read: .*Bad split: train"):
        texts_of(recipe_of(tmp_path, path="hf://datasets/me/lines", subset="y"))
    with pytest.raises(DataError, match=r"hf://datasets/me/lines at commit 1+ cannot be read: .*'z' not found"):
        texts_of(recipe_of(tmp_path, path="hf://datasets/me/lines", subset="z"))


def test_what_a_hub_lacks_is_said_before_any_text_is_read(hub: Hub, tmp_path: Path) -> None:
    publish(hub, FIRST, make_texts(1, 6))
    publish(hub, FIRST, make_texts(1, 6), name="me/gated")
    hub.gated.add("me/gated")
    for source, message in (
        ({"path": "hf://datasets/me/none"}, r"me/none cannot be read: RepositoryNotFoundError.*check the address"),
        ({"path": "hf://datasets/me/texts@v9"}, r"@v9 cannot be read: RevisionNotFoundError.*behind the @"),
        ({"path": "hf://datasets/me/gated"}, r"me/gated at commit 1+ cannot be read: .*gated.*HF_TOKEN"),
        ({"path": "hf://datasets/me/texts", "text_field": "body"}, "has no column 'body'; set text_field to one of id"),
        ({"path": "hf://datasets/me/texts", "text_field": "id"}, "column 'id' holds int64, no text"),
        ({"path": "hf://datasets/me/texts", "split": "test"}, "Bad split: test"),
    ):
        with pytest.raises(DataError, match=message):
            list_files(recipe_of(tmp_path, **source))
    with pytest.raises(ConfigError, match="format 'jsonl' has no meaning for hf://datasets/me/texts"):
        list_files(recipe_of(tmp_path, path="hf://datasets/me/texts", format="jsonl"))


def test_a_shard_that_the_hub_gives_no_more_is_an_error(hub: Hub, tmp_path: Path) -> None:
    publish(hub, FIRST, make_texts(1, 6))
    files = list_files(recipe_of(tmp_path, path="hf://datasets/me/texts"))["a"]
    (hub.root / "me/texts" / FIRST / "data/train-00001-of-00003.parquet").unlink()
    assert list(read_texts(files[0], Dropped())) == make_texts(1, 6)[:2]
    with pytest.raises(DataError, match=r"00001-of-00003 at commit 1+ cannot be read: .*the same command again"):
        list(read_texts(files[1], Dropped()))


def test_a_continued_preparation_reads_the_commit_that_it_began_with(
    hub: Hub, tokenizer_dir: Path, tmp_path: Path
) -> None:
    texts = make_texts(1, 40)
    publish(hub, FIRST, texts)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    domains = {"b": {"sources": ["b.jsonl"]}, "a": {"sources": ["hf://datasets/me/texts"]}}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", domains))
    with pytest.raises(DataError, match=r"b\.jsonl, line 2 has no text"):
        prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    publish(hub, SECOND, make_texts(2, 40))
    write_lines(tmp_path / "b.jsonl", make_texts(3, 40))
    prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    assert load_manifest(tmp_path / "out").commits == {"hf://datasets/me/texts": FIRST}
    found = documents_on(tmp_path / "out/a", "train", tokenizer_dir)[:-1]
    assert found and set(found) <= set(texts)


def test_saved_data_sets_are_read_file_by_file_as_datasets_itself_reads_them(tmp_path: Path) -> None:
    texts = make_texts(1, 50)
    saved = datasets.Dataset.from_dict({"id": list(range(50)), "text": texts})
    shuffled = saved.shuffle(seed=3)  # an index over the rows, which saving applies
    shuffled.save_to_disk(str(tmp_path / "one"), num_shards=4)
    expected = datasets.load_from_disk(str(tmp_path / "one"))["text"][:]
    recipe = recipe_of(tmp_path, path="one")
    files = list_files(recipe)["a"]
    assert [file.name for file in files] == [f"one/data-{number:05d}-of-00004.arrow" for number in range(4)]
    assert texts_of(recipe) == expected and expected != texts
    assert texts_of(recipe_of(tmp_path, path="one/data-00001*.arrow")) == expected[13:26]
    datasets.DatasetDict({"test": saved.take(3), "more": saved}).save_to_disk(str(tmp_path / "two"))
    assert texts_of(recipe_of(tmp_path, path="two", split="test")) == texts[:3]
    for source, message in (
        ({"path": "two"}, r"two has no split 'train'; set split to one of \['test', 'more'\]"),
        ({"path": "one", "split": "test"}, "one is one data set without splits"),
        ({"path": "one", "subset": "x"}, "subset 'x' has no meaning"),
        ({"path": "r.yaml", "split": "x"}, "split 'x' has no meaning"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            list_files(recipe_of(tmp_path, **source))
    for column, message in (("body", "has no column 'body'"), ("id", "column 'id' holds int64")):
        with pytest.raises(DataError, match=message):
            check_first_texts(list_files(recipe_of(tmp_path, path="one", text_field=column))["a"])


def test_a_saved_data_set_that_lacks_its_end_or_a_file_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": make_texts(1, 50)}).save_to_disk(str(tmp_path / "one"), num_shards=2)
    recipe = recipe_of(tmp_path, path="one")
    file = tmp_path / "one/data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-8])  # between two batches: Arrow itself takes it for complete
    assert datasets.load_from_disk(str(tmp_path / "one")).num_rows == 50
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow cannot be read: it ends early"):
        texts_of(recipe)
    file.unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing"):
        list_files(recipe)


def test_a_wrong_field_of_the_last_domain_is_an_error_before_the_first_is_read(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(1, 40))
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    recipe = write_recipe(tmp_path / "r.yaml", {name: {"sources": [f"{name}.jsonl"]} for name in ("a", "b")})
    with pytest.raises(DataError, match=r"b\.jsonl, line 1 has no text in field 'text'"):
        prepare(load_recipe(recipe), tokenizer_dir, tmp_path / "out", PLAN, progress=lambda *_: pytest.fail("begun"))
