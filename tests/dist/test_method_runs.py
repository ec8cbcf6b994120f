"""Complete runs of the methods: interrupted and resumed they are the same, and one method uses files of another."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ddk_ds.config import load_config
from ddk_ds.engine.filters import filter_shape
from ddk_ds.engine.model_files import read_model
from ddk_ds.errors import ConfigError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.report.replayed_decisions import read_recorded_run, replay
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tools.bench.small_run import without_clock, write_config

pytestmark = pytest.mark.long("twelve runs, 50 s of CPU; test_resume.py interrupts DDK, the default")

MIXTURE: dict[str, Any] = {"interval_steps": 2, "ratio_cap": None, "initial_floor": 0.0}
FLOORS = dict.fromkeys(("python", "cpp", "mathematics"), 0.13)
WEIGHTED = {"controller": "odm", "source": "training", "loss_weights": "by_size", "floors": FLOORS}
SHORT: dict[str, Any] = {"mixture": MIXTURE, "stop": {"steps": 4}, "checkpoint": {"every_steps": 2}}


@pytest.fixture(scope="module")
def configs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return configurations by name, run on two ranks; `twice` ran uninterrupted, and interrupted and resumed."""
    folder = tmp_path_factory.mktemp("methods")
    filters = str(folder / "ted_filters/runs/broken/export/filters.safetensors")
    twice: dict[str, dict[str, Any]] = {
        "doremi_proxy": {"method": "doremi_proxy"},
        "ted_filters": {"method": "ted_filters"},
        "ted": {"method": "ted", "ted": {"filters": filters, "weight": 0.5}},
        "weighted": {"method": "ddk", "mixture": {**MIXTURE, **WEIGHTED}},
    }
    once: dict[str, dict[str, Any]] = {
        "kd": {"method": "kd", "loss": {"gamma": 0.0}},
        "cpt": {"method": "cpt", "teacher": None},
        "ddk": {"method": "ddk", "mixture": {**MIXTURE, "alpha": 0.0, "initial": "equal"}},
        "ddk_equal": {"method": "ddk_equal"},
    }
    paths = {
        name: write_config(workspace, folder / name, **{**SHORT, **sections})
        for name, sections in {**twice, **once}.items()
    }
    # Lines of the ledger: an interval, two steps, the next interval, and a step of it.
    starts = [(str(paths[name]), run, lines) for name in twice for run, lines in (("whole", None), ("broken", 5))]
    starts += [(str(paths[name]), "whole", None) for name in once]
    run_ranks("tests.dist.resume_worker:run_all", 2, timeout_s=400, starts=starts)
    return paths


def ledger_of_both(config: Path) -> list[dict[str, Any]]:
    """Return the ledger of the uninterrupted run; assert that the resumed one has the same."""
    whole, broken = (without_clock(run_dir(str(config), name)) for name in ("whole", "broken"))
    assert len(whole) == 2 + 4 + 1
    assert broken == whole
    return whole


def test_doremis_proxy(configs: dict[str, Path]) -> None:
    ledger = ledger_of_both(configs["doremi_proxy"])
    steps = [line["method"]["weights"] for line in ledger if line["kind"] == "step"]
    export = run_dir(str(configs["doremi_proxy"]), "broken") / "export"
    proportions = yaml.safe_load((export / "proportions.yaml").read_text())
    # The mean over all steps, by the domains' names; sampling itself stays equal.
    assert list(proportions) == list(ledger[0]["proportions"])
    for number, (name, value) in enumerate(proportions.items()):
        assert value == pytest.approx(sum(weights[number] for weights in steps) / 4)
        assert ledger[0]["proportions"][name] == pytest.approx(1 / 3)


def test_weights_of_domains_in_the_loss(configs: dict[str, Path], workspace: Path) -> None:
    """Resumed within an interval the run is the same, and the ledger has w / q by the interval's counts."""
    manifest = json.loads((workspace / "shards/domains.json").read_text())["domains"]
    tokens = {name: domain["train"]["tokens"] for name, domain in manifest.items()}
    for line in ledger_of_both(configs["weighted"]):
        if line["kind"] == "interval":
            assert line["loss_weights"] == {
                name: pytest.approx(tokens[name] / sum(tokens.values()) * sum(line["counts"].values()) / count)
                for name, count in line["counts"].items()
            }
            assert max(line["loss_weights"].values()) > 1.1


