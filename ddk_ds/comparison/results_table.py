"""Results of finished runs side by side, by method and seed: perplexities, their spread and differences, and costs.

A method's differences to the baseline are paired by seed. A run's cost is its tokens, its time, and an estimate of its
floating-point operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddk_ds.comm import SingleProcess
from ddk_ds.comparison.method_stages import SUFFIXES
from ddk_ds.comparison.teacher_cost import TeacherCost, teacher_cost, teacher_costs, teacher_remarks
from ddk_ds.config import load_run_config
from ddk_ds.engine.flops import model_flops, run_flops
from ddk_ds.engine.model_files import model_directory, read_model
from ddk_ds.errors import DataError, UserError
from ddk_ds.run_files import UNREADABLE, check_end, complete_files, is_finished, read_events, read_ledger, read_summary

_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom."""
_Z95 = 1.959964
_SAME = 1e-4
"""Relative difference below which two measurements of one model count as equal: other ranks round differently."""


@dataclass(frozen=True)
class RunCost:
    """Tokens, time and FLOPs that one run took."""

    tokens: int
    """Tokens trained on: targets of the loss."""
    wall_s: float
    """Time of all steps and measurements."""
    evaluation_time_share: float
    """Share of the time that measurements (at the start, between intervals, at the end) and decisions took."""
    flops: float | None
    """FLOPs of training and evaluation; None where the models' files are gone."""
    evaluation_flops: float | None
    teacher: TeacherCost | None = None
    """The teacher's part; None for a run without one."""


