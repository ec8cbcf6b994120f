"""A run started from Python, as `ddk distill` starts it, and its results as Python objects (docs/notebook.ipynb)."""

from __future__ import annotations

import html
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ddk_ds.comparison.method_stages import RunInterrupted, launch
from ddk_ds.config import load_config, make_config, to_yaml
from ddk_ds.errors import TemporaryError, UserError
from ddk_ds.exit_codes import EXIT_INTERRUPTED, EXIT_TEMPORARY, EXIT_USER_ERROR
from ddk_ds.report.ledger_table import LedgerTable, Table, load_ledger, table_of
from ddk_ds.run_files import is_finished, read_summary

_LOOK_EVERY_S = 0.2


class RunFailed(RuntimeError):
    """A run ended before its end by an error that no change of its configuration mends."""


@dataclass(frozen=True)
class Result:
    """The directory and the results of a finished run."""

    run_dir: Path
    summary: dict[str, Any]
    """Content of the run's summary.json."""

    @property
    def domains(self) -> Table:
        """Return perplexities, ratios to the teacher and tokens before and after, with a row for each domain."""
        return table_of(self.summary["domains"])

    @property
    def mean_ratio(self) -> float | None:
        """Return the mean over domains of student's / teacher's perplexity at the end; None without a teacher."""
        value: float | None = self.summary["mean_ratio_after"]
        return value

    @property
    def largest_ratio(self) -> float | None:
        """Return the largest of these ratios, that of the worst domain; None without a teacher."""
        return None if self.mean_ratio is None else max(domain["ratio_after"] for domain in self.summary["domains"])

    @property
    def export(self) -> Path:
        """Return the directory of the student, which transformers can load."""
        return self.run_dir / "export"

    def ledger(self) -> LedgerTable:
        """Return the run's ledger as tables."""
        return load_ledger(self.run_dir)

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self.domains}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._headline())}</p>{self.domains._repr_html_()}"

    def _headline(self) -> str:
        after = (
            "" if self.mean_ratio is None else f"; ratio {self.mean_ratio:.4g} mean, {self.largest_ratio:.4g} largest"
        )
        return f"{self.run_dir}: {self.summary['reason']}{after}"


def distil(
    config: str | Path | Mapping[str, Any], *overrides: str, ranks: int | None = None, quiet: bool = False
) -> Result:
    """Run a configuration to its end as `ddk distill` does, and return its result.

    A run that was interrupted continues, and a finished one gives its result. The run's output is printed while it
    goes on, and is kept in <output_dir>/<name>.log. An interrupt of the notebook's kernel, or Ctrl-C, goes to the run,
    which saves: wait for that. Must be called in the main thread.

    Args:
        config: a YAML file or a mapping with the same keys.
        overrides: texts `key.path=value` that replace values of the configuration.
        ranks: number of processes; None: one for each accelerator of the machine.
        quiet: print nothing.

    Raises:
        UserError: configuration, models, data or the run's directory are wrong; nothing was trained.
        TemporaryError: the same, and time may mend it: the same call may pass later.
        RunInterrupted: a signal ended the run, which has saved; the same call continues it.
        RunFailed: the run failed otherwise; the message has its last lines.
    """
    with _file(config, overrides) as (path, given):
        checked = load_config(path, given)
        checked.check_paths()
        if ranks is not None:
            checked.micro_batches(ranks)
        log = Path(checked.output_dir) / f"{checked.name}.log"
        begin = log.stat().st_size if log.is_file() else 0
        with _printing(log, begin, quiet=quiet):
            code = launch(path, given, ranks, log)
    if code == 0 and is_finished(checked.run_dir):
        return Result(checked.run_dir, read_summary(checked.run_dir))
    output = _text_after(log, begin)
    if code == EXIT_INTERRUPTED:
        raise RunInterrupted(f"{checked.run_dir} was interrupted and has saved: the same call continues it")
    errors = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    if code in (EXIT_USER_ERROR, EXIT_TEMPORARY) and errors:
        raise (TemporaryError if code == EXIT_TEMPORARY else UserError)(errors[-1])
    tail = "\n".join(output.splitlines()[-20:])
    raise RunFailed(f"{checked.run_dir} ended with exit code {code}; {log} has all, its end is\n{tail}")


@contextmanager
def _file(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Iterator[tuple[Path, Sequence[str]]]:
    """Yield the YAML file of a configuration and the overrides that it lacks; a mapping is written to one."""
    if not isinstance(config, Mapping):
        yield Path(config), overrides
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(make_config(config, "config", overrides)), encoding="utf-8")
        yield path, ()


def _text_after(log: Path, begin: int) -> str:
    with log.open("rb") as stream:
        stream.seek(begin)
        return stream.read().decode("utf-8", "replace")


@contextmanager
def _printing(log: Path, begin: int, *, quiet: bool) -> Iterator[None]:
    """Print what is written to `log` from the byte `begin` on, until the end of the block."""
    ended = Event()

    def follow() -> None:
        shown = begin
        while True:
            last = ended.wait(_LOOK_EVERY_S)
            if log.is_file():
                with log.open("rb") as stream:
                    stream.seek(shown)
                    new = stream.read()
                # A line at a time: a character of several bytes is never cut.
                whole = new if last else new[: new.rfind(b"\n") + 1]
                shown += len(whole)
                sys.stdout.write(whole.decode("utf-8", "replace"))
                sys.stdout.flush()
            if last:
                return

    thread = Thread(target=follow, name="output", daemon=True)
    if not quiet:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if not quiet:
            thread.join()