def test_losses_of_training_decide_and_are_the_steps(configs: dict[str, Path]) -> None:
    """ODM's memory and its measurements survive an interruption between two borders, and its decisions are replayed.

    A step's mean loss is that of its domains, weighted by tokens and by the weights of the loss.
    """
    ledger = ledger_of_both(configs["weighted"])
    borders = [line for line in ledger if line["kind"] in ("interval", "end")]
    for begin, end in pairwise(borders):
        steps = [line for line in ledger if line["kind"] == "step" and begin["step"] < line["step"] <= end["step"]]
        for of_step, of_border in (("ce", "training_loss"), ("kl", "training_kl")):
            total = sum(line[of_step] * sum(line["domain_tokens"]) for line in steps)
            by_domain = {name: end["domain_tokens"][name] - begin["domain_tokens"][name] for name in FLOORS}
            parts = [by_domain[name] * begin["loss_weights"][name] * end[of_border][name] for name in FLOORS]
            assert sum(parts) == pytest.approx(total, rel=1e-5)
    assert "training_loss" not in borders[0] and borders[1]["controller_memory"]["step"] == 2
    run = read_recorded_run(run_dir(str(configs["weighted"]), "broken"))
    found = replay(make_controller(load_config(configs["weighted"]).mixture, run.train_tokens), run.decisions)
    assert (found.num_replayed, found.unequal) == (2, [])


def test_teds_first_stage(configs: dict[str, Path]) -> None:
    ledger = ledger_of_both(configs["ted_filters"])
    ends = [line["student_ppl"] for line in ledger if line["kind"] in ("interval", "end")]
    assert ends[0] == ends[-1], "stage 1 has changed the student"
    trained = load_file(run_dir(str(configs["ted_filters"]), "broken") / "export/filters.safetensors")
    for name, value in trained.items():
        if name.startswith("teacher."):  # it began as the identity
            assert 1e-3 < float((value - torch.eye(len(value))).abs().max()) < 0.1, name


def test_teds_second_stage(configs: dict[str, Path]) -> None:
    ledger = ledger_of_both(configs["ted"])
    errors = [line["method"]["mse"] for line in ledger if line["kind"] == "step"]
    assert errors[-1] < errors[0]
    before, after = (
        load_file(run_dir(str(configs[name]), "broken") / "export/filters.safetensors")
        for name in ("ted_filters", "ted")
    )
    for name, value in before.items():
        assert bool((after[name] == value).all()) == name.startswith("teacher."), name


@pytest.mark.parametrize(("special", "general"), [("kd", "cpt"), ("ddk", "ddk_equal")])
def test_equal_by_definition(configs: dict[str, Path], special: str, general: str) -> None:
    """kd with gamma 0 is cpt; ddk with alpha 0 that begins equally is ddk_equal: bit for bit."""
    keys = ("loss", "grad_norm", "student_ppl", "ids_sha")
    one, other = (
        [{key: record.get(key) for key in keys} for record in without_clock(run_dir(str(configs[name]), "whole"))]
        for name in (special, general)
    )
    assert one == other


def test_filters_that_do_not_fit(workspace: Path, tmp_path: Path) -> None:
    sections = {"method": "ted", "ted": {"filters": str(tmp_path / "none.safetensors")}}
    config = write_config(workspace, tmp_path, **sections, **SHORT)
    with pytest.raises(AssertionError, match=r"ted\.filters: there is no .*none\.safetensors: "):
        run_ranks("tests.dist.resume_worker:go_on", 1, config_path=str(config), name="x")
    models = (read_model(workspace / name, name) for name in ("student", "teacher"))
    config = write_config(workspace, tmp_path, method="ted_filters", ted={"layers": [[0, 9]]}, **SHORT)
    with pytest.raises(ConfigError, match="the teacher has 3 layers"):
        filter_shape(load_config(config), *models)
    with pytest.raises(ConfigError, match=r"method: ted needs ted\.filters"):
        run_dir(str(write_config(workspace, tmp_path, method="ted", **SHORT)), "x")
