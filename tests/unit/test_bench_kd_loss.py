"""The benchmark of the distillation loss: its float64 result, its peers' conventions, and its files."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from ddk_ds.kernels import Options
from ddk_ds.kernels.reference import reference_kd_loss
from tools.bench import bench_kd_loss, kd_peers
from tools.bench.kd_peers import IMPLEMENTATIONS, Case, Problem

CASE_KEYS = {
    *("impl", "device", "dtype", "n", "vocab", "hidden", "time_s", "rounds_s", "wall_s", "peak_bytes"),
    *("time_over_floor", "time_over_naive", "loss_error", "grad_error", "note"),
}
NEAR_KEYS = {"impl", "device", "dtype", "n", "vocab", "hidden", "kl", "loss_error", "grad_error", "note"}
LOSSES = [
    (name, gamma, temperature)
    for name, one in IMPLEMENTATIONS.items()
    for gamma, temperature in ((0.5, 1.0), (0.7, 2.0), (0.0, 1.0))
    if name not in ("floor_whole", "floor_chunked", "liger_compiled", "quack")  # quack's kernels need a GPU
    and one.teacher != ("never" if gamma else "needed")
]


def problem(gamma: float, temperature: float) -> Problem:
    return kd_peers.make_problem(Case(40, 300, 24, 36, "float32"), "cpu", gamma, temperature)


@pytest.mark.parametrize(("gamma", "temperature", "ce_weight"), [(0.5, 1.0, 1.0), (0.7, 2.0, 1.0), (1.0, 1.0, 0.0)])
def test_truth_is_the_reference(
    gamma: float, temperature: float, ce_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd_peers, "_TRUTH_ELEMENTS", 300 * 16)  # several chunks
    given = problem(gamma, temperature)
    given = kd_peers.Problem(**{**vars(given), "ce_weight": ce_weight})
    leaves = [tensor.double().requires_grad_() for tensor in (given.student_hidden, given.student_weight)]
    expected = reference_kd_loss(
        *leaves,
        given.teacher_hidden,
        given.teacher_weight,
        given.labels,
        num_valid=torch.tensor(40),
        options=Options(300, gamma, temperature, ce_weight=ce_weight),
    )
    target = kd_peers.truth(given)
    assert target.loss == pytest.approx(expected.loss.item(), rel=1e-12)
    assert target.kl == pytest.approx(expected.kl.item(), rel=1e-12)
    for grad, true in zip(target[3:], torch.autograd.grad(expected.loss, leaves), strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "gamma", "temperature"), LOSSES)
def test_every_implementation_computes_the_same_loss(name: str, gamma: float, temperature: float) -> None:
    """Liger's operators too, where it is installed: their kernels run under Triton's interpreter here."""
    given, one = problem(gamma, temperature), IMPLEMENTATIONS[name]
    try:
        result = one.run(given)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
    loss_error, grad_error = kd_peers.errors(result, kd_peers.truth(given), one, given.kd_weight)
    assert loss_error < 1e-6
    assert grad_error < 2e-6


@pytest.mark.long("every case of the benchmark, 10 s of CPU; the peers' numbers are compared above")
def test_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = kd_peers.Implementation(lambda given: __import__("no_such_package"))
    monkeypatch.setitem(IMPLEMENTATIONS, "liger", absent)
    names = ["--only", "floor", "--only", "ours", "--only", "liger"]
    path = tmp_path / "bench.json"
    arguments = ["--case", "64,300,32,48", *names, "--repeats", "1", "--device", "cpu", "--json", str(path)]
    assert bench_kd_loss.main(arguments) == 0
    report = json.loads(path.read_text())
    assert {"device", "cpu_flags", "versions", "cases"} <= report.keys()
    assert report["versions"]["torch"] == version("torch")
    rows = {row["impl"]: row for row in report["cases"]}
    assert list(rows) == ["floor", "ours", "liger"]
    assert all(row.keys() == CASE_KEYS for row in rows.values())
    ours = rows["ours"]
    assert (ours["n"], ours["vocab"], ours["hidden"], ours["dtype"]) == (64, 300, [32, 48], "float32")
    assert ours["loss_error"] < 1e-6
    assert ours["grad_error"] < 2e-6
    assert ours["time_s"] > 0
    assert ours["time_over_floor"] == pytest.approx(ours["time_s"] / rows["floor"]["time_s"])
    assert ours["rounds_s"] == [ours["time_s"]] and rows["liger"]["rounds_s"] is None
    # Both logits of 64 tokens in float32, and not much more.
    assert 0 <= ours["peak_bytes"] < 8 << 20
    assert rows["liger"]["note"] == "not installed: No module named 'no_such_package'"
    assert rows["liger"]["time_s"] is None


def test_cross_entropy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No teacher is read, what needs one has no row, and a layer of a GPU's has a row that says so."""
    monkeypatch.setattr(bench_kd_loss, "_peak_in_child", lambda *_: 0)
    path = tmp_path / "ce.json"
    arguments = ["--case", "64,300,32,48", "--gamma", "0", "--repeats", "1", "--device", "cpu", "--json", str(path)]
    names = ["--only", "ours", "--only", "trl", "--only", "liger_ops", "--only", "quack"]
    assert bench_kd_loss.main([*arguments, *names]) == 0
    report = json.loads(path.read_text())
    ours, quack = report["cases"]
    assert (ours["impl"], quack["impl"], report["gamma"]) == ("ours", "quack", 0)
    assert ours["loss_error"] < 1e-6 and ours["grad_error"] < 2e-6
    assert (quack["time_s"], quack["note"]) == (None, "not measured: its kernels need a GPU")
    given = problem(0.0, 1.0)
    unread = kd_peers.Problem(**{**vars(given), "teacher_hidden": None, "teacher_weight": None})
    IMPLEMENTATIONS["naive"].run(unread)


