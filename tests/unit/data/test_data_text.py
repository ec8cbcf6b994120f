"""Ids of a preparation are those of the text for each kind of tokenizer. Plain transformers gives the right values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from ddk_ds.data import long_documents
from ddk_ds.data.documents import Dropped
from ddk_ds.data.encoding import Encoded, TextEncoder
from ddk_ds.data.long_documents import DocumentCutter, Part
from ddk_ds.data.manifest import Manifest, load_manifest
from ddk_ds.data.mds import open_split
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import DataError
from tests.unit.data.corpus import make_texts, write_recipe
from tests.unit.data.tokenizer_kinds import KINDS, make_tokenizer

TEXTS = [f"<s/>.,(x)! {text}" for text in make_texts(3, 24)]


@pytest.fixture(scope="module", params=KINDS)
def kind_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the directory of a tokenizer of each kind."""
    return make_tokenizer(request.param, TEXTS, tmp_path_factory.mktemp(request.param))


def prepared(root: Path, tokenizer: Path, texts: list[str], *overrides: str, **plan: Any) -> tuple[Manifest, list[int]]:
    """Prepare the texts, one domain with samples of one token; return the manifest and all ids."""
    root.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "d.jsonl").write_text(lines, encoding="utf-8")
    recipe = write_recipe(root / "r.yaml", {"d": {"sources": ["d.jsonl"]}})
    plan = {"sequence_length": 1, "validation_samples": 1, **plan}
    prepare(load_recipe(recipe, overrides), tokenizer, root / "out", Plan(**plan))
    ids = []
    for split in ("train", "validation"):
        opened = open_split(LocalStore(root / "out/d"), split)
        ids += [int(opened.tokens(number)[0]) for number in range(len(opened))]
    return load_manifest(root / "out"), ids


def test_text_that_spells_control_tokens_makes_no_end_of_text(kind_dir: Path, tmp_path: Path) -> None:
    spelt = [f"{text} </s> in</s>side <s> {text[:20]}</s>" for text in TEXTS]
    manifest, ids = prepared(tmp_path, kind_dir, spelt)
    assert ids.count(AutoTokenizer.from_pretrained(kind_dir).eos_token_id) == len(spelt)
    assert ids.count(AutoTokenizer.from_pretrained(kind_dir).bos_token_id) == len(spelt)
    assert manifest.domains["d"].dropped.control_tokens == 4 * len(spelt)