@dataclass(frozen=True)
class Result:
    """One finished run of a method, and the costs of the method's earlier stages."""

    label: str
    seed: int
    summary: dict[str, Any]
    cost: RunCost
    earlier: tuple[RunCost, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Mean and spread of one quantity over seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None with one value."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Difference of one quantity between a method and the baseline, paired by seed."""

    seeds: int
    """Seeds that both have."""
    mean: float | None
    """Method minus baseline; None without a common seed."""
    standard_error: float | None
    low: float | None
    """Lower end of the mean's 95 % t interval; None with fewer than two seeds."""
    high: float | None
    """Upper end of that interval."""
    verdict: str
    """Sentence about the difference and the spread, for the report."""


def compare_runs(
    directory: Path, baseline: str | None, labels: Sequence[str] | None = None, seeds: Iterable[int] | None = None
) -> dict[str, Any]:
    """Return the content of comparison.json for the finished runs <label>-s<seed> in a directory.

    The baseline is the first label unless it is given; None for labels or seeds takes all that are finished. Raises
    DataError where no run is finished.
    """
    results = read_results(directory, labels, seeds)
    if not results:
        raise DataError(f"{directory}: no run <method>-s<seed> in it is finished: nothing to report")
    baseline = baseline or (labels or [results[0].label])[0]
    with complete_files(directory):
        comparison = compare(results, baseline)
    events = {f"{r.label}-s{r.seed}": read_events(directory / f"{r.label}-s{r.seed}") for r in results}
    comparison["remarks"] += [
        f"{run}: {event['text']}" for run, lines in events.items() for event in lines if event["event"] == UNREADABLE
    ]
    starts = [next((event for event in lines if "world_size" in event), {}) for lines in events.values()]
    return {**comparison, **_ranks_and_versions(starts)}


def read_results(
    directory: Path, labels: Sequence[str] | None = None, seeds: Iterable[int] | None = None
) -> list[Result]:
    """Read the finished runs <label>-s<seed> of a directory, in the order of labels and then of seeds.

    None for labels or seeds takes all of them. Runs that are not finished are left out.
    """
    results = []
    for path in directory.glob("*-s*"):
        named = re.fullmatch(r"(.+)-s(\d+)", path.name)
        if named is None or not is_finished(path):
            continue
        label, seed = named[1], int(named[2])
        if (labels is None or label in labels) and (seeds is None or seed in seeds):
            stages = [directory / f"{path.name}-{suffix}" for suffix in SUFFIXES]
            earlier = tuple(run_cost(stage) for stage in stages if is_finished(stage))
            results.append(Result(label, seed, read_summary(path), run_cost(path), earlier))
    order = list(labels or sorted({result.label for result in results}))
    return sorted(results, key=lambda result: (order.index(result.label), result.seed))


def run_cost(run_dir: Path) -> RunCost:
    """Read the tokens, seconds and estimated FLOPs of a finished run from its directory.

    FLOPs are None if a model cannot be read. Raises CheckpointError if the directory holds no finished run.
    """
    summary, records = read_summary(run_dir), read_ledger(run_dir)
    check_end(run_dir, records, summary["steps"])
    config = load_run_config(run_dir)
    measurements = [record for record in records if record["kind"] in ("interval", "end")]
    evaluation_s = _clock(measurements, "measure_s") + _clock(measurements, "controller_s")
    steps_s = _clock(records, "step_s")
    teacher = flops = cost = None
    try:
        student = forward_flops(run_dir / "export", config.data.sequence_length)
        teacher = None if config.teacher is None else _teacher_flops(config.teacher.path, config.data.sequence_length)
    except UserError:
        student = None
    if config.teacher is not None:
        cost = teacher_cost(config, [record for record in records if record["kind"] == "step"], teacher)
    if student is not None:
        flops = run_flops(
            config,
            student,
            teacher,
            steps=summary["steps"],
            measurements=len(measurements),
            domains=len(summary["domains"]),
            taught=None if cost is None or cost.cache is None else cost.taught,
        )
    return RunCost(
        tokens=summary["tokens"],
        wall_s=summary["wall_s"],
        evaluation_time_share=evaluation_s / max(evaluation_s + steps_s, 1e-9),
        flops=None if flops is None else flops.own,
        evaluation_flops=None if flops is None else flops.evaluation,
        teacher=cost,
    )


def forward_flops(directory: Path, sequence_length: int) -> float:
    """Return the FLOPs of the forward pass of one token in a sequence of `sequence_length`, for a model on disk.

    Raises ConfigError if `directory` holds no model.
    """
    return model_flops(read_model(directory, "model"), sequence_length)


def _teacher_flops(path: str, length: int) -> float:
    return forward_flops(model_directory(path, "teacher.path", SingleProcess()), length)


def _clock(records: list[dict[str, Any]], key: str) -> float:
    return math.fsum(record["clock"].get(key, 0.0) for record in records)


def compare(results: Sequence[Result], baseline: str) -> dict[str, Any]:
    """Compare the runs with those of the baseline. Raises DataError where their domains differ.

    The result is what comparison.json holds, except versions and ranks.
    """
    labels = list(dict.fromkeys(result.label for result in results))
    names = [domain["name"] for domain in results[0].summary["domains"]]
    for result in results:
        if [domain["name"] for domain in result.summary["domains"]] != names:
            raise DataError(f"{result.label}-s{result.seed} has other domains than {labels[0]}: nothing to compare")
    teachers = [result for result in results if result.summary["domains"][0]["teacher_ppl"] is not None]
    teacher = _by_domain(teachers[0], "teacher_ppl") if teachers else None
    start = _by_domain(results[0], "student_ppl_before")
    after = {(r.label, r.seed): _by_domain(r, "student_ppl_after") for r in results}
    # Without any teacher there is no ratio: the geometric mean scores a model over all domains.
    score = {key: _mean_ratio(ppl, teacher) if teacher else _geometric_mean(ppl) for key, ppl in after.items()}

    def values(label: str, domain: str | None) -> dict[int, float]:
        by_run = score if domain is None else {key: ppl[domain] for key, ppl in after.items()}
        return {seed: value for (method, seed), value in by_run.items() if method == label}

    taught: dict[str, list[TeacherCost]] = {}
    for result in results:
        if result.cost.teacher is not None:
            taught.setdefault(result.label, []).append(result.cost.teacher)
    quantities = {"score": None, **{name: name for name in names}}
    return {
        "score": "mean ratio to the teacher" if teacher else "geometric mean perplexity",
        "baseline": baseline,
        "domains": names,
        "teacher_ppl": teacher,
        "start_ppl": start,
        "start_score": _mean_ratio(start, teacher) if teacher else _geometric_mean(start),
        "methods": {
            label: {
                "seeds": list(values(label, None)),
                "score": asdict(spread(values(label, None).values())),
                "ppl": {name: asdict(spread(values(label, name).values())) for name in names},
                **_costs([result for result in results if result.label == label]),
            }
            for label in labels
        },
        "teacher_cost": teacher_costs(taught),
        "differences": {
            label: {
                key: asdict(paired_difference(values(label, name), values(baseline, name)))
                for key, name in quantities.items()
            }
            for label in labels
            if label != baseline and baseline in labels
        },
        "remarks": _remarks(results, start, teacher)
        + teacher_remarks(taught)
        + ([] if baseline in labels else [f"no run of the baseline {baseline} is finished"]),
    }


def _by_domain(result: Result, key: str) -> dict[str, float]:
    return {domain["name"]: domain[key] for domain in result.summary["domains"]}


def _mean_ratio(ppl: Mapping[str, float], teacher: Mapping[str, float]) -> float:
    return math.fsum(ppl[name] / teacher[name] for name in ppl) / len(ppl)


def _geometric_mean(ppl: Mapping[str, float]) -> float:
    return math.exp(math.fsum(math.log(value) for value in ppl.values()) / len(ppl))


def _costs(results: Sequence[Result]) -> dict[str, Any]:
    """Return the means over seeds of the costs of one method's last stage, and of its earlier stages as `earlier_*`.

    The costs of all earlier stages are added; they are 0 for a method of one stage.
    """

    def mean(values: Iterable[float | None]) -> float | None:
        known = list(values)
        return None if None in known else math.fsum(v for v in known if v is not None) / len(known)

    flops, evaluation = mean(r.cost.flops for r in results), mean(r.cost.evaluation_flops for r in results)
    return {
        "tokens": mean(r.cost.tokens for r in results),
        "wall_s": mean(r.cost.wall_s for r in results),
        "flops": flops,
        "evaluation_flops_share": None if not flops or evaluation is None else evaluation / flops,
        "evaluation_time_share": mean(r.cost.evaluation_time_share for r in results),
        "earlier_tokens": mean(sum(cost.tokens for cost in r.earlier) for r in results),
        "earlier_wall_s": mean(math.fsum(cost.wall_s for cost in r.earlier) for r in results),
        "earlier_flops": mean(_total(cost.flops for cost in r.earlier) for r in results),
    }


def _total(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else math.fsum(v for v in known if v is not None)


def _remarks(results: Sequence[Result], start: Mapping[str, float], teacher: Mapping[str, float] | None) -> list[str]:
    """Return a sentence for everything that makes the comparison unfair or incomplete."""

    def differ(key: str, expected: Mapping[str, float]) -> list[str]:
        by_run = [(f"{r.label}-s{r.seed}", _by_domain(r, key)) for r in results]
        return [
            run
            for run, ppl in by_run
            if any(ppl[name] is not None and abs(ppl[name] / expected[name] - 1) > _SAME for name in expected)
        ]

    seeds: dict[str, list[int]] = {}
    for result in results:
        seeds.setdefault(result.label, []).append(result.seed)
    most = max(map(len, seeds.values()))
    remarks = [f"{label} has {len(own)} of {most} seeds" for label, own in seeds.items() if len(own) < most]
    if others := differ("student_ppl_before", start):
        remarks.append(f"another starting student or other validation samples: {', '.join(others)}")
    if teacher and (others := differ("teacher_ppl", teacher)):
        remarks.append(f"another teacher or other validation samples: {', '.join(others)}")
    tokens = [result.cost.tokens for result in results]
    if max(tokens) > 1.01 * min(tokens):
        remarks.append(f"the runs trained on {min(tokens):,} to {max(tokens):,} tokens, so not on the same number")
    return remarks


def spread(values: Iterable[float]) -> Spread:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    array = np.array(list(values), np.float64)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, tuple(array.tolist()))


def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t.

    Beyond 10 degrees of freedom it is the expansion around the normal distribution's quantile (Abramowitz and Stegun,
    26.7.5), which is off by less than 2e-4 there.
    """
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z, n = _Z95, degrees
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return z + math.fsum(terms)


def paired_difference(method: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Compare values by seed over the seeds that both have: method minus baseline, with a paired t interval."""
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        return Difference(0, None, None, None, None, "no seed in common")
    differences = spread(method[seed] - baseline[seed] for seed in seeds)
    if differences.sd is None:
        return Difference(1, differences.mean, None, None, None, "one seed: no spread is known")
    error = differences.sd / math.sqrt(len(seeds))
    half = t_quantile(len(seeds) - 1) * error
    low, high = differences.mean - half, differences.mean + half
    verdict = "exceeds the spread" if low > 0 or high < 0 else "does not exceed the spread"
    return Difference(len(seeds), differences.mean, error, low, high, verdict)


def _ranks_and_versions(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the different versions and numbers of ranks that the runs recorded at their starts."""
    versions: dict[str, set[str]] = {}
    for event in events:
        for name, version in event.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    ranks = sorted({event["world_size"] for event in events if "world_size" in event})
    return {"ranks": ranks, "versions": {name: sorted(values) for name, values in versions.items()}}
