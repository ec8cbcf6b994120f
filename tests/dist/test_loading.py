"""Sharded loading: the weights arrive where they belong, and no rank ever holds a whole model."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks
from tests.dist.tiny import VOCAB, save_model

SLACK_BYTES = 24 * 2**20  # allocator and buffers; the model has 12 times as much


def test_architectures_tied_and_untied(tmp_path: Path) -> None:
    errors = run_ranks("tests.dist.loading_worker:logits_of_architectures", 2, folder=str(tmp_path))
    assert len(errors) == 12
    assert max(errors.values()) < 1e-5, errors


def test_buffers_keep_their_precision(tmp_path: Path) -> None:
    # Rotary frequencies in bf16 would be wrong by whole turns at long positions.
    save_model(tmp_path / "teacher", vocab=VOCAB, tied=True, seed=1)
    assert run_ranks("tests.dist.loading_worker:differing_buffers", 2, folder=str(tmp_path)) == []


def test_a_rank_holds_its_shards_and_one_tensor(tmp_path: Path) -> None:
    # Written here, so that no rank's memory has held a whole model; many equal tensors.
    shape = {"num_hidden_layers": 24, "intermediate_size": 2048, "num_key_value_heads": 4}
    save_model(tmp_path / "small", vocab=VOCAB, tied=True, seed=1)
    save_model(tmp_path / "teacher", hidden=512, vocab=VOCAB, tied=True, seed=1, **shape)
    for rank in run_ranks("tests.dist.loading_worker:peak_memory", 2, folder=str(tmp_path)):
        bound = rank["total"] // 2 + rank["largest"] + SLACK_BYTES
        assert rank["total"] > 10 * SLACK_BYTES, "the model is too small to tell"
        assert rank["grown"] < bound, rank
