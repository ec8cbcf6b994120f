"""The run on the terminal. This is the one place that decides what is printed while a run goes on.

A terminal gets a bar that stays at the bottom: step and remaining time first, then as many numbers as fit. Evaluations
and the export have a bar of their own below it. Elsewhere (a log file, a pipe) there is a line every ten seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from ddk_ds.redact import redact
from ddk_ds.remaining_time import RemainingTime

if TYPE_CHECKING:
    from ddk_ds.train.step import StepMetrics

_LINE_EVERY_S = 10.0
_LEAST_BAR = 8


def fitted(pieces: Sequence[str], width: int) -> str:
    """Return the first pieces that fit into `width` columns, two spaces apart; the first one is always there."""
    line = pieces[0]
    for piece in pieces[1:]:
        if len(line) + 2 + len(piece) > width:
            break
        line += f"  {piece}"
    return line


def clock_time(seconds: float | None) -> str:
    """Return a time as h:mm:ss, or -:--:-- if it is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class RunProgress:
    """Shows steps, remaining time, loss and speed. On ranks other than 0 it shows nothing."""

    def __init__(self, rank: int, total_steps: int, measured_at: Sequence[int], names: Sequence[str]) -> None:
        """Make the bar of a run; with 0 steps there is none, and each part of the work shows its own remaining time."""
        output: Any = _Output()
        self.console = Console(quiet=rank != 0, file=output, highlight=False, soft_wrap=not sys.stdout.isatty())
        self.remaining = RemainingTime(total_steps, measured_at)
        self._names = names
        self._total = total_steps
        self._live = rank == 0 and sys.stdout.isatty()
        self._last_line = time.monotonic()
        self._started = False
        self._numbers: list[str] = []
        self._measuring: tuple[float, float] | None = None
        self._step = 0
        self._bar = Progress(
            _Head(self.console), BarColumn(bar_width=None), console=self.console, disable=not self._live, expand=True
        )
        self._task = self._bar.add_task("", total=total_steps, pieces=self._pieces, visible=total_steps > 0)

    def start(self, step: int) -> None:
        """Start the bar with `step` steps done."""
        self._started, self._step = True, step
        self._bar.start()
        self._bar.update(self._task, completed=step)

    def stop(self) -> None:
        """End the bar, so that others can write to the terminal."""
        self._started = False
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar, without credentials."""
        self._bar.console.print(redact(text), markup=False)

    def interval(self, number: int, proportions: Sequence[float]) -> None:
        """Show the proportions (N,) of the interval that has begun."""
        mixture = "  ".join(f"{name} {share:.1%}" for name, share in zip(self._names, proportions, strict=True))
        self.say(f"interval {number}: {mixture}")

    def step(self, step: int, metrics: StepMetrics, tokens_per_s: float, step_s: float) -> None:
        """Show loss and speed after optimizer step `step`; without a terminal at most every ten seconds."""
        self._step = step
        self.remaining.step_took(step_s)
        self._numbers = [f"loss {metrics.loss:.4f}", f"{tokens_per_s:,.0f} tokens/s"]
        self._numbers += [f"CE {metrics.ce:.4f}", f"KL {metrics.kl:.4f}"]
        self._bar.update(self._task, completed=step)
        self._line(self._pieces(), last=step == self._total)

    @contextmanager
    def part(self, title: str, pieces: int, *, measured_after: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a bar of `pieces` pieces of work until the block ends; it yields a function to call after each of them.

        Args:
            measured_after: the step after which the student is measured, where the work is that; None elsewhere.
        """
        began, done = time.monotonic(), 0
        self._bar.start()

        def own_pieces() -> list[str]:
            shown = [title, f"{done:,}/{pieces:,}"]
            if self._total:
                return shown
            return [*shown, f"ETA {clock_time((time.monotonic() - began) / done * (pieces - done) if done else None)}"]

        task = self._bar.add_task("", total=max(1, pieces), pieces=own_pieces)

        def advance() -> None:
            nonlocal done
            done += 1
            if measured_after is not None:
                self._measuring = (done / max(1, pieces), time.monotonic() - began)
            self._bar.update(task, completed=done)
            self._line([*own_pieces(), *(self._pieces()[:2] if self._total else [])])

        try:
            if measured_after is not None:
                self._measuring = (0.0, 0.0)
            yield advance
            if measured_after is not None:
                self.remaining.measurement_took(time.monotonic() - began, measured_after)
        finally:
            self._measuring = None
            self._bar.remove_task(task)
            if not self._started:
                self._bar.stop()

    def _pieces(self) -> list[str]:
        eta = clock_time(self.remaining.seconds(self._step, self._measuring))
        return [f"step {self._step:,}/{self._total:,}", f"ETA {eta}", *self._numbers]

    def _line(self, pieces: Sequence[str], *, last: bool = False) -> None:
        now = time.monotonic()
        if not self._live and (now - self._last_line > _LINE_EVERY_S or last):
            self._last_line = now
            self.say("  ".join(pieces))


class _Head(ProgressColumn):
    """The pieces before a bar, as many as leave room for one."""

    max_refresh = None

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))  # so that the bar gives way
        self._console = console

    def render(self, task: Task) -> Text:
        return Text(fitted(task.fields["pieces"](), self._console.width - _LEAST_BAR - 1), no_wrap=True)


class _Output:
    """Standard output. Once nobody reads it any more (a pipe's reader or the terminal has gone), all is thrown away."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        return self._attempt(lambda: sys.stdout.write(text)) or 0

    def flush(self) -> None:
        self._attempt(sys.stdout.flush)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError:
            # By the descriptor: what the stream still holds is flushed again when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
