"""A model's files mean the same to transformers 4.57 and 5, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig

from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.whole_models import make_random_model
from ddk_ds.errors import ConfigError
from tests.unit.data.tokenizer_kinds import make_tokenizer

THETA = 5e5
SHAPE = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OLD = int(transformers.__version__.partition(".")[0]) < 5


def frequency(directory: Path) -> float:
    config = AutoConfig.from_pretrained(directory)
    return float(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"])


def test_rotary_frequencies_are_given_to_both(tmp_path: Path) -> None:
    # transformers 5 writes rope_parameters alone, for which 4.57 takes its own frequencies in silence.
    tokenizer = make_tokenizer("byte_level", ["some text"] * 50, tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "rope_theta": THETA}))
    make_random_model(tmp_path / "config.json", tokenizer, tmp_path / "model", seed=1)
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert written["rope_theta"] == THETA
    assert frequency(tmp_path / "model") == THETA
    read_model(tmp_path / "model", "student.path")

    del written["rope_theta"]
    written["rope_parameters"] = {"rope_theta": THETA, "rope_type": "default"}
    (tmp_path / "model/config.json").write_text(json.dumps(written))
    if OLD:
        assert frequency(tmp_path / "model") != THETA
        with pytest.raises(ConfigError, match=r"student\.path: .*rope_parameters.*install transformers 5"):
            read_model(tmp_path / "model", "student.path")
    else:
        assert frequency(tmp_path / "model") == THETA
        read_model(tmp_path / "model", "student.path")
