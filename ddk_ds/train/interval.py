"""The border between two intervals: what ends the run there, and the decision on the next interval's samples.

Rank 0 decides the proportions and broadcasts them; every rank turns them into the same sample ids, and all compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples
from ddk_ds.errors import ConfigError
from ddk_ds.mixture.ddk import discrepancy
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.exhaustion import Draws
from ddk_ds.mixture.interval_state import interval_ids
from ddk_ds.mixture.order import DomainOrder, Ids
from ddk_ds.train.state import RunState

Array = npt.NDArray[np.float64]


def read_schedule(path: str | None) -> Any:
    """Return the plain values of the YAML file `mixture.schedule_file`; None if there is no such option."""
    if path is None:
        return None
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"mixture.schedule_file {path}: cannot be read as YAML: {reason}") from None


class Mixer:
    """Turns perplexities into the next interval's sample ids, the same on every rank."""

    def __init__(self, controller: Controller, orders: list[DomainOrder], offsets: Ids, comm: Comm) -> None:
        """Store the parts of a run that decide which samples it draws.

        Args:
            controller: decides the proportions.
            orders: for each of the N domains the order in which its samples are drawn.
            offsets: (N,) global id of each domain's first sample.
        """
        self._controller = controller
        self._orders = orders
        self._offsets = offsets
        self._comm = comm

    def decide(self, state: RunState, student_ppl: Array, teacher_ppl: Array | None) -> Decision:
        """Return the proportions of the next interval, decided from perplexities (N,). Collective.

        The state is not changed: `begin` does that.
        """
        decision = None
        if self._comm.rank == 0:
            decision = decide(
                self._controller,
                state.decision,
                student_ppl,
                teacher_ppl,
                interval=state.data.interval + 1,
                step=state.step,
                tokens=sum(state.domain_tokens),
                training=state.measured_in_training,
            )
        decided: Decision = self._comm.broadcast_object(decision)
        return decided

    def begin(self, state: RunState, decision: Decision, draws: Draws) -> Ids:
        """Begin the next interval in `state` with the samples of `draws`; return its sample ids.

        Collective: all ranks check that they hold the same ids.
        """
        state.proportions, state.log_proportions = decision.proportions, decision.log_proportions
        state.smoothed_ppl, state.controller_memory = decision.smoothed_ppl, decision.memory
        state.training_losses, state.training_sums = state.measured_in_training or [], []
        state.data = state.data.begin(draws.counts, draws.owed)
        ids = self.ids(state)
        held = self._comm.gather_objects((state.data.counts, state.data.ids_sha))
        assert all(each == held[0] for each in held), f"ranks hold different plans of the interval: {held}"
        return ids

    def ids(self, state: RunState) -> Ids:
        """Return the global sample ids (total,) of the interval that `state` is in, in global order.

        Store the hash of these ids in the state. Raises CheckpointError if the state already has another hash.
        """
        ids = interval_ids(self._orders, self._offsets, state.data)
        state.data = state.data.seal(ids)
        return ids


def stop_reason(config: Config, state: RunState, student_ppl: Array, teacher_ppl: Array | None) -> str | None:
    """Return why the run ends at this border between intervals, or None. Pure; the same on every rank.

    Domains in mixture.exclude count neither among the samples nor in the discrepancy.
    """
    stop, intervals_done = config.stop, state.data.interval + 1
    sizes = {domain["name"]: domain["num_samples"] for domain in state.data.domains}
    samples = corpus_samples(config.mixture, sizes)
    if stop.steps is not None and state.step >= stop.steps:
        return f"{state.step} steps done"
    if stop.intervals is not None and intervals_done >= stop.intervals:
        return f"{intervals_done} intervals done"
    if stop.data_once and state.step * config.train.global_batch_samples >= samples:
        return _data_used(state, samples, config.mixture.exclude)
    if stop.discrepancy is not None and teacher_ppl is not None:
        included = [name not in config.mixture.exclude for name in sizes]
        largest = discrepancy(student_ppl[included], teacher_ppl[included])
        if largest < stop.discrepancy:
            return f"discrepancy {largest:.4g} is under {stop.discrepancy:g}"
    return None


def _data_used(state: RunState, samples: int, excluded: Sequence[str]) -> str:
    """Return how many samples were drawn of the `samples` of all domains, and how often the least and most drawn ones.

    The mixture decides which samples those are: a domain can have been drawn twice over, and another hardly.
    """
    passes = {
        domain["name"]: drawn / domain["num_samples"]
        for domain, drawn in zip(state.data.domains, state.data.drawn, strict=True)
        if domain["name"] not in excluded
    }
    least, most = min(passes, key=passes.__getitem__), max(passes, key=passes.__getitem__)
    shown = ", ".join(f"{name} {passes[name]:.2f} times over" for name in dict.fromkeys((least, most)))
    return f"{sum(state.data.drawn):,} samples drawn, as many as the data has ({samples:,}) or more: {shown}"


def ratio_to_teacher(student_ppl: Array, teacher_ppl: Array | None) -> Array | None:
    """Return l_S / l_T by domain, (N,); None in a run without a teacher."""
    return None if teacher_ppl is None else student_ppl / teacher_ppl


def interval_record(
    kind: Literal["interval", "end"],
    state: RunState,
    names: list[str],
    student_ppl: Array,
    teacher_ppl: Array | None,
    clock: dict[str, float],
    alarms: Sequence[str] = (),
    asked: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the ledger's line of an interval that has just begun, or of the run's end.

    In the line `counts` are the samples of each domain that are drawn, `asked` those that are due by the proportions
    alone, and `owed` what is due after the interval; the first two differ if the exhaustion policy caps a domain
    (mixture/exhaustion.py).

    Args:
        student_ppl, teacher_ppl: (N,) perplexities; None for the teacher in a run without one.
        clock: seconds that the measurement and the decision took, by name.
        alarms: messages of `check_interval`.
        asked: (N,) `Draws.asked` of an interval.
    """
    begun = kind == "interval"

    def by_domain(values: Any) -> dict[str, Any] | None:
        return None if values is None else dict(zip(names, np.asarray(values).tolist(), strict=True))

    used: dict[str, Any] = {}  # by some controllers alone
    if means := state.training_losses if begun else state.measured_in_training:
        used |= {"training_loss": by_domain(means[0]), "training_kl": by_domain(means[1])}
    if begun and state.controller_memory is not None:
        used["controller_memory"] = state.controller_memory
    return {
        "kind": kind,
        "interval": state.data.interval,
        "step": state.step,
        "student_ppl": by_domain(student_ppl),
        "teacher_ppl": by_domain(teacher_ppl),
        "ratio": by_domain(ratio_to_teacher(student_ppl, teacher_ppl)),
        "smoothed_ppl": by_domain(state.smoothed_ppl or None) if begun else None,
        "proportions": by_domain(state.proportions) if begun else None,
        "log_proportions": by_domain(state.log_proportions) if begun else None,
        "asked": by_domain(asked) if begun else None,
        "counts": by_domain(state.data.counts) if begun else None,
        "owed": by_domain(state.data.owed) if begun else None,
        "domain_tokens": by_domain(state.domain_tokens),
        "ids_sha": state.data.ids_sha if begun else None,
        **used,
        "alarms": list(alarms),
        "clock": {key: round(seconds, 4) for key, seconds in clock.items()},
    }
