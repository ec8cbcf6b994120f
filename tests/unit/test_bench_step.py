"""tools/bench/bench_step.py measures every case that needs no other environment, and relates the cases."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tools.bench import bench_step
from tools.bench.bench_step import RankFailed, main, relate, wait_for
from tools.bench.step_setting import DOCUMENTS, EACH_OPTION, Case, case_config

SMALL = ["--size", "quick", "--tokens", "128", "--length", "32", "--steps", "2"]


@pytest.mark.long("five measured cases, a minute")
def test_every_case_is_measured(tmp_path: Path) -> None:
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    variant = ["--variant", "teacher.micro_batches_per_pass=2,data.documents=masked"]
    assert main([*SMALL, *variant, "--ranks", "1", "--json", str(out), "--picture", str(picture)]) == 0
    result = json.loads(out.read_text())
    cases = {(found["impl"], *found["options"]): found for found in result["cases"]}
    changed = ("kd", "teacher.micro_batches_per_pass=2", "data.documents=masked")
    assert list(cases) == [("floor",), ("kd",), ("cpt",), ("full_logits",), changed]
    for found in cases.values():
        assert found["error"] is None and found["tokens"] == 128
        assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["step_s"])
        assert found["over_floor"] == pytest.approx(cases[("floor",)]["tokens_per_s"] / found["tokens_per_s"])
        assert found["peak_bytes"] > 10**8 and found["mfu"] is None and found["reserved_bytes"] is None
    assert {"teacher", "forward", "head", "backward", "optimizer"} <= cases[("kd",)]["parts_s"].keys()
    assert "teacher" not in cases[("cpt",)]["parts_s"]
    assert result["commit"] and result["torch"] and picture.stat().st_size > 10_000


def row(impl: str, ranks: int, speed: float | None, **more: Any) -> dict[str, Any]:
    return {"impl": impl, "options": [], "ranks": ranks, "accumulation": 2, "tokens_per_s": speed, **more}


def test_relations() -> None:
    cases = [row("floor", 1, 100.0), row("kd", 1, 80.0), row("kd", 2, 120.0), row("full_logits", 2, None)]
    cases.append(row("kd", 2, 90.0, options=["a=1"]))
    relate(cases)
    assert [found["over_floor"] for found in cases] == [
        1.0,
        1.25,
        pytest.approx(200 / 120),
        None,
        pytest.approx(200 / 90),
    ]
    assert [found["of_linear"] for found in cases] == [1.0, 1.0, 0.75, None, None]


def case(*options: str, precision: str = "bf16") -> Case:
    return Case("kd", "none", 1, 2, 3, 40, 1000, precision, 2, options=options)


def test_each_option_is_one_of_a_run() -> None:
    """`loss.chunk_tokens` and `loss.logits_dtype` reach the head by the same function as in a run."""
    from ddk_ds.train.teacher_store import head_options

    plain = case_config(case())
    changed = [case_config(case(*variant.split(","))) for variant in EACH_OPTION]
    assert all(config != plain for config in changed) and len(changed) == len({str(config) for config in changed})
    heads = [head_options(config, 1000, "cuda") for config in changed]
    assert {(head.chunk_tokens, head.logits_dtype) for head in heads} == {
        (8192, "float32"),
        (8192, "model"),
        (2048, "float32"),
    }


def test_documents_of_a_sample() -> None:
    from tools.bench.step_cases import sample_positions

    positions = sample_positions(case())
    assert positions is not None and positions.shape == (3, 40)
    for row in positions.tolist():
        assert row[0] == 0 and row.count(0) == DOCUMENTS
        assert all(after in (0, before + 1) for before, after in pairwise(row))
    assert len({tuple(row) for row in positions.tolist()}) == 3


def test_an_option_that_does_not_run_here_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case, options: Any) -> dict[str, Any]:
        raise RankFailed("kd on 1 ranks: rank 0 ended with 1:\nTraceback\nConfigError: FP8 products need 8.9")

    monkeypatch.setattr(bench_step, "_start", fails)
    found = bench_step._measure(case("teacher.quantize=fp8"), None, "cpu")  # type: ignore[arg-type]
    assert found["error"] == "ConfigError: FP8 products need 8.9" and found["tokens_per_s"] is None
    with pytest.raises(RankFailed):
        bench_step._measure(case(), None, "cpu")  # type: ignore[arg-type]
    found = bench_step._measure(case("teacher.quantize=fp8", precision="fp32"), None, "cpu")  # type: ignore[arg-type]
    assert "set train.precision to bf16" in found["error"]


def test_a_rank_that_fails_ends_the_others() -> None:
    commands = ("import time; time.sleep(600)", "raise SystemExit(3)")
    workers = [subprocess.Popen([sys.executable, "-c", command]) for command in commands]
    started = time.monotonic()
    assert wait_for(workers) == {1: 3}
    assert time.monotonic() - started < 60 and all(worker.poll() is not None for worker in workers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "trl"], "--trl-python"),
        (["--vocab", "100"], "--vocab 100"),
        (["--ranks", "0"], "--ranks"),
        (["--tokens", "100"], "--tokens 100"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "student.leaf=1"], "student.leaf"),
        (["--trl-python", "/nowhere/python"], "cannot be run"),
        (["--trl-python", sys.executable], "cannot import what TRL's cases need"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes before any case is measured."""
    assert main([*SMALL, "--impl", "floor", *(["trl"] if "--trl-python" in arguments else []), *arguments]) == 2
    assert message in capsys.readouterr().err
