"""Results of finished runs side by side, by method and seed: perplexities, their spread and differences, and costs.

A method's differences to the baseline are paired by seed. A run's cost is its tokens, its time, and an estimate of its
floating-point operations.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from ddk_ds.comm import SingleProcess
from ddk_ds.comparison.method_stages import SUFFIXES
from ddk_ds.comparison.paired_tests import corrected, paired_difference, ranking, spread
from ddk_ds.comparison.teacher_cost import TeacherCost, teacher_cost, teacher_costs, teacher_remarks
from ddk_ds.config import load_run_config
from ddk_ds.engine.flops import model_flops, run_flops
from ddk_ds.engine.model_files import model_directory, read_model
from ddk_ds.errors import DataError, UserError
from ddk_ds.run_files import UNREADABLE, check_end, complete_files, is_finished, read_events, read_ledger, read_summary

Perplexities = Mapping[str, float]
"""Perplexity by domain."""
Metric = Callable[[Perplexities], float]
ByLabel = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Values by label, by metric or domain, and by seed."""
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
    controller_s: float = 0.0
    """Time of rank 0 in the controller's decisions, a part of the evaluation's."""
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
    train_tokens: Mapping[str, int] | None = None
    """Tokens of each domain's training split; None if an older version wrote the run."""


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
            results.append(Result(label, seed, read_summary(path), run_cost(path), earlier, _train_tokens(path)))
    order = list(labels or sorted({result.label for result in results}))
    return sorted(results, key=lambda result: (order.index(result.label), result.seed))


def _train_tokens(run_dir: Path) -> Mapping[str, int] | None:
    """Return the tokens of each domain's training split as the run's first start recorded them, or None."""
    events = read_events(run_dir)
    return next((event["mixture"]["train_tokens"] for event in events if "mixture" in event), None)


def run_cost(run_dir: Path) -> RunCost:
    """Read the tokens, seconds and estimated FLOPs of a finished run from its directory.

    FLOPs are None if a model cannot be read. Raises CheckpointError if the directory holds no finished run.
    """
    summary, records = read_summary(run_dir), read_ledger(run_dir)
    check_end(run_dir, records, summary["steps"])
    config = load_run_config(run_dir)
    measurements = [record for record in records if record["kind"] in ("interval", "end")]
    controller_s = _clock(measurements, "controller_s")
    evaluation_s = _clock(measurements, "measure_s") + controller_s
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
        controller_s=controller_s,
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
    tokens = next((result.train_tokens for result in results if result.train_tokens), None)
    start = _by_domain(results[0], "student_ppl_before")
    metrics = _metrics(teacher, tokens)
    after = {
        label: {r.seed: _by_domain(r, "student_ppl_after") for r in results if r.label == label} for label in labels
    }
    values = {
        label: _by_seed(by_seed, {key: metric for key, (_, metric) in metrics.items()})
        for label, by_seed in after.items()
    }
    ppl = {label: _by_seed(by_seed, {name: itemgetter(name) for name in names}) for label, by_seed in after.items()}
    taught: dict[str, list[TeacherCost]] = {}
    for result in results:
        if result.cost.teacher is not None:
            taught.setdefault(result.label, []).append(result.cost.teacher)
    return {
        "metrics": {key: title for key, (title, _) in metrics.items()},
        "baseline": baseline,
        "domains": names,
        "train_tokens": tokens,
        "teacher_ppl": teacher,
        "start_ppl": start,
        "teacher": teacher and {key: metric(teacher) for key, (_, metric) in metrics.items()},
        "start": {key: metric(start) for key, (_, metric) in metrics.items()},
        "methods": {
            label: {
                "seeds": list(after[label]),
                **{key: asdict(spread(by_seed.values())) for key, by_seed in values[label].items()},
                "worst_domains": teacher and dict(Counter(_worst(one, teacher)[1] for one in after[label].values())),
                "ppl": {name: asdict(spread(by_seed.values())) for name, by_seed in ppl[label].items()},
                **_costs([result for result in results if result.label == label]),
            }
            for label in labels
        },
        "ranking": ranking({label: values[label]["score"] for label in labels}),
        "teacher_cost": teacher_costs(taught),
        "differences": {} if baseline not in labels else _differences(values, ppl, baseline),
        "remarks": _remarks(results, start, teacher)
        + teacher_remarks(taught)
        + ([] if baseline in labels else [f"no run of the baseline {baseline} is finished"]),
    }


