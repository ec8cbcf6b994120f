"""`make demo`: its commands fit the tools and configurations, and tools/bench/demo_seeds.py reads its runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools.bench import demo_seeds
from tools.bench.docs_check import Command, command_faults

FRONT_DOORS = {
    "tokenizer": "python tools/train_tokenizer.py",
    "prepare": "python tools/prepare_data.py",
    "distill": "deepspeed launch/distill.py",
    "report": "python tools/report.py",
}


def test_its_commands_are_right_and_in_order(tmp_path: Path) -> None:
    clone = demo_seeds.linked_clone(tmp_path / "clone")  # in which nothing is made yet
    done = ["-o", ".venv/.ready", "-o", ".venv/.installed"]  # make leaves set-up alone
    command = ["make", "-n", "--no-print-directory", *done, "runs/demo/report/report.html", "SEED=7"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    printed = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in printed.replace("\\\n", " ").splitlines() if not line.startswith("echo ")]
    lines = [line.split(" > ")[0].replace(".venv/bin/", "") for line in lines]
    tools = [" ".join(line.split()).replace("OMP_NUM_THREADS=1 ", "") for line in lines]
    assert len(tools) == 10
    for tool in tools:
        program, name, arguments = tool.split(" ", 2)
        assert program == "ddk", tool
        if name != "init":  # whose --config is a model's, not a run's
            assert (
                command_faults(Command(1, f"{FRONT_DOORS[name]} {arguments}".replace("--ranks", "--local_rank"))) == []
            )
    runs = [tool for tool in tools if tool.startswith("ddk distill")]
    assert all("seed=7" in run for run in runs)
    first = {name: next(i for i, run in enumerate(runs) if name in run) for name in ("teacher.yaml", "student.yaml")}
    assert set(first.values()) == {0, 1}
    assert "--ranks 2 " in runs[4] and "demo.yaml" in runs[4]  # DDK, after all it needs


def test_the_tables_of_three_seeds() -> None:
    # Largest ratios 3.0, 3.2, 3.4 and 5.0, 5.3, 5.6: differences -2.0, -2.1, -2.2; t(2) = 4.303, sd 0.1.
    by_seed = {
        seed: {
            "DDK": run(mean=2.0, ratios=[3.0 + 0.2 * i, 1.0]),
            "equal sampling": run(mean=2.5, ratios=[5.0 + 0.3 * i, 1.0]),
            "KD by size": run(mean=2.0 + (-1) ** i, ratios=[7.0, 1.0]),
        }
        for i, seed in enumerate((1, 2, 3))
    }
    lines = demo_seeds.tables(by_seed).splitlines()
    assert "| largest ratio | DDK | 3.000 | 3.200 | 3.400 | 3.200 | 0.200 |" in lines
    assert "| largest ratio | equal sampling | -2.100 | -2.348 to -1.852 | exceeds the spread |" in lines
    # 1, -1, 1 and so on: the differences -1, 1, -1 have the mean -1/3 and the sd 1.1547.
    assert "| mean ratio | KD by size | -0.333 | -3.202 to 2.535 | does not exceed the spread |" in lines
    assert "| cpp | 10.0 | 9.000 | 3.200 | 5.300 | 7.000 | 40.0 % |" in lines


def run(*, mean: float, ratios: list[float]) -> dict[str, object]:
    domains = [
        {"name": name, "teacher_ppl": 10.0, "ratio_before": 9.0, "ratio_after": ratio, "token_share": 0.4}
        for name, ratio in zip(("cpp", "json"), ratios, strict=True)
    ]
    return {"mean_ratio_after": mean, "max_ratio_after": max(ratios), "domains": domains}


def test_a_clone_by_links_keeps_its_runs_apart(tmp_path: Path) -> None:
    clone = demo_seeds.linked_clone(tmp_path / "1")
    assert (clone / "ddk_ds").is_symlink() and not (clone / "configs").is_symlink()
    assert not (clone / "runs").exists()
    assert demo_seeds.linked_clone(tmp_path / "1") == clone  # a second start finds it