def test_the_time_of_kernels() -> None:
    """On a CPU of operators: a call's matmuls are among them, and all together take no more than the call."""
    given = problem(0.5, 1.0)
    started = time.perf_counter()
    found = bench_kd_loss.kernel_seconds(IMPLEMENTATIONS["naive"].run, given)
    wall_s = time.perf_counter() - started
    assert found["aten::mm"] > 0 and sum(found.values()) < wall_s
    assert len(found) == 10 and list(found.values()) == sorted(found.values(), reverse=True)


def test_a_ratio_is_of_the_same_round() -> None:
    """A neighbour slows the second round of three down by ten; of the medians, 3.3 and 2, the ratio would be 1.65."""
    assert bench_kd_loss.ratio([1.1, 20.0, 3.3], [1.0, 20.0, 2.0]) == pytest.approx(1.1)


def test_near_the_teacher(tmp_path: Path) -> None:
    path = tmp_path / "near.json"
    case = ["--case", "64,300,32,32,bfloat16", "--only", "ours", "--only", "naive", "--device", "cpu"]
    assert bench_kd_loss.main(["--near-teacher", *case, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["near_teacher"]
    assert all(row.keys() == NEAR_KEYS for row in rows)
    ours = [row for row in rows if row["impl"] == "ours"]
    assert len(ours) == 9
    assert max(row["grad_error"] for row in ours) < 5e-3
    assert max(row["loss_error"] for row in ours) < 1e-4
    assert ours[-1]["kl"] < 2e-4 < 1 < ours[0]["kl"]
    assert next(row for row in rows[::-1] if row["impl"] == "naive")["grad_error"] > 0.1  # bf16 logits are not enough


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "near.png"
    case = ["--case", "16,300,32,32,bfloat16", "--only", "ours", "--device", "cpu"]
    assert bench_kd_loss.main(["--near-teacher", *case, "--picture", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "64,300,32"],
        ["--case", "64,300,32,48,int8"],
        ["--case", "64,300,0,48"],
        ["--near-teacher", "--case", "64,300,32,48"],
        ["--near-teacher", "--only", "floor"],
        ["--case", "64,300,32,48", "--gamma", "0", "--only", "trl"],
        ["--case", "64,300,32,48", "--only", "quack"],
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kd_loss.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --")