def _metrics(teacher: Perplexities | None, tokens: Mapping[str, int] | None) -> dict[str, tuple[str, Metric]]:
    """Return each metric that can be computed of a model's perplexities by domain, with its title.

    Less is better in all. `tokens` are the sizes of the domains; `teacher` its perplexities.
    """
    found: dict[str, tuple[str, Metric]] = {}
    if teacher is None:
        # Without any teacher there is no ratio: the geometric mean scores a model over all domains.
        found["score"] = ("geometric mean perplexity", _geometric_mean)
    else:
        found["score"] = ("mean ratio to the teacher", lambda ppl: _mean_ratio(ppl, teacher))
        found["worst_ratio"] = ("worst domain's ratio", lambda ppl: _worst(ppl, teacher)[0])
    if tokens is not None:
        found["loss"] = ("loss by size, nats a token", lambda ppl: _loss_by_size(ppl, tokens))
    return found


def _by_seed(after: Mapping[int, Perplexities], metrics: Mapping[str, Metric]) -> dict[str, dict[int, float]]:
    return {key: {seed: metric(ppl) for seed, ppl in after.items()} for key, metric in metrics.items()}


def _differences(values: ByLabel, ppl: ByLabel, baseline: str) -> dict[str, dict[str, Any]]:
    """Return each label's differences to the baseline: of each metric, and by domain as "ppl".

    The tests of one metric are corrected for one another, and so are those of all domains.
    """
    families = [_family(values, baseline, [metric]) for metric in values[baseline]]
    by_domain = _family(ppl, baseline, list(ppl[baseline]))
    return {
        label: {key: one for family in families for key, one in family[label].items()} | {"ppl": by_domain[label]}
        for label in values
        if label != baseline
    }


def _family(values: ByLabel, baseline: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    cells = [(label, key) for label in values if label != baseline for key in keys]
    tests = corrected([paired_difference(values[label][key], values[baseline][key]) for label, key in cells])
    found: dict[str, dict[str, Any]] = {}
    for (label, key), test in zip(cells, tests, strict=True):
        found.setdefault(label, {})[key] = asdict(test)
    return found


def _by_domain(result: Result, key: str) -> dict[str, float]:
    return {domain["name"]: domain[key] for domain in result.summary["domains"]}


def _mean_ratio(ppl: Perplexities, teacher: Perplexities) -> float:
    return math.fsum(ppl[name] / teacher[name] for name in ppl) / len(ppl)


def _worst(ppl: Perplexities, teacher: Perplexities) -> tuple[float, str]:
    return max((ppl[name] / teacher[name], name) for name in ppl)


def _loss_by_size(ppl: Perplexities, tokens: Mapping[str, int]) -> float:
    return math.fsum(tokens[name] * math.log(ppl[name]) for name in ppl) / sum(tokens[name] for name in ppl)


def _geometric_mean(ppl: Perplexities) -> float:
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
        "controller_s": mean(r.cost.controller_s for r in results),
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


def _ranks_and_versions(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the different versions and numbers of ranks that the runs recorded at their starts."""
    versions: dict[str, set[str]] = {}
    for event in events:
        for name, version in event.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    ranks = sorted({event["world_size"] for event in events if "world_size" in event})
    return {"ranks": ranks, "versions": {name: sorted(values) for name, values in versions.items()}}
