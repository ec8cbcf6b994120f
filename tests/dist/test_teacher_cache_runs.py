"""Runs on a cache of their teacher: filled on the way, broken off, by another number of ranks, and only read."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.commands import replay_command
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.teacher_samples import Said
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.dist.teacher_cache_worker import all_samples
from tests.s3_server import S3Server
from tools.bench.small_run import without_clock, write_config

WORKER = "tests.dist.teacher_cache_worker:"


def config(
    workspace: Path, folder: Path, name: str, cache: dict[str, Any] | None, within: str = "world", **more: Any
) -> str:
    teacher: dict[str, Any] = {"path": str(workspace / "teacher"), "shard_within": within}
    if cache is not None:
        teacher["cache"] = {"draws": 16, **cache}
    loss = {"gamma": 2.0, "temperature": 1.5}
    return str(write_config(workspace, folder, name=name, teacher=teacher, loss=loss, **more))


def taught(config_path: str, name: str) -> int | None:
    """Samples that went through the teacher by the clock of the ledger; None where it does not say."""
    lines = [json.loads(line) for line in (run_dir(config_path, name) / "ledger.jsonl").read_text().splitlines()]
    counts = [line["clock"].get("teacher_samples") for line in lines if line["kind"] == "step"]
    return None if None in counts else sum(counts)


def assert_what_if(run: Path, out: Path) -> None:
    """The run's own controller has its proportions and samples, all of which the run has put into its cache."""
    assert replay_command.main([str(run), "--what-if", "--json", str(out)]) == 0
    own, *others = json.loads(out.read_text())["controllers"]
    intervals = [line for line in without_clock(run) if line["kind"] == "interval"]
    assert own["mean_distance"] == 0
    assert [entry["proportions"] for entry in own["intervals"]] == [line["proportions"] for line in intervals]
    assert [entry["counts"] for entry in own["intervals"]] == [line["counts"] for line in intervals]
    assert own["cached"] == own["distinct"]
    assert any(other["cached"] != other["distinct"] for other in others) and len(others) == 9


def assert_same_samples(left: dict[tuple[str, int], Said], right: dict[tuple[str, int], Said]) -> None:
    for place in left.keys() & right.keys():
        assert all(map(np.array_equal, left[place], right[place])), place


def test_however_a_cache_was_filled_runs_on_it_are_equal(workspace: Path, tmp_path: Path) -> None:
    filled, broken, single = (str(tmp_path / f"cache-{name}") for name in ("filled", "broken", "single"))
    first = config(workspace, tmp_path, "first", {"path": filled})
    stopped = config(workspace, tmp_path, "stopped", {"path": broken})
    only_read = config(workspace, tmp_path, "only-read", {"path": filled, "mode": "read_only"})
    starts = {"first": first, "stopped": stopped, "only-read": only_read}
    counts = run_ranks(
        WORKER + "runs",
        2,
        timeout_s=400,
        starts=[(path, 9 if name == "stopped" else None) for name, path in starts.items()],
        names=list(starts),
    )
    assert counts["first"] > 0 and counts["only-read"] == 0, "passes of the teacher in training"
    assert taught(first, "only-read") == 0
    assert_what_if(run_dir(first, "first"), tmp_path / "what-if.json")
    ledgers = {name: without_clock(run_dir(path, name)) for name, path in starts.items()}
    for name in ("stopped", "only-read"):
        assert ledgers[name] == ledgers["first"], name
    samples = all_samples(Path(filled))
    assert_same_samples(samples, all_samples(Path(broken)))
    assert samples.keys() == all_samples(Path(broken)).keys() and len(samples) > 20
    # Micro-batches go through the teacher whole, on both ranks: 10 steps of 8 samples at most.
    assert len(samples) <= (taught(first, "first") or 0) <= 80
    alone = config(workspace, tmp_path, "alone", {"path": single}, "gpu")
    run_ranks(WORKER + "runs", 1, timeout_s=300, starts=[(alone, None)], names=["alone"])
    assert_same_samples(samples, all_samples(Path(single)))


