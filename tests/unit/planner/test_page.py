"""docs/planning.md shows what its commands print."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from ddk_ds.planner.gpus import GPUS, Gpu, find_gpu
from ddk_ds.planner.known_points import known_points
from tools import plan

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/planning.md").read_text()
EXAMPLE = ["--config", "configs/paper/qwen1.5_14b_to_1.8b.yaml", "--nodes", "2", "--gpus-per-node", "8"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_known_points() -> None:
    for point in known_points():
        numbers = f"{point.measured:,.1f} | {point.simulated:,.1f} | {point.error:+.0%}"
        assert f"| {point.what} | {point.gpus:,} | {numbers} |" in PAGE


def test_the_example(tmp_path: Path) -> None:
    assert " ".join(EXAMPLE) in PAGE
    out = tmp_path / "plan.json"
    assert plan.main([*EXAMPLE, "--gpu", "a100-80g", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    tflops = (f"{found['tflops'][name]:.3e}".replace("e+0", "e") for name in ("cpt", "kd", "ddk"))
    for text in (
        f"{found['device_bytes'] / 1e9:.2f} GB of the {found['usable_bytes'] / 1e9:.0f}",
        f"{found['max_micro_batch']}; {found['max_micro_batch_that_divides']}",
        ", ".join(tflops),
        f"{found['kd_over_cpt']:.3f}, {found['kd_over_cpt'] / 3.68 - 1:.1%} more".replace("%", " %"),
        f"{found['ddk_over_kd']:.4f}",
        f"{found['tokens_per_s']:,.0f} tokens/s, {found['hours']:.1f} hours, {found['gpu_hours']:,.0f} GPU-hours",
        f"{found['shard_bytes'] / 1e9:.0f} GB; {found['read_bytes_per_s'] / 1e6:.1f} MB/s",
        f"{found['checkpoint']['num_bytes'] / 1e9:.1f} GB; {found['checkpoint']['write_s']:.1f} s; "
        f"{found['checkpoint']['pause_s']:.2f} s",
    ):
        assert text in PAGE
    for key in found:
        if key not in ("config", "method", "cluster", "gpu", "parameters", "steps", "tokens", "measurements"):
            assert f"`{key}`" in PAGE, key


def test_the_advice(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert plan.main([*EXAMPLE, "--gpu", "a100-80g", "--json", str(out), "train.micro_batch_samples=16"]) == 0
    for one in json.loads(out.read_text())["advice"]:
        fits = "yes" if one["fits"] else "no"
        assert f"| `{one['change']}` | {one['device_bytes'] / 1e9:.2f} | {fits} |" in PAGE


def test_the_layouts_of_the_teacher() -> None:
    found = re.search(r"python - <<'END'\n(.*?)\n    END", PAGE, re.DOTALL)
    assert found is not None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(re.sub(r"(?m)^    ", "", found[1]), "docs/planning.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line in PAGE


def test_the_gpus(tmp_path: Path) -> None:
    for name, gpu in GPUS.items():
        numbers = (gpu.memory_bytes, gpu.hbm_bytes_per_s, gpu.nvlink_bytes_per_s, gpu.network_bytes_per_s)
        cells = " | ".join(f"{number / 1e9:,.0f}" for number in numbers)
        assert f"| `{name}` | {gpu.peak_flop_per_s / 1e12:.0f} | {cells} |" in PAGE
    example = re.search(r"(?m)^    name: .*\n(?:    .*\n)+", PAGE)
    assert example is not None
    (tmp_path / "gpu.yaml").write_text(re.sub(r"(?m)^    ", "", example[0]))
    given = find_gpu(str(tmp_path / "gpu.yaml")).model_fields_set
    assert given == set(Gpu.model_fields) - {"source"}
