"""The GPU suite without a GPU: it profiles tiny models, and a failed part does not stop the others."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.engine.flops import utilisation
from tools.bench import bench_step, gpu_suite
from tools.bench.gpu_suite import Bench, PartFailed, PartSkipped, run_part
from tools.bench.step_profile import FULL, QUICK, profile_step, step_flops
from tools.bench.step_setting import EACH_OPTION, SIZES, save_byte_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Bench("part", tmp_path, scratch, "cpu", quick=True)


def test_profile_of_tiny_models() -> None:
    outcome = profile_step(replace(QUICK, steps=2, warm_up_steps=1), torch.device("cpu"))
    assert list(outcome["ms"]) == ["teacher_forward", "student_forward", "head", "backward", "optimizer"]
    assert all(value > 0 for value in outcome["ms"].values())
    assert outcome["step_ms"] >= max(outcome["ms"].values())
    assert outcome["tokens"] == 128
    assert outcome["tokens_per_s"] == pytest.approx(128 / outcome["step_ms"] * 1e3)
    assert outcome["loss"][-1] < outcome["loss"][0]  # the same batch again: it learns
    assert outcome["mfu"] is None
    json.dumps(outcome)


def test_flops_are_those_of_the_matmuls() -> None:
    flops = step_flops(FULL)
    teacher_layers, student_layers = 1.31e9, 0.358e9  # parameters without embeddings
    assert flops["teacher_forward"] == pytest.approx(2 * 8192 * teacher_layers, rel=0.07)  # attention on top
    assert flops["student_forward"] == pytest.approx(2 * 8192 * student_layers, rel=0.13)
    assert flops["backward"] == 2 * flops["student_forward"]
    assert flops["head"] == 2 * 8192 * 151936 * (1536 + 3 * 896)
    assert utilisation(989e12, 2.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert utilisation(756e12, 1.0, "NVIDIA H100 PCIe") == 1.0
    assert utilisation(1.0, 1.0, "cpu") is None


def test_a_byte_tokenizer_of_any_size(tmp_path: Path) -> None:
    save_byte_tokenizer(1000, tmp_path / "tokenizer")
    info = load_tokenizer(tmp_path / "tokenizer")
    assert info.vocab_size == 1000
    assert info.eos_token_id == 0
    assert len(info.tokenizer.encode("<|endoftext|> is text").ids) == len("<|endoftext|> is text")


def test_a_command_fails_with_its_last_line(bench: Bench) -> None:
    def work(bench: Bench) -> dict[str, Any]:
        bench.run(sys.executable, "-c", "raise SystemExit('out of memory')")
        return {}

    outcome = run_part(work, bench, 60.0)
    assert outcome["status"] == "failed"
    assert "out of memory; see" in outcome["error"]
    assert "out of memory" in (bench.out / "part.log").read_text()


def test_what_tests_measure_is_in_the_result(bench: Bench) -> None:
    """Also of a test that fails: the number is what the first hour is for."""
    text = """
    import pytest

    @pytest.mark.parametrize("fails", [False, FAILS])
    def test_cores(record_property, fails):
        record_property(f"cores {fails}", 16)
        assert not fails
    """
    tests = bench.scratch / "test_numbers.py"
    tests.write_text(textwrap.dedent(text).replace("FAILS", '""'))
    found = {"test_cores[False]": {"cores False": "16"}, "test_cores[]": {"cores ": "16"}}
    assert gpu_suite.run_tests(replace(bench, deadline=time.monotonic() + 100), str(tests)) == {
        **{"tests": 2, "skipped": 0},
        "measured": found,
    }
    tests.write_text(textwrap.dedent(text).replace("FAILS", "True"))
    outcome = run_part(lambda bench: gpu_suite.run_tests(bench, str(tests)), bench, 100.0)
    assert outcome["status"] == "failed"
    assert outcome["result"]["measured"]["test_cores[True]"] == {"cores True": "16"}


def test_a_command_ends_at_the_time_limit(bench: Bench) -> None:
    def work(bench: Bench) -> dict[str, Any]:
        bench.run(sys.executable, "-c", "import time; time.sleep(60)")
        return {}

    outcome = run_part(work, bench, 0.5)
    assert "ran past the part's time limit" in outcome["error"]
    assert outcome["seconds"] < 30


def test_every_part_runs_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Bench) -> dict[str, Any]:
        raise PartFailed("2 tests failed", {"measured": {"test_memory": {"reserved": "9 GB"}}})

    def breaks(_: Bench) -> dict[str, Any]:
        raise ZeroDivisionError("by zero")

    def absent(_: Bench) -> dict[str, Any]:
        raise PartSkipped("deepspeed is not installed")

    def works(_: Bench) -> dict[str, Any]:
        return {"tests": 3, "skipped": 1, "measured": {"test_cores": {"cores a rank": "16"}}}

    parts = {"a": (fails, 1.0), "b": (breaks, 1.0), "c": (absent, 1.0), "d": (works, 1.0)}
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    assert gpu_suite.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    outcome = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert [part["status"] for part in outcome["parts"].values()] == ["failed", "failed", "skipped", "passed"]
    assert outcome["parts"]["b"]["error"] == "ZeroDivisionError: by zero"
    assert torch.__version__.startswith(outcome["torch"])
    shown = capsys.readouterr().out
    assert "2 tests failed" in shown and "reserved: 9 GB" in shown
    assert "3 tests, 1 of them skipped" in shown and "cores a rank: 16" in shown
    monkeypatch.setattr(gpu_suite, "PARTS", {"d": (works, 1.0)})
    assert gpu_suite.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("trl_python", [None, Path("/trl/bin/python")])
def test_each_option_of_a_pair(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, quick: bool, trl_python: Path | None
) -> None:
    """One command, which bench_step takes: each option on and off, and TRL's trainers if there is an interpreter."""
    case = {"impl": "kd", "options": ["a.b=1"], "error": None, "tokens_per_s": 5000.0, "over_floor": 0.9, "mfu": 0.41}
    case |= {"reserved_bytes": 61_300_000_000, "parts_s": {"teacher": 0.25}}
    commands = []

    def run(bench: Bench, *command: str) -> None:
        commands.append(command)
        (bench.out / "part.json").write_text(json.dumps({"cases": [case]}))

    monkeypatch.setattr(Bench, "run", run)
    bench = replace(bench, device="cuda", quick=quick, trl_python=trl_python)
    found = gpu_suite.option_benchmark(bench)
    [(_, _, module, *arguments)] = commands
    assert module == "tools.bench.bench_step"
    options = bench_step._parse(arguments)
    assert options.variant == list(EACH_OPTION) and options.ranks == [1] and options.device == "cuda"
    assert options.impl == ["floor", "kd", *(("trl", "trl_gkd") if trl_python else ())]
    assert (options.size, options.vocab) == (("quick", 1000) if quick else ("pair", 151_936))
    assert gpu_suite._summary({"result": found}) == (
        "kd a.b=1: 5,000 tokens/s, 0.90 x floor, MFU 41.0%, 61.3 GB reserved, teacher 250 ms"
    )


def test_the_pair_is_of_7_and_1_5_billion(tmp_path: Path) -> None:
    """Without embeddings, as Qwen2.5 counts its own: 6.53 B and 1.31 B (their biases, 0.1 M, are not here)."""
    for name, billions in (("teacher", 6.53), ("student", 1.31)):
        layers, width, heads, kv_heads, mlp = SIZES["pair"][name]
        attention = 2 * width * width * (1 + kv_heads / heads)
        assert layers * (attention + 3 * width * mlp) / 1e9 == pytest.approx(billions, abs=0.005)


def test_full_size_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--device", "cpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
