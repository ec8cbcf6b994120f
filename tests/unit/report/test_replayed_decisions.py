"""A run's decisions come out equal when they are taken again; tests/dist/test_monitoring.py replays a real run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.config import Mixture
from ddk_ds.errors import CheckpointError, DataError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller, decide
from ddk_ds.mixture.exhaustion import due_samples, largest_remainder
from ddk_ds.report.replayed_decisions import (
    RecordedDecision,
    RecordedRun,
    decide_otherwise,
    read_recorded_run,
    replay,
    replay_json,
)
from tests.unit.report.made_run import make_run

SIZES = {"python": 1000, "cpp": 2000, "mathematics": 500}


def controller(**options: Any) -> Controller:
    return make_controller(Mixture.model_validate(options), SIZES)


def recorded(count: int = 4, **options: Any) -> list[RecordedDecision]:
    """Decisions as a run's ledger holds them."""
    rng, last, entries, owed = np.random.default_rng(0), None, [], np.zeros(3)
    for number in range(count):
        student, teacher = rng.uniform(10, 30, 3), rng.uniform(5, 10, 3)
        training = [rng.uniform(2, 3, 3).tolist(), rng.uniform(0, 1, 3).tolist()]
        tokens = (700 * number, 0, 900 * number)
        known: Any = {"step": 10 * number, "tokens": sum(tokens), "training": training}
        last = decide(controller(**options), last, student, teacher, interval=number, **known)
        asked = tuple(largest_remainder(last.proportions, 160, owed).tolist())
        owed = due_samples(last.proportions, 160, owed) - asked
        still = tuple(owed.tolist())
        entries.append(
            RecordedDecision(number, 10 * number, student, teacher, last, asked, asked, still, tokens, training)
        )
    return entries


def test_a_runs_own_decisions_come_out_equal() -> None:
    found = replay(controller(), recorded())
    assert (found.num_replayed, found.unequal) == (4, [])


@pytest.mark.parametrize("source", ["held_out", "training"])
@pytest.mark.parametrize("kind", ["ado", "odm", "kl_gap"])
def test_decisions_with_a_memory_or_of_training_come_out_equal(kind: str, source: str) -> None:
    options = {"controller": kind, "source": source}
    options |= {"measure": "kl"} if (kind, source) == ("kl_gap", "training") else {}
    entries = recorded(6, **options)
    assert replay(controller(**options), entries).unequal == []
    assert entries[5].decision != recorded(5, **options)[4].decision
    if source == "training":
        means: Any = [row[::-1] for row in entries[4].training or ()]
        changed = [*entries[:4], replace(entries[4], training=means), entries[5]]
        assert replay(controller(**options), changed).unequal == ([4, 5] if kind == "ado" else [4])[:1]
    if kind != "kl_gap":
        with pytest.raises(DataError, match="kept controller None"):
            decide_otherwise(controller(**options), recorded(4)[1:])


def test_a_changed_measurement_or_number_of_samples_does_not() -> None:
    entries = recorded()
    entries[2] = replace(entries[2], student_ppl=entries[2].student_ppl * np.array([1, 1 + 1e-12, 1]))
    first, second, *others = entries[3].asked
    entries[3] = replace(entries[3], asked=(first + 1, second - 1, *others))
    assert replay(controller(), entries).unequal == [2, 3]


def test_what_is_owed_is_replayed_too() -> None:
    entries = recorded()
    first, *others = entries[1].owed
    entries[1] = replace(entries[1], owed=(first + 1.5, *others))
    assert replay(controller(), entries).unequal == [1, 2]  # interval 2 would have drawn more of the first domain
    entries = recorded()
    entries[2] = replace(entries[2], counts=tuple(np.roll(entries[2].counts, 1).tolist()), owed=(0.0, 0.0, 0.0))
    assert replay(controller(), entries).unequal == [3]  # a domain at its cap: the ledger does not know the limit


def test_a_fork_begins_with_the_recorded_decision() -> None:
    entries = recorded()[1:]
    assert replay(controller(), entries).num_replayed == 2
    other = decide_otherwise(controller(alpha=0.0), entries)
    assert other[0] == entries[0].decision
    np.testing.assert_allclose(other[1].proportions, 1 / 3)


def test_a_ledger_of_an_older_version_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path, finished=False) / "ledger.jsonl"
    line = json.loads(made.read_text().splitlines()[0])
    (tmp_path / "ledger.jsonl").write_text(json.dumps({key: line[key] for key in line if key != "owed"}) + "\n")
    start = {"event": "start", "time_s": 1.0, "mixture": {"train_tokens": {"python": 1}, "schedule": None}}
    (tmp_path / "events.jsonl").write_text(json.dumps(start) + "\n")
    with pytest.raises(CheckpointError, match=r"what is owed: an older version wrote it"):
        read_recorded_run(tmp_path)


def test_json_has_both_decisions() -> None:
    entries = recorded()
    run = RecordedRun(list(SIZES), entries, SIZES, None)
    other = decide_otherwise(controller(alpha=0.0), entries)
    written = replay_json(run, replay(controller(), entries), other, ["alpha=0"])
    assert written["overrides"] == ["alpha=0"] and [row["step"] for row in written["intervals"]] == [0, 10, 20, 30]
    assert written["intervals"][1]["otherwise"].keys() == SIZES.keys()
