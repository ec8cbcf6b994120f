"""`ddk tokenizer --convert`: the tokens are those of sentencepiece and tiktoken themselves, or it is refused."""

from __future__ import annotations

import base64
import importlib.util
import json
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ddk_ds.commands.tokenizer_command import main
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import DataError

TEXTS = [
    "def f(x):\n    return  x + 1  # tabs\tand   spaces",
    "Größe, naïve, 北京大学 2024年, Москва, العربية, 😀👩‍👩‍👧",
    "  12,345.678 != 1e-9;\r\n\n  if a<b: pass",
    "it's the end\u3000of\u200bit ﬁ ① e\u0301 ",
]
PATTERN = r"'(?:s|t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def write_ranks(file: Path) -> dict[bytes, int]:
    """Write ranks as tiktoken reads them: all bytes, then letters that a text is likely to join."""
    tokens = [bytes([number]) for number in range(256)]
    for first in (b" ", b"\n", b"", b"0"):
        tokens += [first + letter.encode() for letter in (string.ascii_lowercase if first != b"0" else string.digits)]
    tokens += [
        b"th",
        b"the",
        b" the",
        b"re",
        b"ret",
        b"turn",
        b"urn",
        b"tu",
        b"  ",
        b"    ",
        "北".encode()[:2],
        "北".encode(),
    ]
    ranks = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    file.write_text("".join(f"{base64.b64encode(token).decode()} {number}\n" for token, number in ranks.items()))
    return ranks


def test_an_original_alone_names_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, package in (("tokenizer.model", "sentencepiece"), ("qwen.tiktoken", "tiktoken")):
        model = tmp_path / package
        model.mkdir()
        (model / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
        if package == "tiktoken":
            write_ranks(model / name)
        with pytest.raises(DataError, match=rf"{name} and no tokenizer\.json: `ddk tokenizer --convert .*{package}` "):
            load_tokenizer(model)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda _name: None)
            text = error_of(capsys, "--convert", str(model))
        assert f"{name} is read by {package}: pip install {package}" in text
        assert not (model / "tokenizer.json").exists()
    (tmp_path / "empty").mkdir()
    assert "holds neither a SentencePiece model nor" in error_of(capsys, "--convert", str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    sentencepiece: Any = pytest.importorskip("sentencepiece", reason="pip install -e '.[convert]'")
    model = tmp_path / "model"
    model.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *(f"the return of {number} words" for number in range(200))]),
        model_prefix=str(model / "tokenizer"),
        **{"model_type": kind, "vocab_size": 420, "byte_fallback": True, "hard_vocab_limit": False},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2},
    )
    (model / "tokenizer.vocab").unlink()
    if main(["--convert", str(model)]) == 2:  # transformers has no conversion that is right for every kind
        text = capsys.readouterr().err
        assert kind == "unigram" and "no conversion of tokenizer.model gives the tokens of sentencepiece" in text
        assert not (model / "tokenizer.json").exists()
        return
    original = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    info = load_tokenizer(model)
    for text in TEXTS:
        assert info.tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text)
    assert (info.eos_token_id, info.vocab["<s>"], info.bos) == (original.eos_id(), original.bos_id(), ())
    capsys.readouterr()
    assert "already holds a tokenizer" in error_of(capsys, "--convert", str(model))


def test_a_model_that_no_conversion_fits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentencepiece: Any = pytest.importorskip("sentencepiece", reason="pip install -e '.[convert]'")
    lines = (f"the return of {number} words" for number in range(200))
    options = {"model_type": "word", "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(tmp_path / "m"), **options)
    text = error_of(capsys, "--convert", str(tmp_path))
    assert "no conversion of m.model gives the tokens of sentencepiece" in text
    assert not (tmp_path / "tokenizer.json").exists()


def test_ranks_of_tiktoken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiktoken: Any = pytest.importorskip("tiktoken", reason="pip install -e '.[convert]'")
    ranks = write_ranks(tmp_path / "own.tiktoken")
    assert "give that regular expression by --pattern" in error_of(capsys, "--convert", str(tmp_path))
    end, size = "<|end|>", len(ranks)
    config = {"eos_token": end, "added_tokens_decoder": {str(size): {"content": end, "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["--convert", str(tmp_path), "--pattern", PATTERN]) == 0
    original = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={end: size})
    info = load_tokenizer(tmp_path)
    assert info.eos_token_id == size
    for text in TEXTS:
        assert info.tokenizer.encode(text).ids == original.encode_ordinary(text)
        assert Tokenizer.from_file(str(info.path)).encode(text + end).ids == [*original.encode_ordinary(text), size]


def test_the_directorys_own_code_knows_the_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiktoken: Any = pytest.importorskip("tiktoken", reason="pip install -e '.[convert]'")
    ranks = write_ranks(tmp_path / "own.tiktoken")
    code = f"""
import os
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizer
class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "own.tiktoken"}}
    def __init__(self, vocab_file, **more):
        ranks = load_tiktoken_bpe(vocab_file)
        special = {{"<|end|>": len(ranks)}}
        self.own = tiktoken.Encoding("own", pat_str={PATTERN!r}, mergeable_ranks=ranks, special_tokens=special)
        super().__init__(**more)
    @property
    def vocab_size(self):
        return self.own.n_vocab
    def get_vocab(self):
        return {{"<|end|>": self.own.n_vocab - 1}}
    def _convert_token_to_id(self, token):
        return 0
"""
    (tmp_path / "tokenization_own.py").write_text(code)
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "permit it by --trust-remote-code" in error_of(capsys, "--convert", str(tmp_path))
    assert main(["--convert", str(tmp_path), "--trust-remote-code"]) == 0
    original = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    info = load_tokenizer(tmp_path)
    assert info.vocab["<|end|>"] == len(ranks)
    assert [info.tokenizer.encode(text).ids for text in TEXTS] == [original.encode_ordinary(text) for text in TEXTS]
