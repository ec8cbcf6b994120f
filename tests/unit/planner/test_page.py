"""docs/planning.md shows what its commands print."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.commands import plan_command as plan
from ddk_ds.planner.gpus import GPUS, Gpu, find_gpu
from ddk_ds.planner.known_points import known_points
from ddk_ds.planner.simulations import LAYOUTS, LayoutPoint, advised
from tools.bench.docs_check import commands

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/planning.md").read_text()
EXAMPLE = ["--config", "configs/paper/qwen1.5_14b_to_1.8b.yaml", "--nodes", "2", "--gpus-per-node", "8"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_known_points() -> None:
    for point in known_points():
        numbers = f"{point.measured:,.1f} | {point.simulated:,.1f} | {point.error:+.0%}"
        assert f"| {point.name} | {point.gpus:,} | {numbers} |" in PAGE


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


def variants_of(out: Path, number: int, pair: str = "qwen1.5") -> list[tuple[list[str], list[dict[str, Any]]]]:
    """Run the page's commands for a pair that vary `number` options; words of each, and what it wrote as JSON."""
    results = []
    for command in commands(PAGE):
        words = command.words[2:]
        if words.count("--vary") == number and any(f"/{pair}" in word for word in words):
            assert plan.main([*words, "--json", str(out)]) == 0
            results.append((words, json.loads(out.read_text())["variants"]))
    return results


def test_two_options_varied(tmp_path: Path) -> None:
    """Where the teacher lies by micro-batches a pass, FP8 by compiled layers, and by the dtype of sums over ranks."""
    found = [variants for _, variants in variants_of(tmp_path / "plan.json", 2)]
    assert [len(variants) for variants in found] == [6, 8, 4]
    for variant in chain(*found):
        first, second = (item.partition("=")[2] for item in variant["overrides"])
        assert f"| {first} | {second} | {variant['tokens_per_s']:,.0f} |" in PAGE


def test_communication_that_nothing_hides(tmp_path: Path) -> None:
    rows = []
    for words, variants in variants_of(tmp_path / "plan.json", 1):
        link, nodes = (words[words.index(option) + 1] for option in ("--link-gb-s", "--nodes"))
        for variant in variants:
            [within] = (item.partition("=")[2] for item in variant["overrides"])
            shares = " | ".join(f"{variant['not_hidden'][model]:.1%}" for model in ("teacher", "student"))
            rows.append(f"| {link} | {8 * int(nodes)} | {within} | {shares} |")
    assert len(rows) == 6
    for row in rows:
        assert row in PAGE


def test_faster_steps(tmp_path: Path) -> None:
    """The page's table of three pairs on 16 and 64 GPUs: its rows are the plans' own."""
    out = tmp_path / "plan.json"
    for pair in ("paper/qwen1.5_14b_to_1.8b", "pairs/qwen3_32b_to_4b", "pairs/qwen3_30b_a3b_to_1.7b"):
        for nodes in ("2", "8"):
            command = ["--config", f"configs/{pair}.yaml", "--nodes", nodes, "--gpus-per-node", "8", "--gpu", "h100"]
            assert plan.main([*command, "train.micro_batch_samples=4", "--json", str(out)]) == 0
            found = json.loads(out.read_text())
            for row in faster_rows(pair.partition("/")[2], 8 * int(nodes), found):
                assert row in PAGE


def faster_rows(pair: str, gpus: int, found: dict[str, Any]) -> list[str]:
    """Return the page's rows of a plan's JSON: the configured step, and each faster one."""
    step = found["simulated_step"]
    rows = [f"| `{pair}` | {gpus} | as configured | {step['seconds']:.3f} | {step['tokens_per_s']:,.0f} | |"]
    for one in found["faster"]:
        words = dict(word.split("=") for word in one["change"].split())
        form = words.get("teacher.quantize", "none")
        what = f"compiled, {form}, {words['teacher.shard_within']}"
        rows.append(
            f"| `{pair}` | {gpus} | {what} | {one['step_s']:.3f} | {one['tokens_per_s']:,.0f} | {one['times']:.2f} |"
        )
    return rows


