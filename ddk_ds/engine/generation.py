"""Text that a model on disk writes after prompts, by plain transformers on one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, GenerationConfig

from ddk_ds.data.tokenizer import added_before, continuation
from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError

_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Decoding:
    """The length of a continuation and the choice of its tokens."""

    max_new_tokens: int
    temperature: float | None = None
    """Temperature of sampling; None with `top_p` None: the likeliest token each time."""
    top_p: float | None = None
    """Share of probability that the likeliest tokens have from which one is drawn; None: all tokens."""
    seed: int = 0
    chat: bool = False
    """True if a prompt is a user's message in the form of the tokenizer's chat template."""

    def config(self, model: Any) -> GenerationConfig:
        """Return transformers' options: these, and of the model's own only its special tokens."""
        own = model.generation_config
        ids = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if ids["pad_token_id"] is None:  # one prompt at a time needs no padding; transformers warns without it
            ends = ids["eos_token_id"]
            ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature is not None or self.top_p is not None:
            options |= {
                "do_sample": True,
                "temperature": self.temperature or 1.0,
                "top_p": self.top_p or 1.0,
                "top_k": 0,
            }
        return GenerationConfig(**options, **ids)


def continue_prompts(
    directory: Path,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: str,
    trusted: bool,
) -> list[str]:
    """Return the text with which the model in `directory` continues each prompt.

    `trusted` permits Python code of the model's own directory. Raises ConfigError if the model cannot be loaded, has no
    chat template that is asked for, or has too few positions for a prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    if decoding.chat and not tokenizer.chat_template:
        raise ConfigError(
            f"--chat: the tokenizer of {directory} has no chat template, as that of a base model: leave it out"
        )
    model = load_model(directory, dtype, trusted=trusted).to(device)
    encoded = [_encode(tokenizer, prompt, decoding.chat) for prompt in prompts]
    positions = next((value for key in _POSITIONS if (value := getattr(model.config, key, None))), None)
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise ConfigError(f"prompt {number} is empty: give at least a word")
        if positions is not None and len(ids) + decoding.max_new_tokens > positions:
            raise ConfigError(
                f"prompt {number} has {len(ids)} tokens and --max-new-tokens is {decoding.max_new_tokens}, together "
                f"more than the {positions} positions of {directory}: shorten the prompt, or lower --max-new-tokens"
            )
    model.generation_config = decoding.config(model)
    decode: Any = partial(tokenizer.decode, skip_special_tokens=True)
    torch.manual_seed(decoding.seed)
    return [continuation(decode, ids, _generate(model, ids)) for ids in encoded]


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        ids = list(tokenizer(prompt, add_special_tokens=False).input_ids)
        return [*added_before(tokenizer.encode), *ids] if ids else []  # and not what it adds after a text
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)  # the template has them


def _generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return list(new[0, len(prompt) :].tolist())
