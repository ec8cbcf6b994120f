"""A rank that ends, however it ends, leaves no shared memory behind: its names are gone while it runs."""

from __future__ import annotations

from tests.dist.ranks import run_ranks


def test_no_name_is_left_in_shared_memory() -> None:
    total, names, mapped = run_ranks("tests.dist.runtime_worker:shared_memory", 2)
    assert total == 3.0
    assert not names
    assert mapped  # DeepSpeed does use it here: without, there would be nothing to leave
