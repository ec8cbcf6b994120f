"""A run's directory with a generated ledger, in the form that the loop writes, for tests that only read it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddk_ds.config import make_config, to_yaml

DOMAINS = ("python", "cpp", "mathematics", "licence")
TOKENS_A_STEP = 16 * 255


def make_run(
    folder: Path,
    *,
    name: str = "made",
    steps: int = 60,
    interval_steps: int = 10,
    domains: Sequence[str] = DOMAINS,
    teacher: bool = True,
    finished: bool = True,
    events: Sequence[dict[str, Any]] = (),
    seed: int = 0,
    held_out: int = 500,
    better: float = 0.0,
    identity: dict[str, Any] | None = None,
) -> Path:
    """Write <folder>/<name> and return it; if it is not finished, the last interval has no end.

    The student's last perplexities are `better` (a share) lower than else, and other numbers come from `seed`.
    """
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    method = {"method": "ddk", "teacher": {"path": "models/teacher"}} if teacher else {"method": "cpt"}
    mixture = {"interval_steps": interval_steps} | ({} if teacher else {"controller": "equal"})
    config = make_config(
        {
            "name": name,
            "output_dir": str(folder),
            "student": {"path": "models/student"},
            "seed": seed,
            "data": {"path": "shards", "sequence_length": 256, "validation_samples": held_out},
            "mixture": mixture,
            "train": {"global_batch_samples": 16, "micro_batch_samples": 4},
            "optimizer": {"warmup_steps": 1 if steps < 2000 else 1000},
            "stop": {"steps": max(2, steps)},
            **method,
        },
        "made_run",
    )
    (run_dir / "config.yaml").write_text(to_yaml(config))
    known = {"format": 4, "seed": seed, "method": config.method, "content.tokenizer": "t", "content.student": "s"}
    known |= {f"data.{key}": getattr(config.data, key) for key in ("validation_samples", "sequence_length")}
    known |= {"mixture.controller": config.mixture.controller, "stop.steps": config.stop.steps}
    known |= {f"content.domains.{domain}": f"train-{domain}/held-out-{domain}" for domain in domains}
    (run_dir / "run.json").write_text(json.dumps(known | {"variant": better} | (identity or {})))
    records = list(_records(steps, interval_steps, domains, teacher=teacher, seed=seed, better=better))
    if not finished and records[-1]["kind"] == "end":
        records.pop()
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokens = dict.fromkeys(domains, 1_000_000)
    start = {"event": "start", "time_s": 1.79e9, "world_size": 2, "versions": {"torch": "2.9.0", "ddk_ds": "0.0"}}
    start["mixture"] = {"train_tokens": tokens, "schedule": None}
    end = [{"event": "end", "time_s": 1.79e9 + 2 * steps, "step": steps, "reason": f"{steps} steps done"}]
    lines = [start, *events, *(end if finished else [])]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (run_dir / "summary.json").write_text(json.dumps(_summary(name, records)))
    return run_dir


def _records(
    steps: int, interval_steps: int, domains: Sequence[str], *, teacher: bool, seed: int, better: float
) -> Any:
    rng, total = np.random.default_rng(seed), np.zeros(len(domains))
    factor = 1 - better + 0.01 * seed
    for step in range(steps + 1):
        if step % interval_steps == 0 or step == steps:
            shares = rng.dirichlet(np.full(len(domains), 20.0))
            scale = factor if step else 1.0
            yield _measurement(step, interval_steps, domains, shares, total, scale, teacher=teacher, end=step == steps)
        if step == steps:
            return
        tokens = np.round(TOKENS_A_STEP * shares)
        tokens[0] += TOKENS_A_STEP - tokens.sum()
        total += tokens
        ce, kl = 3 + 4 * math.exp(-3 * step / steps) + rng.normal(0, 0.1), 0.5 * rng.random() if teacher else 0.0
        step_s = 1.0 + 0.1 * rng.random()
        yield {
            "kind": "step",
            "step": step + 1,
            "interval": step // interval_steps,
            "loss": ce + kl,
            "ce": ce,
            "kl": kl,
            "grad_norm": rng.lognormal(0, 0.3),
            "domain_tokens": [int(count) for count in tokens],
            "learning_rate": 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps)),
            "clock": {
                "step_s": round(step_s, 4),
                "data_s": round(0.02 * step_s, 4),
                "sync_s": round(0.01 * step_s, 4),
                **({key: round(0.15 * step_s, 4) for key in ("teacher_s", "teacher_gather_s")} if teacher else {}),
                "forward_s": round(0.1 * step_s, 4),
                "head_s": round(0.1 * step_s, 4),
                "backward_s": round(0.3 * step_s, 4),
                "gather_s": round(0.06 * step_s, 4),
                "reduce_s": round(0.03 * step_s, 4),
                "optimizer_s": round(0.05 * step_s, 4),
                "monitor_s": 0.0001,
                "tokens_per_s": round(TOKENS_A_STEP / step_s, 1),
                "mfu": 0.41,
                "peak_memory_gb": 11.5,
                "peak_gb": {"forward": 9.0, "head": 11.5, "backward": 10.25},
            },
        }


def _measurement(
    step: int,
    interval_steps: int,
    domains: Sequence[str],
    shares: Any,
    total: Any,
    scale: float,
    *,
    teacher: bool,
    end: bool,
) -> dict[str, Any]:
    def by_domain(values: Any) -> dict[str, Any]:
        return dict(zip(domains, np.asarray(values).tolist(), strict=True))

    theirs = 10.0 + 3 * np.arange(len(domains))
    ours = scale * theirs * (1.05 + (2 + np.arange(len(domains))) * math.exp(-step / (20 * interval_steps)))
    counts = None if end else by_domain(np.round(shares * 16 * interval_steps).astype(int))
    return {
        "kind": "end" if end else "interval",
        "interval": step // interval_steps - end,
        "step": step,
        "student_ppl": by_domain(ours),
        "teacher_ppl": by_domain(theirs) if teacher else None,
        "ratio": by_domain(ours / theirs) if teacher else None,
        "smoothed_ppl": None,
        "proportions": None if end else by_domain(shares),
        "asked": counts,
        "counts": counts,
        "log_proportions": None,
        "owed": None if end else dict.fromkeys(domains, 0.0),
        "domain_tokens": by_domain(total.astype(int)),
        "ids_sha": None if end else "0" * 64,
        "alarms": [],
        "clock": {"measure_s": 4.0} | ({} if end else {"controller_s": 0.002}),
    }


def _summary(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = records[0], records[-1]
    total = sum(last["domain_tokens"].values())

    def ratio(record: dict[str, Any], domain: str) -> float | None:
        return None if record["ratio"] is None else record["ratio"][domain]

    def mean(record: dict[str, Any]) -> float | None:
        return None if record["ratio"] is None else sum(record["ratio"].values()) / len(record["ratio"])

    return {
        "run": name,
        "controller": "ddk",
        "domains": [
            {
                "name": domain,
                "teacher_ppl": None if last["teacher_ppl"] is None else last["teacher_ppl"][domain],
                "student_ppl_before": value,
                "student_ppl_after": last["student_ppl"][domain],
                "ratio_before": ratio(first, domain),
                "ratio_after": ratio(last, domain),
                "tokens": last["domain_tokens"][domain],
                "token_share": last["domain_tokens"][domain] / max(1, total),
            }
            for domain, value in first["student_ppl"].items()
        ],
        "mean_ratio_before": mean(first),
        "mean_ratio_after": mean(last),
        "steps": last["step"],
        "tokens": total,
        "wall_s": 100.0,
        "reason": f"{last['step']} steps done",
    }
