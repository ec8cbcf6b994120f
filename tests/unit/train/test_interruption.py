"""Which signal a run names, and what is a second Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.train import interruption
from ddk_ds.train.interruption import Interrupted, Interruption


@pytest.fixture
def listening() -> Iterator[Interruption]:
    # SIGHUP is ignored if the tests were started by nohup.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield Interruption(SingleProcess(), torch.device("cpu"))
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal_is_nothing_to_a_run_under_nohup(listening: Interruption) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with listening.listening():
        signal.raise_signal(signal.SIGHUP)
        listening.check()


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_the_first_signal_is_named(listening: Interruption, name: str) -> None:
    """A launcher that heard the terminal's SIGINT sends SIGTERM after it."""
    with listening.listening():
        listening.check()
        signal.raise_signal(signal.Signals[name])
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match=rf"^{name}$"):
            listening.check()


def test_a_launcher_that_passes_the_same_ctrl_c_on_is_no_second_one(
    listening: Interruption, after: Callable[[float], None]
) -> None:
    with listening.listening():
        for seconds in (0.0, 0.1, 0.9):
            after(seconds)
            signal.raise_signal(signal.SIGINT)
        after(1.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_after_the_end_changes_nothing(listening: Interruption, name: str) -> None:
    """The launcher of a run that has saved may have gone: the exit code is not lost to its signal."""
    with listening.listening():
        pass
    signal.raise_signal(signal.Signals[name])


def test_a_ctrl_c_after_another_signal_lets_the_run_save(listening: Interruption) -> None:
    with listening.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match=r"^SIGTERM$"):
            listening.check()


def test_under_nohup_a_closed_terminal_changes_nothing(listening: Interruption) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening.listening():
            signal.raise_signal(signal.SIGHUP)
            listening.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
