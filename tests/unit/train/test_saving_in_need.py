"""A run whose store does not answer is saved all the same, without waiting for the store once more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddk_ds.errors import TemporaryError
from ddk_ds.train import loop
from ddk_ds.train.run import Run


def test_a_store_that_takes_no_part_does_not_keep_a_run_from_being_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def down() -> TemporaryError:
        happened.append("offered")
        return TemporaryError("samples.json cannot be uploaded")

    place = SimpleNamespace(give_up_when=lambda condition: happened.append(f"given up: {condition()}"))
    run: Any = SimpleNamespace(
        cached=SimpleNamespace(store=SimpleNamespace(place=place, offer=down)),
        watchdog=SimpleNamespace(watch=lambda *_: None),
        progress=SimpleNamespace(say=happened.append),
        saver=SimpleNamespace(begin=lambda *_: happened.append("saved")),
        ledger=SimpleNamespace(position=lambda: None),
        student=None,
        state=SimpleNamespace(step=3),
    )
    run.publish_teacher = lambda wait=True: Run.publish_teacher(run, wait=wait)
    monkeypatch.setattr(loop, "_finish_checkpoint", lambda _: True)
    with pytest.raises(TemporaryError, match=r"shard\.mds"):
        loop._read(run, lambda: down_reading())
    said = "warning: the teacher's cache lacks what this run computed last: samples.json cannot be uploaded"
    assert happened == ["given up: True", "offered", said, "saved"]
    happened.clear()
    loop._begin_checkpoint(run)  # in the normal course it waits; reading the next step's samples ends the run
    assert happened == ["offered", said, "saved"]


def down_reading() -> Any:
    raise TemporaryError("shard.mds cannot be fetched")
