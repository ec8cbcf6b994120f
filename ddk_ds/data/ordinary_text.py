"""Text as ordinary text: no text gives a control token, for any kind of tokenizer.

A control token has a meaning of its own: an end of text, a beginning, padding, a turn of a chat. Text can spell one.
tokenizers then leaves it to the model with `encode_special_tokens`; a byte-level BPE splits it, but Unigram finds it
among its pieces, and WordLevel, WordPiece and a BPE with `ignore_merges` among their words. Here the model knows
control tokens by names that no text has, so it cannot find them. SentencePiece treats its control pieces alike.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ddk_ds.errors import DataError


@dataclass(frozen=True)
class OrdinaryText:
    """An encoder of text; `controls` are the ids that no text gives, `spelling` finds control tokens that it spells."""

    tokenizer: Tokenizer
    controls: frozenset[int]
    spelling: re.Pattern[str] | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added."""
        return self.encode_all([text])[0][0]

    def encode_all(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the ids of each text, with nothing added, and the number of control tokens that were not taken over.

        Such a token is split into ordinary tokens, or dropped where the model has no other for it.

        Raises:
            DataError: the tokenizer cannot encode a text, or leaves part of it out.
        """
        try:
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"the tokenizer cannot encode a text: {error}; repair its tokenizer.json") from error
        found = sum(len(self.spelling.findall(text)) for text in texts) if self.spelling else 0
        ids = []
        for encoding in encodings:
            if encoding.overflowing or 0 in encoding.attention_mask:
                raise DataError("the tokenizer truncates or pads a text; remove both from its tokenizer.json")
            ids.append(encoding.ids)
            if not self.controls.isdisjoint(ids[-1]):
                ids[-1] = [token for token in encoding.ids if token not in self.controls]
                found += len(encoding.ids) - len(ids[-1])
        return ids, found


def ordinary_text(path: Path, vocab: Mapping[str, int], named: Collection[str]) -> OrdinaryText:
    """Return the encoder of the tokenizer in the file `path`, whose `vocab` maps token to id.

    Control tokens are the added tokens that the file calls special, and those `named`. The unknown token is none: it
    is what unknown text gives.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    special = {token["content"] for token in content.get("added_tokens") or () if token["special"]}
    controls = {*named, *special - {_unknown(content["model"])}}
    hidden = {token: f"\U000fffff{hashlib.sha256(token.encode()).hexdigest()}" for token in controls}
    for token in content.get("added_tokens") or ():
        token["content"] = hidden.get(token["content"], token["content"])
    _hide(content["model"], hidden)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    longest_first = sorted(controls, key=lambda token: (-len(token), token))
    spelling = re.compile("|".join(map(re.escape, longest_first))) if controls else None
    return OrdinaryText(tokenizer, frozenset(vocab[token] for token in controls), spelling)


def _unknown(model: dict[str, Any]) -> str | None:
    """Return the token that unknown text gives."""
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _hide(model: dict[str, Any], hidden: dict[str, str]) -> None:
    """Give tokens of a model other names; a BPE also loses the merges that make them of text."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[hidden.get(token, token), score] for token, score in vocab]
    else:
        model["vocab"] = {hidden.get(token, token): number for token, number in vocab.items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        inner = len(model.get("continuing_subword_prefix") or "")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right] for left, right in pairs if hidden.keys().isdisjoint((left, right, left + right[inner:]))
        ]