@pytest.mark.long("five runs; test_teacher_cache_content.py has what is kept of a sample, and its loss")
def test_runs_on_a_cache_are_near_those_of_the_teacher(workspace: Path, tmp_path: Path) -> None:
    """And a cache that is full asks the teacher nothing, though it could."""
    caches: dict[str, dict[str, Any] | None] = {
        "first": {"path": str(tmp_path / "cache-first")},
        "exact": {"path": str(tmp_path / "cache-many"), "draws": 1024},
        "live": None,
        "topk": {
            "path": str(tmp_path / "cache-topk"),
            "keep": "topk",
            "top_k": load_manifest(workspace / "shards").vocab_size,
        },
    }
    starts = {name: config(workspace, tmp_path, name, cache) for name, cache in caches.items()}
    starts["again"] = starts["first"]
    given = [(path, None) for path in starts.values()]
    counts = run_ranks(WORKER + "runs", 2, timeout_s=400, starts=given, names=list(starts))
    assert counts["again"] == taught(starts["again"], "again") == 0 and taught(starts["live"], "live") is None
    ledgers = {name: without_clock(run_dir(path, name)) for name, path in starts.items()}
    assert ledgers["again"] == ledgers["first"]
    # Before the first update the students are equal; with many draws the runs stay together.
    kl = {name: np.array([line["kl"] for line in ledgers[name] if line["kind"] == "step"]) for name in starts}
    assert abs(kl["first"][0] / kl["live"][0] - 1) < 0.2
    assert np.abs(kl["exact"] / kl["live"] - 1).max() < 0.03
    assert np.abs(kl["topk"] - kl["live"]).max() < 1e-4, "all tokens; rounded to bfloat16 they are up to 0.0125 off"


@pytest.mark.long("two starts, and all samples; the test before this one has a cache that is filled on the way")
def test_filled_ahead(workspace: Path, tmp_path: Path) -> None:
    """In two calls, broken off and completed: runs that read it are those that filled their own on the way.

    The teacher that fills it lies complete on each rank, the other is sharded."""
    ahead, own = str(tmp_path / "ahead"), str(tmp_path / "own")
    filling = config(workspace, tmp_path, "filling", {"path": ahead}, "gpu")
    few, more, completed, before, after, nothing = run_ranks(
        WORKER + "teach", 2, timeout_s=300, config_path=filling, samples=[3, 7], break_after=40
    )
    sizes = {name: domain.train.samples for name, domain in load_manifest(workspace / "shards").domains.items()}
    assert few.startswith(f"{3 * len(sizes)} samples added") and more.startswith(f"{4 * len(sizes)} samples added")
    assert all(f"7 of {size:,} of {name}" in more for name, size in sizes.items())
    whole, rest = sum(sizes.values()), sum(sizes.values()) - 7 * len(sizes)
    assert int(completed.split()[0].replace(",", "")) < rest
    assert nothing.startswith("0 samples added") and all(f"{n:,} of {n:,} of {d}" in nothing for d, n in sizes.items())
    # What was in complete parts is not computed again; both ranks have about the same number.
    assert before == 40 and rest / 2 - 40 <= after < rest / 2 and len(all_samples(Path(ahead))) == whole
    reading = config(workspace, tmp_path, "reading", {"path": ahead, "mode": "read_only"})
    writing = config(workspace, tmp_path, "writing", {"path": own})
    starts = {"reading": reading, "writing": writing}
    counts = run_ranks(
        WORKER + "runs", 2, timeout_s=300, starts=[(path, None) for path in starts.values()], names=list(starts)
    )
    assert counts["reading"] == 0
    ledgers = [without_clock(run_dir(path, name)) for name, path in starts.items()]
    assert ledgers[0] == ledgers[1]
    assert_same_samples(all_samples(Path(ahead)), all_samples(Path(own)))


