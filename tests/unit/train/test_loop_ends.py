"""What a rank waits for at the end of its training: nothing, if the other ranks may not have come to an end."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock, PropertyMock

import pytest

from ddk_ds.train import loop
from ddk_ds.train.guard import NumbersGoneWrong
from ddk_ds.train.interruption import Interrupted


def ended(monkeypatch: pytest.MonkeyPatch, end: Any) -> MagicMock:
    """A run whose training raised or returned `end`."""
    run = MagicMock()
    monkeypatch.setattr(loop, "_train_to_the_end", MagicMock(side_effect=[end]))
    for name in ("_save_interrupted", "_finish_checkpoint", "_announce_wrong_numbers"):
        monkeypatch.setattr(loop, name, MagicMock())
    monkeypatch.setattr(loop, "roll_back", lambda *_: False)
    if isinstance(end, BaseException):
        with pytest.raises(type(end)):
            loop.train(run)
    else:
        assert loop.train(run) == end
    return run


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(28, "full"), KeyboardInterrupt()])
def test_an_error_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The monitors may wait for a service for a minute, the prefetcher for a store."""
    run = ended(monkeypatch, error)
    assert run.progress.stop.called and not run.monitor.close.called and not run.ahead.close.called


@pytest.mark.parametrize("end", [{"steps": 1}, Interrupted("SIGTERM"), NumbersGoneWrong("nan")])
def test_an_end_of_all_ranks_closes_everything(monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    run = ended(monkeypatch, end)
    assert run.progress.stop.called and run.monitor.close.called and run.ahead.close.called


def test_what_is_compiled_after_an_interval_with_its_measurement_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was resumed inside an interval measures for the first time after it: new shapes come."""
    run = MagicMock()
    type(run.state.data).done = PropertyMock(side_effect=[False, True, True, True])
    run.compiling.news.side_effect = ["", "3 graphs were compiled"]
    for name in ("_begin_interval", "_train_interval"):
        monkeypatch.setattr(loop, name, MagicMock())
    monkeypatch.setattr(loop, "_measure", lambda _: ([2.0], 0.1))
    monkeypatch.setattr(loop, "stop_reason", MagicMock(side_effect=[None, None, "steps"]))
    monkeypatch.setattr(loop, "_finish", lambda *_: {"steps": 9})
    assert loop._train_to_the_end(run) == {"steps": 9}
    assert run.compiling.news.call_count == 2
    run.progress.say.assert_called_once_with("3 graphs were compiled")
