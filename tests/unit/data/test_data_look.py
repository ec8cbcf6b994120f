"""A look at data: a sample with its borders, the counts of each domain, and the page."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from ddk_ds.commands import adopt_command, look_command
from ddk_ds.data.data_facts import look, pieces
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import Packed, open_split
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.report.data_page import sample_html
from tests.terminal import Terminal
from tests.unit.data.token_shards import write_mds


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert look_command.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def with_two_documents(prepared: Path) -> tuple[int, Packed]:
    """Return a sample of `tree` in which a document ends and another begins, and its number."""
    split = open_split(LocalStore(prepared), "tree/train")
    found = ((number, split.packed(number)) for number in range(len(split)))
    return next((number, one) for number, one in found if one.lengths is not None and len(one.lengths) == 2)


def test_a_sample_is_its_documents(prepared: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number, packed = with_two_documents(prepared)
    assert packed.lengths is not None
    out = shown(capsys, prepared, "--domain", "tree", "--sample", number)
    assert "\x1b" not in out, "no terminal, no colours"
    decode = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).decode
    begin = 0
    for document, length in enumerate(packed.lengths.tolist(), 1):
        text = decode(packed.tokens[begin : begin + length].tolist(), skip_special_tokens=False)
        assert f"── document {document}: tokens {begin} to {begin + length - 1} ──\n{text}" in out
        begin += length
    assert f"tree, train, sample {number}: 32 tokens, 2 documents" in out
    held_out = shown(capsys, prepared, "--domain", "tree", "--sample", 0, "--split", "validation")
    assert "tree, validation, sample 0" in held_out
    assert shown(capsys, prepared, "--sample", "random", "--seed", 4) == shown(
        capsys, prepared, "--sample", "random", "--seed", 4
    )


COLOURED = ("\x1b[36m── document 1: ", "\x1b[1;35m<|endoftext|>")


def test_colours_can_be_asked_for(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [prepared, "--domain", "tree", "--sample", with_two_documents(prepared)[0]]
    plain, coloured = shown(capsys, *options), shown(capsys, *options, "--color")
    assert all(part in coloured for part in COLOURED) and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


@pytest.mark.long("a process that imports streaming, in a terminal of its own; the colours are tested without one")
def test_colours_are_a_terminals(prepared: Path) -> None:
    command = [sys.executable, "-c", "import sys; from ddk_ds.commands.look_command import main; sys.exit(main())"]
    options = [str(prepared), "--domain", "tree", "--sample", str(with_two_documents(prepared)[0])]
    terminal = Terminal([*command, *options], columns=100, env={**os.environ, "TERM": "xterm-256color"})
    try:
        assert terminal.code() == 0
    finally:
        terminal.close()
    raw = terminal._output.decode()
    assert all(part in raw for part in COLOURED), raw


def test_the_counts_are_those_of_all_samples(prepared: Path, tokenizer_dir: Path) -> None:
    """Counted again by hand from what the reader gives."""
    info, store, manifest = load_tokenizer(tokenizer_dir), LocalStore(prepared), load_manifest(prepared)
    facts = look(store, manifest, "large", "train", info, examples=10)
    opened = open_split(store, "large/train")
    samples = [opened.packed(number) for number in range(len(opened))]
    counts = Counter(number for sample in samples for number in sample.tokens.tolist())
    assert facts.tokens == 32 * len(opened) == sum(counts.values()) and facts.numbers.tolist() == list(
        range(len(opened))
    )
    assert dict(facts.top) == dict(counts.most_common(len(facts.top)))
    assert facts.lengths is not None
    assert facts.lengths.tolist() == [n for one in samples if one.lengths is not None for n in one.lengths.tolist()]
    assert facts.control == counts[manifest.eos_token_id] and facts.duplicates == facts.padding == facts.replaced == 0
    # The corpus is ASCII and the tokenizer of bytes: a token's name has a letter for each of its bytes.
    size = sum(len(token) * counts[number] for token, number in info.vocab.items() if number not in info.text.controls)
    assert facts.text_bytes == size and facts.bytes_per_token == size / (facts.tokens - facts.control)
    assert len(facts.examples) == 10 and all(
        np.array_equal(packed.tokens, samples[number].tokens) for number, packed in facts.examples
    )
    again = look(store, manifest, "large", "train", info, examples=10)
    assert [number for number, _ in again.examples] == [number for number, _ in facts.examples]


def test_huge_data_are_looked_at_in_part(tokenizer_dir: Path, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(2, 300, (200, 16))
    samples[1::2] = samples[::2]  # each is there twice
    write_mds(tmp_path / "web", samples, limit=1024)
    options = ["--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "out"), "--validation-samples", "8"]
    assert adopt_command.main([str(tmp_path / "web"), *options]) == 0
    info, store, manifest = load_tokenizer(tokenizer_dir), LocalStore(tmp_path / "out"), load_manifest(tmp_path / "out")
    facts = look(store, manifest, "web", "train", info, examples=2, most_tokens=50 * 16)
    assert facts.samples == 192 and len(facts.numbers) <= 50 and facts.shards > 8 and facts.shards_read == 8
    assert facts.lengths is None and facts.padding == 0
    whole = look(store, manifest, "web", "train", info, examples=2)
    assert (len(whole.numbers), whole.shards_read, whole.duplicates) == (192, whole.shards, 96)


def test_bytes_that_are_no_text_are_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The byte 0xFF is no UTF-8: at a sample's end it could be a cut character, inside it is none."""
    info = load_tokenizer(tokenizer_dir)
    byte, letter = info.vocab["ÿ"], info.vocab["a"]
    write_mds(tmp_path / "web", [[byte, letter, byte, letter, letter, byte, byte, byte]] * 4)
    options = ["--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "out"), "--validation-samples", "1"]
    assert adopt_command.main([str(tmp_path / "web"), *options]) == 0
    facts = look(LocalStore(tmp_path / "out"), load_manifest(tmp_path / "out"), "web", "train", info, examples=0)
    assert (facts.replaced, facts.characters, facts.duplicates) == (3, 24, 2)


def test_the_page_has_what_a_week_depends_on(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, prepared, "--html", tmp_path / "data.html")
    assert all(name in out for name in ("small", "tree", "large"))
    page = (tmp_path / "data.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    manifest = load_manifest(prepared)
    for name, domain in manifest.domains.items():
        assert f"{domain.train.tokens:,}" in text and f"Samples of {name}" in text
        assert page.count(f'id="samples_{name}"') == 1
    assert page.count('<div class="sample long">') == 3 * 10 and "<mark>&lt;|endoftext|&gt;</mark>" in page
    assert page.count("<hr>") > 0 and page.count("data:image/svg+xml") == 3
    assert "<script" not in page and "default-src 'none'" in page, "it needs no network, and runs nothing"


def test_what_cannot_be_looked_at_is_named(
    prepared: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    content = json.loads((copy / "domains.json").read_text())
    content["tokenizer"].pop("path")
    (copy / "domains.json").write_text(json.dumps(content))
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"<|endoftext|>"', '"<|end|>"')
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (other / name).write_text((other / name).read_text().replace("<|endoftext|>", "<|end|>"))
    for arguments, message in (
        ((copy,), "is not named by domains.json: give its directory by --tokenizer"),
        ((copy, "--tokenizer", other), "is another tokenizer than that of"),
        ((prepared, "--domain", "web"), "no domain 'web'"),
        ((prepared, "--sample", "9999"), "small has samples 0 to"),
        ((prepared, "--html", tmp_path / "none/x.html"), "cannot be written"),
    ):
        assert look_command.main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err
    assert shown(capsys, copy, "--tokenizer", tokenizer_dir)


def test_pieces_join_to_the_sample(tokenizer_dir: Path) -> None:
    info = load_tokenizer(tokenizer_dir)
    eos = info.eos_token_id
    assert eos is not None
    ids = np.array([*info.text.encode("one two"), eos, *info.text.encode("three"), eos], np.uint16)
    first = len(info.text.encode("one two")) + 1
    found = list(pieces(Packed(ids, np.array([first, len(ids) - first])), info))
    assert [(one.text, one.document, one.control) for one in found] == [
        ("one two", 0, False),
        ("<|endoftext|>", 0, True),
        ("three", 1, False),
        ("<|endoftext|>", 1, True),
    ]
    assert all(one.target for one in found)
    targets = np.arange(len(ids)) >= first  # those of the second document
    sample = Packed(ids, None, targets)
    assert [one.target for one in pieces(sample, info)] == [False, False, True, True]
    pale = sample_html(sample, info)
    assert pale.startswith("<small>one two</small><small><mark>") and pale.endswith(
        "three<mark>&lt;|endoftext|&gt;</mark>"
    )
    styled = look_command.shown(sample, info)
    assert [(styled.plain[span.start : span.end], span.style) for span in styled.spans if "dim" in str(span.style)] == [
        ("one two", "dim"),
        ("<|endoftext|>", "bold magenta dim"),
    ]