def test_a_mixture_of_experts_on_a_slow_network(tmp_path: Path) -> None:
    [(words, variants)] = variants_of(tmp_path / "plan.json", 1, "qwen3_30b_a3b")
    assert words[words.index("--link-gb-s") + 1] == "3" and len(variants) == 3
    for variant in variants:
        [within] = (item.partition("=")[2] for item in variant["overrides"])
        waits = f"{variant['not_hidden']['teacher']:.1%}"
        fits = "yes" if variant["fits"] else "no"
        assert f"| 3 | {within} | {variant['step_s']:.3f} | {variant['tokens_per_s']:,.0f} | {waits} | {fits} |" in PAGE


def test_layouts_by_size_and_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "layouts.png", tmp_path / "plan.json"
    command = [*EXAMPLE, "--gpu", "a100-80g", "--layouts", str(picture), "--json", str(out)]
    assert plan.main(command) == 0 and picture.stat().st_size > 10_000
    points = [LayoutPoint(**point) for point in json.loads(out.read_text())["layouts"]]
    assert {(point.link_bytes_per_s, point.gpus) for point in points} == {
        (link, 2**power) for link in (3e9, 25e9, 100e9) for power in range(3, 11)
    }
    printed = capsys.readouterr().out
    for start in range(0, len(points), len(LAYOUTS)):
        row = points[start : start + len(LAYOUTS)]
        cells = [f"{one.tokens_per_s_per_gpu:,.0f}{'' if one.fits else ' (no)'}" for one in row]
        best = advised(row)
        assert best is not None
        several = f", {best.micro_batches_per_pass} a pass" if best.micro_batches_per_pass > 1 else ""
        known = [f"{row[0].link_bytes_per_s / 1e9:g}", f"{row[0].gpus:,}", *cells, f"{best.shard_within}{several}"]
        assert row[0].quantize != "none" or f"| {' | '.join(known)} |" in PAGE
        assert all(cell in printed for cell in known)


def test_no_layouts_without_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["method=cpt", "teacher=null", "mixture.controller=equal"]
    assert plan.main([*EXAMPLE, "--gpu", "a100-80g", "--layouts", "none.png", *changes]) == 2
    assert "--layouts: method cpt has no teacher" in capsys.readouterr().err


def test_advice_is_the_fastest_that_fits_and_of_equals_the_smallest() -> None:
    def point(speed: float, device_bytes: int, *, fits: bool = True) -> LayoutPoint:
        return LayoutPoint(3e9, 8, "none", "node", 1, speed, device_bytes, fits, False)

    small, fast, large = point(100.0, 10), point(110.0, 30), point(109.5, 20)
    assert advised([small, fast, large]) == large
    assert advised([small, point(200.0, 5, fits=False)]) == small
    assert advised([point(1.0, 1, fits=False)]) is None


def test_the_gpus(tmp_path: Path) -> None:
    for name, gpu in GPUS.items():
        numbers = (gpu.memory_bytes, gpu.hbm_bytes_per_s, gpu.nvlink_bytes_per_s, gpu.network_bytes_per_s)
        cells = " | ".join(f"{number / 1e9:,.0f}" for number in numbers)
        peaks = [gpu.fp8_peak_flop_per_s, gpu.int8_peak_flop_per_s]
        eight = " | ".join("-" if peak is None else f"{peak / 1e12:,.0f}" for peak in peaks)
        assert f"| `{name}` | {gpu.peak_flop_per_s / 1e12:.0f} | {cells} | {eight} |" in PAGE
    example = re.search(r"(?m)^    name: .*\n(?:    .*\n)+", PAGE)
    assert example is not None
    (tmp_path / "gpu.yaml").write_text(re.sub(r"(?m)^    ", "", example[0]))
    given = find_gpu(str(tmp_path / "gpu.yaml")).model_fields_set
    assert given == set(Gpu.model_fields) - {"source"}
