"""Monitors have the numbers of the ledger under the same names, and a replay makes the same decisions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddk_ds.commands import replay_command as replay
from ddk_ds.run_files import read_ledger
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.wandb_file import wandb_series
from tools.bench.small_run import write_config

pytestmark = pytest.mark.long("two runs with every monitor, 24 s of CPU; each monitor has unit tests")

DOMAINS = ("cpp", "mathematics", "python")
# The tiny student's tensors are never partitioned, so that none is gathered.
PARTS = ("data", "sync", "teacher", "teacher_gather", "forward", "head", "backward", "reduce", "optimizer")


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run with all monitors that broke off and was resumed."""
    folder = tmp_path_factory.mktemp("monitored")
    # Each domain's ratio differs: without cap and floor, decisions are sharp enough to tell options apart.
    config = write_config(
        workspace,
        folder,
        mixture={"interval_steps": 2},
        stop={"steps": 6},
        checkpoint={"every_steps": 2},
        monitor={
            "tensorboard": True,
            "csv": True,
            "wandb_project": "ddk",
            "prometheus_file": str(folder / "run.prom"),
            "every_s": 0.0,
        },
    )
    # The ledger has an interval, two steps, an interval, a step. All after step 2 is done again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run_ranks("tests.dist.resume_worker:run_all", 1, starts=[(str(config), "run", 5)])
    return run_dir(str(config), "run")


def series(run: Path, key: str) -> dict[int, float]:
    """Return the values of a key in the step lines of the ledger, by step."""
    return {line["step"]: line[key] for line in read_ledger(run) if line["kind"] == "step"}


def test_the_parts_add_up_to_the_step(run: Path) -> None:
    clocks = [line["clock"] for line in read_ledger(run) if line["kind"] == "step"]
    for clock in clocks:
        parts = {name: clock[f"{name}_s"] for name in PARTS}
        may_be_there = ("data", "teacher_gather")  # a wait of less than 0.05 ms is 0.0
        assert all(seconds > 0 or name in may_be_there for name, seconds in parts.items()), parts
        # Tiny models: much is Python's. Each part is rounded to 0.1 ms.
        assert 0.5 * clock["step_s"] < sum(parts.values()) <= clock["step_s"] + 1e-3
        assert clock["mfu"] is None, "a CPU has no peak to compare with"
        assert clock["peak_memory_gb"] == max(clock["peak_gb"].values())
        assert {"teacher", "forward", "head", "backward", "optimizer"} <= set(clock["peak_gb"])


def test_tensorboard(run: Path) -> None:
    events = EventAccumulator(str(run / "monitor/tensorboard")).Reload()
    found = {point.step: point.value for point in events.Scalars("loss/total")}
    assert found == pytest.approx(series(run, "loss"))
    assert {f"ratio/{name}" for name in DOMAINS} <= set(events.Tags()["scalars"])


def test_csv_has_each_step_once(run: Path) -> None:
    def rows(name: str) -> list[list[str]]:
        with (run / f"monitor/csv/{name}.csv").open(newline="") as stream:
            return list(csv.reader(stream))

    assert rows("loss_ce") == [["step", "ce"], *([str(step), str(value)] for step, value in series(run, "ce").items())]
    intervals = [line for line in read_ledger(run) if line["kind"] == "interval"]
    shares = [[str(line["step"]), str(line["proportions"]["cpp"])] for line in intervals]
    assert rows("proportion_cpp") == [["step", "cpp"], *shares]


def test_weights_and_biases_offline(run: Path) -> None:
    assert wandb_series(run, "loss/total") == series(run, "loss")


def test_prometheus_has_the_newest_values(run: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    text = (run.parents[1] / "run.prom").read_text()
    samples = {
        (sample.name, sample.labels.get("domain")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    ledger = read_ledger(run)
    assert samples["ddk_ds_run_step", None] == 6
    assert samples["ddk_ds_loss_total", None] == ledger[-2]["loss"]
    for name in DOMAINS:
        assert samples["ddk_ds_ratio", name] == ledger[-1]["ratio"][name]


def test_a_steps_parts_add_up(run: Path) -> None:
    for line in read_ledger(run):
        if line["kind"] == "step":
            clock = line["clock"]
            parts = sum(clock[f"{part}_s"] for part in ("data", "teacher", "forward", "backward", "optimizer"))
            assert min(clock[f"{part}_s"] for part in ("teacher", "forward", "backward", "optimizer")) > 0
            assert 0.4 * clock["step_s"] < parts <= clock["step_s"] + 1e-3
            assert clock["monitor_s"] >= 0


def test_decisions_come_out_equal_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(run)]) == 0
    assert "3 of 3 decisions come out equal to the last bit" in capsys.readouterr().out


def test_other_options_decide_otherwise(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "replay.json", tmp_path / "replay.png"
    assert replay.main([str(run), "alpha=0", "--json", str(out), "--picture", str(picture)]) == 0
    assert "cpp" in capsys.readouterr().out
    rows = json.loads(out.read_text())["intervals"]
    # Eq. 1 begins both; with alpha 0 Eq. 2 leaves equal proportions.
    assert rows[0]["otherwise"] == rows[0]["proportions"]
    for row in rows[1:]:
        assert row["otherwise"] == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3))
        assert row["proportions"] != row["otherwise"]
    assert picture.stat().st_size > 5_000


def test_an_edited_ledger_is_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    second: dict[str, Any] = [line for line in lines if line["kind"] == "interval"][1]
    second["student_ppl"]["cpp"] *= 1 + 1e-12
    for name in ("config.yaml", "events.jsonl"):
        (tmp_path / name).write_text((run / name).read_text())
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay.main([str(tmp_path)]) == 1
    assert "NOT equal: intervals 1;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alpah=0.3"], "mixture.alpah=0.3: unknown key, did you mean mixture.alpha=...?"),
        (["alpha=3"], "mixture.alpha"),
        (["controller=static"], "mixture.proportions"),
        (["controller=schedule", "schedule_file=none.yaml"], "none.yaml"),
    ],
)
def test_a_wrong_option_is_named(
    run: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay.main([str(run), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(tmp_path)]) == 2
    assert "is" in capsys.readouterr().err
