"""tools/export_hf.py gives the run's own export, its logits and its master weights, with one tensor in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_ds.commands.export_command import main
from ddk_ds.engine.export import unreplaceable
from ddk_ds.run_files import read_events
from tests.dist.export_worker import IDS
from tests.dist.ranks import run_ranks
from tests.dist.tiny import VOCAB, save_model
from tests.saved_run import save_run
from tools.bench.small_run import write_config

SLACK_BYTES = 48 * 2**20  # for mapped pages, one tensor and the allocator; measured: 39 MB
SHORT: dict[str, Any] = {
    "mixture": {"interval_steps": 2, "ratio_cap": None, "initial_floor": 0.0},
    "stop": {"steps": 3},
    "checkpoint": {"every_steps": 2},
}


@pytest.fixture(scope="module")
def runs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by name of runs on two ranks: a tied student in fp32, an untied one and a frozen one in bf16."""
    folder = tmp_path_factory.mktemp("export")
    untied = {"student": {"path": str(workspace / "teacher")}, "method": "cpt", "teacher": None}
    options: dict[str, dict[str, Any]] = {
        "tied-fp32": {"method": "ddk_equal"},
        "untied-bf16": {**untied, "train": {"precision": "bf16"}},
        "frozen-bf16": {"method": "ted_filters", "train": {"precision": "bf16"}},
    }
    configs = [str(write_config(workspace, folder / name, **{**SHORT, **more})) for name, more in options.items()]
    found = run_ranks("tests.dist.export_worker:run_and_look", 2, timeout_s=400, configs=configs)
    return dict(zip(options, map(Path, found), strict=True))


def exported(run: Path, *options: str) -> dict[str, torch.Tensor]:
    """Run the tool and return the tensors that it writes."""
    out = run / f"out{'-'.join(options)}"
    assert main([str(run), "--out", str(out), *options]) == 0
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", ["tied-fp32", "untied-bf16", "frozen-bf16"])
def test_the_runs_own_export(runs: dict[str, Path], name: str) -> None:
    run = runs[name]
    ours = exported(run)
    assert_equal(ours, load_file(run / "export/model.safetensors"))
    assert ("lm_head.weight" in ours) == name.startswith("untied")
    left = {path.name for path in (run / "out").iterdir()}
    assert left == {path.name for path in (run / "export").iterdir()} - {"filters.safetensors"}
    for same in ("README.md", "config.json", "tokenizer.json"):
        assert (run / "out" / same).read_text() == (run / "export" / same).read_text(), same


@pytest.mark.parametrize("name", ["tied-fp32", "untied-bf16"])
def test_fp32_is_the_masters(runs: dict[str, Path], name: str) -> None:
    seen = load_file(runs[name] / "seen.safetensors")
    logits = seen.pop("logits")
    ours = exported(runs[name], "--dtype=fp32", "--max-shard-gb=0.00002")
    assert_equal(ours, seen)
    out = runs[name] / "out--dtype=fp32---max-shard-gb=0.00002"
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(out)) <= model.config.vocab_size
    with torch.no_grad():
        difference = (model(IDS).logits.flatten(0, 1) - logits).abs().max()
    assert float(difference) < (1e-5 if name.endswith("fp32") else 0.1)


def test_an_earlier_step(runs: dict[str, Path]) -> None:
    run = runs["tied-fp32"]
    last, earlier = exported(run), exported(run, "--step=2")
    assert any(not torch.equal(last[name], tensor) for name, tensor in earlier.items())


def test_the_runs_end_loses_nothing_of_a_users(workspace: Path, tmp_path: Path) -> None:
    config = str(write_config(workspace, tmp_path, **SHORT, method="ted_filters"))
    errors = run_ranks("tests.dist.export_worker:end_among_files", 2, timeout_s=300, config_path=config)
    assert len(errors) == 2 and len(set(errors)) == 1
    assert "cannot be written: No space left on device; make room, then start the same command again" in errors[0]
    run = tmp_path / "runs/whole"
    assert (run / "export-kept-1/my_notes.txt").read_text() == "a week of notes"
    assert "Not known: the run's ledger.jsonl could not be read" in (run / "export/README.md").read_text()
    assert not unreplaceable(run / "export") and (run / "export/filters.safetensors").is_file()
    assert (run / "summary.json").is_file() and not [path for path in run.iterdir() if "partial" in path.name]
    (kept,) = [event for event in read_events(run) if event["event"] == "kept"]
    assert kept["path"] == str(run / "export-kept-1")


def test_one_tensor_in_memory(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 16, "intermediate_size": 2048, "num_key_value_heads": 4}
    for name, more in (("large", {"hidden": 512, **shape}), ("small", {})):
        save_model(tmp_path / name / "student", vocab=VOCAB, tied=True, seed=1, **more)
        save_run(tmp_path / name, steps=(1,))
    places = {key: str(tmp_path / name / "runs/tiny") for key, name in (("run", "large"), ("small", "small"))}
    seen = run_ranks("tests.dist.export_worker:peak_of_export", 1, **places)
    assert seen["files"] > 2 and seen["total"] > 5 * SLACK_BYTES, "the model is too small to tell"
    assert seen["grown"] < SLACK_BYTES, seen
