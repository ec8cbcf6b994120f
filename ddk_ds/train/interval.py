"""Between two intervals: measure, decide on rank 0, broadcast, agree. The only place where mixture meets comm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples
from ddk_ds.errors import ConfigError
from ddk_ds.mixture.ddk import discrepancy
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.exhaustion import Exhaustion, Plan
from ddk_ds.mixture.interval_state import interval_ids
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.state import RunState


def read_schedule(path: str | None) -> Any:
    """Plain values of the YAML file `mixture.schedule_file`; None where there is none."""
    if path is None:
        return None
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"mixture.schedule_file {path}: cannot be read as YAML: {reason}") from None


Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Perplexities (N,) by domain; the teacher's is None in a run without one."""

    student: Array
    teacher: Array | None

    @property
    def ratio(self) -> Array | None:
        """l_S / l_T by domain."""
        return None if self.teacher is None else self.student / self.teacher


class Mixer:
    """Turns measurements into the next interval's sample ids, the same on every rank."""

    def __init__(
        self, controller: Controller, orders: list[DomainOrder], offsets: npt.NDArray[np.int64], comm: Comm
    ) -> None:
        self._controller = controller
        self._orders = orders
        self._offsets = offsets
        self._comm = comm

    def plan(
        self, state: RunState, measured: Measurement, total_samples: int, exhaustion: Exhaustion
    ) -> tuple[Decision, Plan]:
        """The decision on the next interval, and what the domains can give of it; changes nothing. Collective.

        Rank 0 decides and broadcasts; every rank turns the proportions into the same integer counts.
        """
        decided = self._decide(state, measured) if self._comm.rank == 0 else None
        decision: Decision = self._comm.broadcast_object(decided)
        return decision, exhaustion.plan(decision.proportions, total_samples, state.data.drawn)

    def begin(self, state: RunState, decision: Decision, plan: Plan) -> npt.NDArray[np.int64]:
        """Begin the planned interval in `state`, return its global sample ids. Collective: all check they agree."""
        state.proportions, state.smoothed_ppl = decision.proportions, decision.smoothed_ppl
        state.data = state.data.begin(plan.counts)
        ids = self.ids(state)
        plans = self._comm.gather_objects((state.data.counts, state.data.ids_sha))
        assert all(plan == plans[0] for plan in plans), f"ranks hold different plans of the interval: {plans}"
        return ids

    def ids(self, state: RunState) -> npt.NDArray[np.int64]:
        """Global sample ids (total,) of the interval that `state` is in; notes or checks their hash in it."""
        ids = interval_ids(self._orders, self._offsets, state.data)
        state.data = state.data.seal(ids)
        return ids

    def _decide(self, state: RunState, measured: Measurement) -> Decision:
        last = Decision(state.proportions, state.smoothed_ppl) if state.proportions else None
        return decide(self._controller, last, measured.student, measured.teacher, interval=state.data.interval + 1)


def stop_reason(config: Config, state: RunState, measured: Measurement) -> str | None:
    """Why the run ends at this interval's border, or None. Pure; the same on every rank.

    Domains that mixture.exclude names count neither among the samples nor in the discrepancy.
    """
    stop, intervals_done = config.stop, state.data.interval + 1
    sizes = {domain["name"]: domain["num_samples"] for domain in state.data.domains}
    samples = corpus_samples(config.mixture, sizes)
    if stop.steps is not None and state.step >= stop.steps:
        return f"{state.step} steps done"
    if stop.intervals is not None and intervals_done >= stop.intervals:
        return f"{intervals_done} intervals done"
    if stop.data_once and state.step * config.train.global_batch_samples >= samples:
        return f"all {samples} samples used once"
    if stop.discrepancy is not None and measured.teacher is not None:
        part = [name not in config.mixture.exclude for name in sizes]
        found = discrepancy(measured.student[part], measured.teacher[part])
        if found < stop.discrepancy:
            return f"discrepancy {found:.4g} is under {stop.discrepancy:g}"
    return None


def interval_record(
    state: RunState,
    measured: Measurement,
    names: list[str],
    plan: Plan | None,
    clock: dict[str, float],
    alarms: Sequence[str] = (),
) -> dict[str, Any]:
    """The ledger's line of an interval's beginning (by its plan) or of the run's end (plan None).

    `asked` are the samples by the proportions alone, `counts` those drawn: they differ where a domain is at its cap.
    `clock` are the seconds that the measurement and the decision after it took.
    """

    def by_domain(values: Any) -> dict[str, Any] | None:
        return None if values is None else dict(zip(names, np.asarray(values).tolist(), strict=True))

    return {
        "kind": "interval" if plan is not None else "end",
        "interval": state.data.interval,
        "step": state.step,
        "student_ppl": by_domain(measured.student),
        "teacher_ppl": by_domain(measured.teacher),
        "ratio": by_domain(measured.ratio),
        "smoothed_ppl": by_domain(state.smoothed_ppl or None) if plan is not None else None,
        "proportions": by_domain(state.proportions) if plan is not None else None,
        "asked": None if plan is None else by_domain(plan.asked),
        "counts": None if plan is None else by_domain(plan.counts),
        "domain_tokens": by_domain(state.domain_tokens),
        "ids_sha": state.data.ids_sha if plan is not None else None,
        "alarms": list(alarms),
        "clock": {key: round(seconds, 4) for key, seconds in clock.items()},
    }
