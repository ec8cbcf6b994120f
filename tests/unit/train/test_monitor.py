"""Lines of the ledger become events, which a thread hands to the monitors."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import make_config
from ddk_ds.engine.monitors import Event, _name_for_wandb
from ddk_ds.errors import ConfigError
from ddk_ds.train.ledger import MonitorFeed, events

STEP: dict[str, Any] = {
    "kind": "step",
    "step": 7,
    "loss": 2.5,
    "ce": 2.0,
    "kl": 0.5,
    "grad_norm": None,  # not finite
    "learning_rate": 1e-3,
    "method": {"mse": 0.25, "weights": [0.5, 0.5]},
    "clock": {
        "step_s": 0.5,
        "teacher_s": 0.1,
        "tokens_per_s": 100.0,
        "mfu": None,
        "peak_memory_gb": 1.5,
        "peak_gb": {"head": 1.5},
    },
}
INTERVAL: dict[str, Any] = {
    "kind": "interval",
    "step": 8,
    "student_ppl": {"a": 9.0, "b": 4.0},
    "teacher_ppl": None,
    "ratio": None,
    "proportions": {"a": 0.75, "b": 0.25},
    "domain_tokens": {"a": 30, "b": 10},
    "alarms": ["one"],
    "clock": {"measure_s": 2.0},
}


def test_a_step() -> None:
    assert {(event.name, event.value, event.step) for event in events(STEP)} == {
        ("loss/total", 2.5, 7),
        ("loss/ce", 2.0, 7),
        ("loss/kl", 0.5, 7),
        ("optimizer/learning_rate", 1e-3, 7),
        ("method/mse", 0.25, 7),
        ("time/step_s", 0.5, 7),
        ("time/teacher_s", 0.1, 7),
        ("speed/tokens_per_s", 100.0, 7),
        ("memory/peak_gb", 1.5, 7),
        ("memory/head_gb", 1.5, 7),
    }


def test_an_interval() -> None:
    found = {event.name: event.value for event in events(INTERVAL)}
    assert found == {
        "student_ppl/a": 9.0,
        "student_ppl/b": 4.0,
        "proportion/a": 0.75,
        "proportion/b": 0.25,
        "domain_tokens/a": 30,
        "domain_tokens/b": 10,
        "mixture/alarms": 1,
        "measurement/measure_s": 2.0,
    }


def test_continuations_are_texts() -> None:
    sample = {"name": "a", "prompt": "1 +", "student": " 1", "teacher": None}
    record = {"kind": "samples", "step": 5, "samples": [sample], "clock": {"samples_s": 1.0}}
    assert events(record) == [Event("samples/a", "prompt: 1 +\n\nstudent:  1", 5)]


def test_the_mean_ratio() -> None:
    found = {event.name: event.value for event in events({**INTERVAL, "ratio": {"a": 3.0, "b": 1.0}})}
    assert (found["ratio/a"], found["mixture/mean_ratio"]) == (3.0, 2.0)


def test_events_are_written_together() -> None:
    written: list[list[Event]] = []
    feed = MonitorFeed({"list": lambda batch: written.append(list(batch))}, 3600, pytest.fail)
    feed.add(STEP)
    feed.add(STEP)
    assert written == [], "before the time"
    feed.add(INTERVAL)
    feed.close()
    assert [len(batch) for batch in written] == [10 + 10 + 8]
    assert feed.take_seconds() > 0
    assert feed.take_seconds() == 0


def test_a_monitor_that_fails_ends_nothing_but_itself() -> None:
    warnings: list[str] = []
    written: list[int] = []

    def broken(batch: Sequence[Event]) -> None:
        raise OSError("disk full")

    feed = MonitorFeed({"csv": broken, "list": lambda batch: written.append(len(batch))}, 0, warnings.append)
    feed.add(STEP)
    while not written:
        time.sleep(0.001)
    feed.add(STEP)
    feed.close()
    assert written == [10, 10]
    assert warnings == ["warning: monitor csv failed and is left out from here on: disk full"]


def test_a_monitor_that_hangs_does_not_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_ds.train.ledger._LONGEST_CLOSE_S", 0.05)
    warnings: list[str] = []
    answer = threading.Event()
    feed = MonitorFeed({"far": lambda batch: answer.wait() and None}, 0, warnings.append)
    feed.add(STEP)
    feed.close()
    answer.set()
    assert warnings == ["warning: a monitor does not answer; its last numbers may be missing"]


def test_without_monitors_nothing_is_collected() -> None:
    feed = MonitorFeed({}, 0, pytest.fail)
    feed.add({})
    feed.close()
    assert feed.take_seconds() == 0


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ({"prometheus_file": "/run.txt"}, r"prometheus_file is /run.txt: .*\*.prom"),
        ({"wandb_entity": "us"}, "wandb_entity is us: set wandb_project"),
        ({"tensorbord": True}, r"did you mean monitor\.tensorboard\?"),
    ],
)
def test_a_wrong_section_is_refused(monitor: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"name": "run", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "d"}}
    with pytest.raises(ConfigError, match=message):
        make_config({**values, "stop": {"steps": 2000}, "monitor": monitor}, "run.yaml")


def test_a_run_keeps_its_name_in_wandb_and_another_run_at_its_place_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_id() -> str:
        for key in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME"):
            monkeypatch.delenv(key, raising=False)
        _name_for_wandb(tmp_path / "monitor", "run")
        return os.environ["WANDB_RUN_ID"]

    first = run_id()
    assert run_id() == first
    shutil.rmtree(tmp_path / "monitor")
    assert run_id() != first
