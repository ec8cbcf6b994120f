"""Which models' attention can be split over ranks."""

from __future__ import annotations

from typing import Any

import pytest

from ddk_ds.engine.sequence_parallel import check_sequence_parallel
from ddk_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "kernel", "ranks", "words"),
    [
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, "sdpa", 4, ""),
        ({"num_attention_heads": 12}, "flash_attention_2", 3, ""),
        ({"num_attention_heads": 16, "num_key_value_heads": 2}, "sdpa", 8, ""),  # heads of keys are repeated
        ({"num_attention_heads": 16, "num_key_value_heads": 1}, "sdpa", 4, ""),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, "sdpa", 8, "has 12 attention heads and 4 of keys"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, "sdpa", 6, "has 12 attention heads and 4 of keys"),
        ({"num_attention_heads": 12}, "eager", 2, "computed by eager"),
        ({"state_size": 16}, "sdpa", 2, "names no number of attention heads"),
        ({"state_size": 16}, "eager", 1, ""),
    ],
)
def test_heads_are_divided(config: dict[str, Any], kernel: str, ranks: int, words: str) -> None:
    if not words:
        check_sequence_parallel(config, "student", kernel, ranks)
        return
    with pytest.raises(ConfigError, match=f"train.sequence_parallel is {ranks}, but .*{words}"):
        check_sequence_parallel(config, "student", kernel, ranks)
