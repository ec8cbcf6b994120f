"""Tokenizers: training, saving, reloading by this package and by transformers, fingerprints and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ddk_ds.data.encoding import TextEncoder
from ddk_ds.data.long_documents import Part
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.tokenizer import EOS_TOKEN, fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from ddk_ds.errors import DataError

TEXT = "  def f(x):\n\treturn x  # naïve 新 \U0001f600\r\n"


def test_round_trip_of_any_text(tokenizer_dir: Path) -> None:
    info = load_tokenizer(tokenizer_dir)
    ids = info.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert info.tokenizer.decode(ids) == TEXT
    assert (info.vocab_size, len(info.vocab)) == (400, 400)
    assert info.vocab[EOS_TOKEN] == info.eos_token_id == 0


def test_training_is_deterministic(recipe_path: Path, tokenizer_dir: Path) -> None:
    again = train_tokenizer(load_recipe(recipe_path), 400)
    assert json.loads(again.to_str()) == json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))


def test_transformers_reads_the_same_tokenizer(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    info = load_tokenizer(tokenizer_dir)
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert theirs.get_vocab() == info.vocab
    assert theirs.eos_token_id == info.eos_token_id
    assert theirs.pad_token_id not in (None, theirs.eos_token_id)
    ids = theirs.encode(TEXT)
    assert ids == info.tokenizer.encode(TEXT).ids
    assert theirs.decode(ids) == TEXT


def test_text_that_spells_eos_stays_text(tokenizer_dir: Path) -> None:
    info = load_tokenizer(tokenizer_dir)
    tokens, lengths, *_ = TextEncoder(info, "uint16", ())([Part(f"a{EOS_TOKEN}b"), Part("c")])
    assert (tokens == info.eos_token_id).sum() == 2
    assert lengths.tolist() == [len(tokens) - 2, 2]
    assert info.tokenizer.decode(tokens[: lengths[0] - 1].tolist()) == f"a{EOS_TOKEN}b"


def test_the_fingerprint_depends_only_on_the_map() -> None:
    assert fingerprint({"a": 0, "b": 1}) == fingerprint({"b": 1, "a": 0})
    assert len({fingerprint(vocab) for vocab in ({"a": 0, "b": 1}, {"a": 1, "b": 0}, {"a": 0})}) == 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": "<|pad|>"}}, 1),
        ("tokenizer_config.json", {"eos_token": None}, None),
        ("special_tokens_map.json", {"eos_token": "<|pad|>"}, 1),
        ("other.json", {}, None),
    ],
)
def test_eos_is_read_from_either_file(
    tokenizer_dir: Path, tmp_path: Path, name: str, content: dict[str, object], expected: int | None
) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_token_id == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "names the EOS token '</s>'"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
    ],
)
def test_broken_files_are_named(tokenizer_dir: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"{name} {message}"):
        load_tokenizer(tmp_path)


def test_a_bos_token_that_the_vocabulary_lacks_is_none(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": EOS_TOKEN}))
    info = load_tokenizer(tmp_path)
    assert (info.bos_token, info.bos, info.eos_token_id) == (None, (), 0)
    assert info.text.encode("<s>") == load_tokenizer(tokenizer_dir).text.encode("<s>")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("size", "message"), [(200, "too small: .* 258"), (100_000, "tokens, not 100,000")])
def test_impossible_vocabulary_sizes_are_refused(recipe_path: Path, size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(load_recipe(recipe_path), size)


def test_no_tokenizer_is_overwritten(tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match="already holds a tokenizer"):
        save_tokenizer(load_tokenizer(tokenizer_dir).tokenizer, tokenizer_dir)
