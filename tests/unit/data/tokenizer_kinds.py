"""A small tokenizer of each kind, with `<s>` and `</s>` as control tokens that its model has among its words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTROLS = ["<unk>", "<s>", "</s>"]
KINDS = (
    *("byte_level", "qwen", "deepseek", "ignore_merges"),
    *("llama_2", "sentencepiece_bpe", "unigram", "wordpiece", "wordlevel"),
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The borders of words in Qwen 2.5, and with up to three digits in Llama 3 and GPT-4."""


def make_tokenizer(kind: str, texts: Sequence[str], directory: Path, **config: Any) -> Path:
    """Train a tokenizer of a kind on texts, and write it as transformers does; `config` is of tokenizer_config.json."""
    tokenizer = _trained(kind, texts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if kind == "ignore_merges":
        content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"]["ignore_merges"] = True
        (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    return directory


def _trained(kind: str, texts: Sequence[str]) -> Tokenizer:
    if kind in ("byte_level", "qwen", "deepseek", "ignore_merges"):
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        split = pre_tokenizers.Split
        splitters: list[Any] = {
            "byte_level": [],
            "qwen": [split(Regex(QWEN), "isolated")],
            "deepseek": [
                *(split(Regex(rule), "isolated") for rule in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+")),
                pre_tokenizers.Digits(individual_digits=True),
            ],
            # No borders at punctuation, so that a word can be a control token.
            "ignore_merges": [pre_tokenizers.WhitespaceSplit()],
        }[kind]
        splitters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "byte_level"))
        if kind == "qwen":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
        tokenizer.decoder = decoders.ByteLevel()
        trained = trainer(
            vocab_size=500,
            special_tokens=CONTROLS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind in ("llama_2", "sentencepiece_bpe"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        # Trained on words, used on whole texts: as Llama's, whose file has no pre-tokenizer.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        trained = trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROLS, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trained = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=CONTROLS, unk_token="<unk>", show_progress=False
        )
    else:
        model, trainer = {
            "wordpiece": (models.WordPiece, trainers.WordPieceTrainer),
            "wordlevel": (models.WordLevel, trainers.WordLevelTrainer),
        }[kind]
        tokenizer = Tokenizer(model(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trained = trainer(vocab_size=400, special_tokens=CONTROLS, show_progress=False)
    tokenizer.train_from_iterator(texts, trained)
    if kind == "llama_2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    return tokenizer
