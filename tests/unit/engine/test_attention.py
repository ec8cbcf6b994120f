"""Attention has no mask where it is simply causal and transformers' own mask elsewhere, with the same results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ddk_ds.engine.attention_masks import use_own_masks

LENGTH = 24
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def _own_masks() -> Iterator[None]:
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    yield
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = before


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """The masks that torch's attention is called with, one for each call."""
    seen: list[torch.Tensor | None] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(options["attn_mask"])
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return seen


def model_of(kind: str, **values: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **values), attn_implementation="sdpa")


WINDOW = {"sliding_window": 8}
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {}, 0),
    ("qwen2", {}, 0),
    ("mistral", {"sliding_window": LENGTH + 1}, 0),
    ("mistral", WINDOW, 2),
    ("gemma3_text", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}, 1),
]


@pytest.mark.parametrize(("kind", "values", "with_mask"), KINDS)
def test_the_same_logits_with_a_mask_only_where_a_window_needs_it(
    kind: str, values: dict[str, Any], with_mask: int, masks: list[torch.Tensor | None]
) -> None:
    model, ids = model_of(kind, **values), torch.randint(50, (3, LENGTH))
    before = model(ids, use_cache=False).logits
    masks.clear()
    use_own_masks()
    after = model(ids, use_cache=False).logits
    assert sum(mask is not None for mask in masks) == with_mask
    assert all(mask is None or mask.is_floating_point() for mask in masks), "it would be converted in each layer"
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_padding_and_generation_keep_their_masks(masks: list[torch.Tensor | None]) -> None:
    model, ids = model_of("llama").eval(), torch.randint(50, (2, 6))
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    before = model(ids, attention_mask=padded).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    masks.clear()
    use_own_masks()
    use_own_masks()  # as for a second model
    after = model(ids, attention_mask=padded).logits
    assert all(mask is not None for mask in masks)
    torch.testing.assert_close(after, before[0])
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before[1])
