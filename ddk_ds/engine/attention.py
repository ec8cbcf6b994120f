"""The causal mask that packed samples need no tensor for.

A sample is one run of tokens at positions 0, 1, 2, ...: attention is plainly causal. transformers, called without a
mask, suspects sequences packed with positions that begin anew, and makes a (B, 1, L, L) mask that rules them out. With
a mask torch's flash kernel cannot serve, and the whole square of scores is computed instead of half.
"""

from __future__ import annotations

from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_KEY = "sdpa"
_with_tensor = ALL_MASK_ATTENTION_FUNCTIONS[_KEY]


def _mask(*arguments: Any, **given: Any) -> Any:
    """None, which is sdpa's own causal mask, where no token is padding, cached or outside a window."""
    queries = given["q_length"] if "q_length" in given else len(given["cache_position"])
    window = given.get("local_size")
    plain = (
        given.get("attention_mask") is None
        and queries == given["kv_length"]
        and (window is None or given["kv_length"] < window)
        and not getattr(given.get("config"), "use_bidirectional_attention", False)
    )
    return None if plain else _with_tensor(*arguments, **given)


def use_causal_kernels() -> None:
    """From here on models of this process whose attention is sdpa get a mask only where they need one."""
    ALL_MASK_ATTENTION_FUNCTIONS[_KEY] = _mask
