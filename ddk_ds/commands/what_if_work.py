"""The work of `ddk replay --what-if`: every controller is asked what it makes of one run's measurements."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from ddk_ds.config import Config, Mixture, load_run_config, make_config
from ddk_ds.config.mixture_options import ControllerKind, goes_with
from ddk_ds.config.paths import is_address
from ddk_ds.errors import UserError
from ddk_ds.files import write_text
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.exhaustion import make_exhaustion
from ddk_ds.report.replayed_decisions import RecordedRun
from ddk_ds.report.what_if import (
    CAVEAT,
    Stock,
    WouldBe,
    cached_teacher,
    check_counts,
    open_stock,
    what_if,
    what_if_json,
    what_if_tables,
)
from ddk_ds.train.interval import read_schedule


def show_what_if(options: Namespace, run: RecordedRun, console: Console) -> None:
    """Print what every controller would have decided and drawn; write it to `options.page` and `options.json`.

    Raises UserError if an option of section mixture is wrong, if it is not known what had been drawn before, or if a
    file cannot be written.
    """
    own = load_run_config(options.run)
    check_counts(run, options.run)
    section = None if own.teacher is None else own.teacher.cache
    cache = options.cache or (None if section is None else section.path)
    stock, notes = _stock(own, options.run, run, cache)
    if run.decisions[0].teacher_ppl is None and cache is not None and not is_address(cache):
        teacher_ppl = cached_teacher(options.run, run.domains, Path(cache))
        if teacher_ppl is not None:
            run = replace(run, decisions=[replace(entry, teacher_ppl=teacher_ppl) for entry in run.decisions])
            notes.append(f"The run has no teacher. Its perplexities are those in {cache}.")
    found, refused = _ask_all(own, options, run, stock)
    if options.overrides:
        notes.append(f"With {' '.join(options.overrides)}, wherever a controller has the option, but not as run.")
    for table in what_if_tables(found, run):
        console.print(table)
    lines = [f"{would_be.title}: {would_be.ended}" for would_be in found if would_be.ended]
    lines += [f"{name} is not replayable: {reason}" for name, reason in refused.items()]
    for line in (*lines, *notes, CAVEAT):
        console.print(line, markup=False)
    if options.json is not None:
        write_text(options.json, json.dumps(what_if_json(found, refused, run), indent=1))
    if options.page is not None:
        from ddk_ds.report.what_if_page import write_what_if_page  # imports Bokeh

        write_what_if_page(options.page, options.run.absolute().name, run, found, [*lines, *notes])
        console.print(str(options.page), markup=False)


def _stock(own: Config, run_dir: Path, run: RecordedRun, cache: str | None) -> tuple[Stock | None, list[str]]:
    """Return the run's samples and those in the cache, and sentences on what is not known of them."""
    notes = [] if cache else ["The run has no cache of its teacher; --cache names one, to show what it holds."]
    try:
        return open_stock(own, run_dir, run.domains, cache), notes
    except UserError as error:
        return None, [*notes, f"Not known which samples would have been drawn: {error}"]


def _ask_all(
    own: Config, options: Namespace, run: RecordedRun, stock: Stock | None
) -> tuple[list[WouldBe], dict[str, str]]:
    """Return what each controller would have decided, the run's own first, and why others cannot be asked."""

    def ask(mixture: Mixture, *, is_own: bool) -> WouldBe:
        other_file = mixture.schedule_file != own.mixture.schedule_file
        schedule = read_schedule(mixture.schedule_file) if other_file else run.schedule
        controller = make_controller(mixture, run.train_tokens, schedule)
        sizes = {name: tokens // own.data.sequence_length for name, tokens in run.train_tokens.items()}
        exhaustion = make_exhaustion(mixture, sizes)
        return what_if(controller, run, exhaustion, own.data.sequence_length, stock, own=is_own)

    found, refused = [ask(own.mixture, is_own=True)], {}
    for kind in get_args(ControllerKind):
        items = [item for item in options.overrides if goes_with(_option(item), kind)]
        if kind == own.mixture.controller and not items:
            continue
        try:
            found.append(ask(_mixture(own, kind, items), is_own=False))
        except UserError as error:
            try:
                ask(_mixture(own, kind, []), is_own=False)
            except UserError:
                refused[kind] = str(error).removeprefix("--what-if: mixture: ")
            else:
                raise
    return found, refused


def _mixture(own: Config, kind: str, items: Sequence[str]) -> Mixture:
    """Return the run's section mixture with another controller, and with these key=value."""
    values = own.model_dump(mode="json")
    # The run's method may not go with this controller (`ddk_equal`, `cpt`), and takes no part here.
    values |= {"method": "kd", "teacher": values["teacher"] or {"path": "none"}}
    kept = {name: value for name, value in values["mixture"].items() if goes_with(name, kind)}
    values["mixture"] = {**kept, "controller": kind}
    return make_config(values, "--what-if", [f"mixture.{item.removeprefix('mixture.')}" for item in items]).mixture


def _option(item: str) -> str:
    return item.partition("=")[0].removeprefix("mixture.").partition(".")[0]
