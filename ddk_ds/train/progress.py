"""What rank 0 shows while the run goes: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ddk_ds.redact import redact
from ddk_ds.train.step import StepMetrics

_LINE_EVERY_S = 10.0


class RunProgress:
    """Steps, loss, speed, ETA, the interval and its proportions. On ranks other than 0 it shows nothing."""

    def __init__(self, rank: int, total_steps: int, names: Sequence[str]) -> None:
        self.console = Console(quiet=rank != 0, file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._names = names
        self._total = total_steps
        self._live = rank == 0 and sys.stdout.isatty()
        self._last_line = 0.0
        self._interval = ""
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("step", total=total_steps, metrics="")

    def start(self, step: int) -> None:
        """Show the bar at `step`."""
        self._bar.start()
        self._bar.update(self._task, completed=step)

    def stop(self) -> None:
        """Leave the terminal to others."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(redact(text))

    def interval(self, number: int, proportions: Sequence[float]) -> None:
        """A new interval has begun."""
        mixture = "  ".join(f"{name} {share:.1%}" for name, share in zip(self._names, proportions, strict=True))
        self._interval = f"interval {number}"
        self.say(f"interval {number}: {mixture}")

    def step(self, step: int, metrics: StepMetrics, tokens_per_s: float) -> None:
        """An optimizer step is done."""
        text = f"loss {metrics.loss:.4f}  CE {metrics.ce:.4f}  KL {metrics.kl:.4f}  {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, metrics=f"{self._interval}  {text}")
        now = time.monotonic()
        if not self._live and (now - self._last_line > _LINE_EVERY_S or step == self._total):
            self._last_line = now
            remaining = (self._total - step) * sum(metrics.domain_tokens) / max(1e-9, tokens_per_s)
            self.say(f"step {step}/{self._total}  {self._interval}  {text}  ETA {remaining:,.0f} s")
