"""tools/bench/bench_step.py measures every case that needs no other environment, and relates the cases."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.bench.bench_step import main, relate, wait_for

SMALL = ["--size", "quick", "--tokens", "128", "--length", "32", "--steps", "2"]


@pytest.mark.long("five measured cases, a minute")
def test_every_case_is_measured(tmp_path: Path) -> None:
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    variant = ["--variant", "teacher.micro_batches_per_pass=2,student.gradient_checkpointing=selective"]
    assert main([*SMALL, *variant, "--ranks", "1", "--json", str(out), "--picture", str(picture)]) == 0
    result = json.loads(out.read_text())
    cases = {(case["impl"], *case["options"]): case for case in result["cases"]}
    changed = ("kd", "teacher.micro_batches_per_pass=2", "student.gradient_checkpointing=selective")
    assert list(cases) == [("floor",), ("kd",), ("cpt",), ("full_logits",), changed]
    for case in cases.values():
        assert case["error"] is None and case["tokens"] == 128
        assert case["tokens_per_s"] == pytest.approx(case["tokens"] / case["step_s"])
        assert case["over_floor"] == pytest.approx(cases[("floor",)]["tokens_per_s"] / case["tokens_per_s"])
        assert case["peak_bytes"] > 10**8 and case["mfu"] is None
    assert {"teacher", "forward", "head", "backward", "optimizer"} <= cases[("kd",)]["parts_s"].keys()
    assert "teacher" not in cases[("cpt",)]["parts_s"]
    assert result["commit"] and result["torch"] and picture.stat().st_size > 10_000


def row(impl: str, ranks: int, speed: float | None, **more: Any) -> dict[str, Any]:
    return {"impl": impl, "options": [], "ranks": ranks, "accumulation": 2, "tokens_per_s": speed, **more}


def test_relations() -> None:
    cases = [row("floor", 1, 100.0), row("kd", 1, 80.0), row("kd", 2, 120.0), row("full_logits", 2, None)]
    cases.append(row("kd", 2, 90.0, options=["a=1"]))
    relate(cases)
    assert [case["over_floor"] for case in cases] == [
        1.0,
        1.25,
        pytest.approx(200 / 120),
        None,
        pytest.approx(200 / 90),
    ]
    assert [case["of_linear"] for case in cases] == [1.0, 1.0, 0.75, None, None]


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