@pytest.mark.long("one start; tests/unit/data/test_teacher_cache.py has most refusals")
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(workspace: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = config(workspace, tmp_path, "first", {"path": cache}, stop={"steps": 4})
    warmer = config(workspace, tmp_path, "warmer", {"path": cache})
    Path(warmer).write_text(Path(warmer).read_text().replace("temperature: 1.5", "temperature: 2.0"))
    seeded = config(workspace, tmp_path, "seeded", {"path": cache, "mode": "read_only"}, seed=5)
    nothing = config(workspace, tmp_path, "nothing", {"path": str(tmp_path / "none"), "mode": "read_only"})
    foreign = config(workspace, tmp_path, "foreign", {"path": str(workspace / "student")})
    longer = config(workspace, tmp_path, "longer", {"path": cache, "mode": "read_only"})
    apart = config(workspace, tmp_path, "apart", {"path": cache}, data={"documents": "masked"})
    configs = [warmer, seeded, nothing, foreign, longer, apart]
    errors = run_ranks(WORKER + "errors", 2, timeout_s=300, first=first, configs=configs)
    assert "it was computed with temperature 1.5, the run has 2.0" in errors[0]
    assert "lacks samples that the next interval draws: " in errors[1] and "write_through" in errors[1]
    assert "there is no cache, and teacher.cache.mode is read_only" in errors[2]
    assert "it has no teacher.json, so it is no teacher's cache" in errors[3]
    assert "it was computed with documents None, the run has 'masked'" in errors[5]
    # The cache has the first interval. What was trained on it is saved, and the command that fills the next is named.
    ended = run_dir(longer, "run-4")
    (counts,) = [
        line["counts"] for line in without_clock(ended) if line["kind"] == "interval" and line["interval"] == 0
    ]
    (wanted,) = [
        line["counts"] for line in without_clock(ended) if line["kind"] == "interval" and line["interval"] == 1
    ]
    samples = max(counts[name] + wanted[name] for name in counts if f" of {name}" in errors[4])
    assert f"ddk teach --config {ended / 'config.yaml'} --samples {samples} 'data.domains=[" in errors[4]
    assert (ended / "checkpoints/step-00000004/manifest.json").is_file()


@pytest.mark.long("three starts of two ranks; tests/unit/data/test_teacher_place.py has the faults of a store")
def test_a_cache_in_s3_gives_the_run_of_a_local_one(s3: S3Server, workspace: Path, tmp_path: Path) -> None:
    """Filled by `ddk teach` while the store fails, is down for seconds, and is given up once."""
    data = {"path": str(workspace / "shards"), "cache_dir": str(tmp_path / "node"), "cache_limit_gb": 1.0}
    address = f"{s3.upload(workspace / 'student', 'unused')}/teacher"
    configs = {}
    for name, path in (("local", str(tmp_path / "cache")), ("remote", address)):
        for mode in ("write_through", "read_only"):
            cache = {"path": path, "mode": mode}
            configs[name, mode] = config(workspace, tmp_path, f"{name}-{mode}", cache, data=data)
    impatient = config(workspace, tmp_path, "impatient", {"path": address}, data={**data, "download_patience_s": 0.1})
    s3.breaks_at = "samples.json"
    error = run_ranks(WORKER + "teaching_error", 2, timeout_s=300, path=impatient)
    assert "cannot be uploaded, tried for" in error and "503" in error  # the other rank may be at another file then
    s3.breaks_at, s3.down = "samples.json", False
    error = run_ranks(WORKER + "training_error", 2, timeout_s=300, path=impatient)
    assert "cannot be uploaded, tried for" in error and "503" in error
    assert [path.name for path in (run_dir(impatient, "run") / "checkpoints").iterdir()] == ["step-00000001"]
    s3.down, s3.fail_every = False, 7
    up_again = threading.Thread(target=end_outage, args=(s3, 3.0))
    up_again.start()
    said = run_ranks(
        WORKER + "teach_each",
        2,
        timeout_s=300,
        samples=80,
        configs=[configs["local", "write_through"], configs["remote", "write_through"]],
    )
    up_again.join()
    assert s3.breaks_at is None, "the store was down meanwhile"
    assert said[0].startswith("240 samples added") and said[1].startswith("240 samples added to s3://")
    names = ["local-read_only", "remote-read_only"]
    starts = [(configs[name, "read_only"], None) for name in ("local", "remote")]
    s3.got.clear()
    counts = run_ranks(WORKER + "runs", 2, timeout_s=300, starts=starts, names=names)
    assert counts == dict.fromkeys(names, 0)
    local, remote = (without_clock(run_dir(path, name)) for (path, _), name in zip(starts, names, strict=True))
    assert local == remote
    shards = {key: count for key, count in s3.got.items() if key.endswith(".mds")}
    assert shards and set(shards.values()) == {1}, "once for both ranks of a node"


def end_outage(s3: S3Server, seconds: float) -> None:
    """Let the store go down at the next upload of the last file of a part, and be up again after some seconds."""
    s3.breaks_at = "samples.json"
    while not s3.down:
        time.sleep(0.05)
    time.sleep(seconds)
    s3.breaks_at, s3.down = None, False
