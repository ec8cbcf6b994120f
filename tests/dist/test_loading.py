"""Sharded loading: the weights arrive where they belong, and no rank ever holds a whole model."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks

SLACK_BYTES = 24 * 2**20  # allocator and buffers; the model has 12 times as much


def test_architectures_tied_and_untied(tmp_path: Path) -> None:
    errors = run_ranks("tests.dist.loading_worker:logits_of_architectures", 2, folder=str(tmp_path))
    assert len(errors) == 12
    assert max(errors.values()) < 1e-5, errors


def test_a_rank_holds_its_shards_and_one_tensor(tmp_path: Path) -> None:
    for rank in run_ranks("tests.dist.loading_worker:peak_memory", 2, folder=str(tmp_path)):
        bound = rank["total"] // 2 + rank["largest"] + SLACK_BYTES
        assert rank["total"] > 10 * SLACK_BYTES, "the model is too small to tell"
        assert rank["grown"] < bound, rank