def test_documents_have_the_ids_of_transformers_between_bos_and_eos(kind_dir: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(kind_dir)
    manifest, ids = prepared(tmp_path, kind_dir, TEXTS)
    ends = np.flatnonzero(np.array(ids) == plain.eos_token_id) + 1
    documents = [part.tolist() for part in np.split(ids, ends)[:-1]]
    assert sorted(documents) == sorted([*plain(text).input_ids, plain.eos_token_id] for text in TEXTS)
    assert list(manifest.bos) == plain("").input_ids == [plain.bos_token_id]
    assert manifest.domains["d"].dropped == Dropped()


def test_truncation_and_padding_of_a_tokenizer_are_off(tmp_path: Path) -> None:
    directory = make_tokenizer("byte_level", TEXTS, tmp_path / "tokenizer")
    plain = AutoTokenizer.from_pretrained(directory)
    wanted = sum(len(plain(text).input_ids) + 1 for text in TEXTS)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        **{"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    cut = AutoTokenizer.from_pretrained(directory).backend_tokenizer.encode(TEXTS[0])
    assert len(cut.ids) == 512 and sum(cut.attention_mask) == 16
    _, ids = prepared(tmp_path / "data", directory, TEXTS)
    assert len(ids) == wanted
    # Evaluation and `ddk generate` read it by transformers, which turns both off for each call.
    assert AutoTokenizer.from_pretrained(directory).encode(TEXTS[0]) == plain(TEXTS[0]).input_ids
    info = load_tokenizer(directory)
    for tokenizer in (info.tokenizer, info.text.tokenizer):
        assert (tokenizer.truncation, tokenizer.padding) == (None, None)
        assert tokenizer.encode(TEXTS[0]).ids == plain(TEXTS[0]).input_ids


def test_an_encoder_that_truncates_all_the_same_is_refused(tmp_path: Path) -> None:
    text = load_tokenizer(make_tokenizer("byte_level", TEXTS, tmp_path)).text
    text.tokenizer.enable_truncation(8)
    with pytest.raises(DataError, match="truncates or pads a text"):
        text.encode(TEXTS[0])
    text.tokenizer.no_truncation()
    text.tokenizer.enable_padding(length=1000)
    with pytest.raises(DataError, match="truncates or pads a text"):
        text.encode(TEXTS[0])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("byte_level", {}),
        ("llama_2", {"tokenizer_class": "LlamaTokenizerFast"}),
        ("llama_2", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}),
        ("llama_2", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}),
        ("llama_2", {"tokenizer_class": "CodeLlamaTokenizer"}),
        ("sentencepiece_bpe", {"tokenizer_class": "GemmaTokenizer"}),
        ("sentencepiece_bpe", {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": False}),
        ("byte_level", {"tokenizer_class": "CohereTokenizer"}),
        ("byte_level", {"tokenizer_class": "GPTNeoXTokenizer"}),
        ("byte_level", {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}),
    ],
)
def test_bos_is_what_transformers_puts_before_a_text(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    directory = make_tokenizer(kind, TEXTS, tmp_path, **config)
    plain = AutoTokenizer.from_pretrained(directory)
    bare = plain("abc", add_special_tokens=False).input_ids
    whole = plain("abc").input_ids
    assert list(load_tokenizer(directory).bos) == whole[: whole.index(bare[0])]


def test_add_bos_of_the_recipe_overrides_the_tokenizer(tmp_path: Path) -> None:
    with_bos = make_tokenizer("unigram", TEXTS, tmp_path / "with")
    without = make_tokenizer("byte_level", TEXTS, tmp_path / "without", tokenizer_class="GPTNeoXTokenizer")
    for number, (directory, option, count) in enumerate(
        ((with_bos, "false", 0), (with_bos, "true", 24), (without, "auto", 0), (without, "true", 24))
    ):
        root = tmp_path / f"{number}"
        manifest, ids = prepared(root, directory, TEXTS, f"tokenizer.add_bos={option}")
        assert ids.count(1) == count
        assert manifest.bos == ((1,) if count else ())
    nameless = make_tokenizer("unigram", TEXTS, tmp_path / "nameless", bos_token=None)
    content = json.loads((nameless / "tokenizer.json").read_text(encoding="utf-8"))
    (nameless / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.add_bos is true, and .*nameless names no BOS token"):
        prepared(tmp_path / "data", nameless, TEXTS, "tokenizer.add_bos=true")


def test_parts_of_a_long_document_give_the_ids_of_the_whole(kind_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_documents, "PART_CHARS", 1500)
    source = np.random.default_rng(0)
    joints = [
        " ",
        "  ",
        "\n",
        "\n\n",
        ", ",
        ".\n",
        " (",
        ")\t",
        "'s ",
        "-",
        "!\n\n\n",
        " 12",
        "e\u0301 ",
        "漢字。",
        "</s>",
    ]
    text = "".join(word + str(source.choice(joints)) for word in " ".join(TEXTS * 10).split(" "))
    cutter, dropped = DocumentCutter(load_tokenizer(kind_dir).text.tokenizer), Dropped()
    parts = list(cutter.parts(text, dropped))
    plain = AutoTokenizer.from_pretrained(kind_dir, split_special_tokens=True)
    ordinary = load_tokenizer(kind_dir).text
    whole = ordinary.encode(text)
    spaced = text.replace("</s>", "|")
    assert ordinary.encode(spaced) == plain(spaced, add_special_tokens=False).input_ids
    assert len(parts) > 30
    assert [token for part in parts for token in ordinary.encode(part.text)] == whole
    assert dropped == Dropped()
    assert [part.opens for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.closes for part in parts] == [False] * (len(parts) - 1) + [True]


def test_cuts_that_may_change_a_token_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_documents, "PART_CHARS", 1000)
    directory = make_tokenizer("byte_level", TEXTS, tmp_path / "tokenizer")
    manifest, ids = prepared(tmp_path / "data", directory, [*TEXTS, "ab" * 2500])
    assert manifest.domains["d"].dropped.unproven_cuts == 4
    assert (ids.count(1), ids.count(2)) == (25, 25)


def test_a_long_document_is_prepared_as_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tokenizer("llama_2", TEXTS, tmp_path / "tokenizer")
    texts = [" ".join(TEXTS), *TEXTS, "\n".join(TEXTS)]
    _, whole = prepared(tmp_path / "whole", directory, texts)
    monkeypatch.setattr(long_documents, "PART_CHARS", 400)
    monkeypatch.setattr("ddk_ds.data.reading.BATCH_BYTES", 900)
    monkeypatch.setattr("ddk_ds.data.reading.PART_SECONDS", 0.0)
    _, in_parts = prepared(tmp_path / "parts", directory, texts)
    assert in_parts == whole
    calls = 0
    encode = TextEncoder.__call__

    def interrupted(self: TextEncoder, parts: list[Part]) -> Encoded:
        nonlocal calls
        calls += 1
        if calls == 4:
            assert not parts[0].opens and not parts[-1].closes, "in the middle of the long document"
            raise KeyboardInterrupt
        return encode(self, parts)

    monkeypatch.setattr(TextEncoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "again", directory, [TEXTS[0] + "!", *texts])
    _, again = prepared(tmp_path / "again", directory, [TEXTS[0] + "!", *texts])
    _, fresh = prepared(tmp_path / "fresh", directory, [TEXTS[0] + "!", *texts])
    assert again == fresh
