"""tools/plan.py from the command line: its results, its advice, and its errors for wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.commands import plan_command as plan
from ddk_ds.config import load_config
from ddk_ds.data.manifest import DomainInfo, Manifest, SplitInfo, write_manifest
from ddk_ds.data.mds import write_split
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpus import GPUS, find_gpu

ROOT = Path(__file__).parents[3]
H100 = GPUS["h100-80g"]
PAPER = ROOT / "configs/paper/qwen1.5_14b_to_1.8b.yaml"
CLUSTER = ("--nodes", "2", "--gpus-per-node", "8")
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


def planned(folder: Path, *arguments: str, config: Path = PAPER, gpu: str = "a100-80g") -> dict[str, Any]:
    out = folder / "plan.json"
    assert plan.main(["--config", str(config), "--gpu", gpu, "--json", str(out), *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run's configuration; the student is a directory with config.json alone, the teacher is a file."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text(json.dumps(TINY))
    (tmp_path / "teacher.json").write_text(json.dumps(TINY | {"num_hidden_layers": 4}))
    values = {
        "name": "small",
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(tmp_path / "teacher.json")},
        "data": {"path": str(tmp_path / "data"), "domains": ["a", "b"], "sequence_length": 128},
        "mixture": {"interval_steps": 400},
        "train": {"global_batch_samples": 64},
        "stop": {"steps": 1500},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_table_12(tmp_path: Path) -> None:
    """Qwen1.5 14B to 1.8B: KD over CPT is 3.68 in the paper, DDK over KD 1.0069."""
    found = planned(tmp_path, *CLUSTER)
    assert found["kd_over_cpt"] == pytest.approx(3.68, rel=0.05)
    assert 1.0 < found["ddk_over_kd"] <= 1.0069
    for name, paper in (("cpt", 1.456e8), ("kd", 5.364e8), ("ddk", 5.401e8)):
        assert found["tflops"][name] == pytest.approx(paper, rel=0.1)
        assert found["tflops"][name] * 1e12 == pytest.approx(found["flops"][name])
    assert found["tokens"] == pytest.approx(15e9, rel=0.01)
    # 28 intervals of 1,000 steps and one of 610, each with a measurement before it, and one at the end.
    assert (found["steps"], found["measurements"]) == (28610, 30)


def test_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, *CLUSTER)
    assert set(found["flops"]) == set(found["tflops"]) == {"cpt", "kd", "ddk"}
    parts = found["memory_bytes"]
    for words in ("teacher shards", "student shards: parameters", "gathered: teacher", "activations", "logits chunk"):
        assert any(name.startswith(words) for name in parts), words
    for words in ("student shards: float32 master", "student shards: moments", "buckets", "checkpoint copy"):
        assert any(name.startswith(words) for name in parts), words
    assert found["fits"] is True
    assert found["max_micro_batch"] >= found["max_micro_batch_that_divides"] >= 8
    # The definition of MFU.
    per_token = (found["flops_of_this_run"] - found["controller_flops"]) / found["tokens"]
    assert found["tokens_per_s"] == pytest.approx(0.4 * 16 * 312e12 / per_token)
    assert found["gpu_hours"] == pytest.approx(16 * found["hours"])
    assert found["hours"] == pytest.approx(found["flops_of_this_run"] / (0.4 * 16 * 312e12) / 3600, rel=0.001)
    assert found["checkpoint"]["num_bytes"] == 14 * found["parameters"]["student"]
    assert found["checkpoint"]["write_s"] == found["checkpoint"]["num_bytes"] / 5e9
    assert found["shard_bytes"] == 4 * 2048 * (28610 * 256 + 10 * 500)
    assert found["read_bytes_per_s"] == 4 * found["tokens_per_s"]
    assert found["teacher_cache_bytes"] == 0
    assert found["advice"] == []
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("55.51", "KD over CPT", "3.746", "GPU-hours", "simulated step", "assumed", "fits"):
        assert text in printed
    for line in found["assumptions"]:
        assert printed.count(" ".join(line.split())[:60]) == 1, "each assumption is printed once"


def test_a_cache_that_is_only_read_costs_a_run_without_its_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("teacher.cache.path=said", "teacher.cache.mode=read_only", "teacher.cache.draws=32")
    found, without = planned(tmp_path, *CLUSTER, *cache), planned(tmp_path, *CLUSTER)
    # 18 bits of an id of 151,646 and one of a draw, the entropy and the label's log-probability in float32.
    assert found["teacher_cache_bytes"] == found["tokens"] * (32 * 19 / 8 + 8)
    # The paper's Table 12: the teacher of 15 B tokens is 5.364e8 - 1.456e8 TFLOP; 16 A100 at 40% of 312 TFLOP/s.
    plan = found["teacher_cache"]
    assert plan["fill_hours"] == pytest.approx((5.364e8 - 1.456e8) / (0.4 * 16 * 312) / 3600, rel=0.1)
    # Without data it is planned as a pass of the run's samples, and what is held out.
    assert plan["fill_all_hours"] == pytest.approx(plan["fill_hours"] * (1 + 10 * 500 / (28610 * 256)))
    assert plan["runs_until_all_pays"] == 2 and without["teacher_cache"] is None
    assert without["hours"] - found["hours"] == pytest.approx(plan["fill_hours"], rel=0.01), "what a run saves"
    assert plan["read_bytes_per_s"] == pytest.approx(found["tokens_per_s"] * (32 * 19 / 8 + 8))
    topk = planned(tmp_path, *CLUSTER, cache[0], "teacher.cache.keep=topk", "teacher.cache.top_k=20")
    assert topk["teacher_cache_bytes"] == found["tokens"] * (20 * (18 + 16) / 8 + 8)
    planned(tmp_path, *CLUSTER, *cache)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"at most {found['teacher_cache_bytes'] / 1e9:,.2f} GB of the teacher's cache" in printed
    assert f"takes {plan['fill_hours']:,.1f} hours" in printed and "it pays from the second run on" in printed
    assert found["flops_of_this_run"] - found["controller_flops"] == pytest.approx(without["flops"]["cpt"])
    assert not any("teacher" in name for name in found["memory_bytes"])
    assert not any("teacher" in name for name in found["simulated_step"]["parts_s"])


def test_a_measured_speed(tmp_path: Path) -> None:
    found = planned(tmp_path, *CLUSTER, "--tokens-per-s-per-gpu", "2000")
    assert found["tokens_per_s"] == pytest.approx(32000)
    assert found["mfu"] == pytest.approx(2000 * 38.8e9 / 312e12, rel=0.01)
    twice = planned(tmp_path, *CLUSTER, "--mfu", str(2 * found["mfu"]))
    assert twice["tokens_per_s"] == pytest.approx(64000)
    assert twice["hours"] == pytest.approx(found["hours"] / 2, rel=0.001)


@pytest.mark.parametrize(
    ("overrides", "nulls"),
    [(("method=cpt", "teacher=null", "mixture.controller=by_size"), True), (("method=kd",), False)],
)
def test_other_methods(tmp_path: Path, overrides: tuple[str, ...], nulls: bool) -> None:
    found, whole = planned(tmp_path, *CLUSTER, *overrides), planned(tmp_path, *CLUSTER)
    assert found["flops"]["cpt"] == whole["flops"]["cpt"]
    assert [found[key] is None for key in ("kd_over_cpt", "ddk_over_kd")] == [nulls, nulls]
    assert (found["flops"]["kd"] is None) is nulls
    assert found["flops_of_this_run"] >= found["flops"]["cpt" if nulls else "kd"]
    assert ("teacher shards" in found["memory_bytes"]) is not nulls


def test_what_does_not_fit_gets_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One change at a time, each with its own estimate; what fits is offered as it is typed."""
    found = planned(tmp_path, *CLUSTER, "train.micro_batch_samples=16")
    assert found["fits"] is False
    advice = {one["change"]: one for one in found["advice"]}
    for change in (
        "student.gradient_checkpointing=true",
        "train.micro_batch_samples=8",
        "optimizer.offload=cpu",
        "teacher.offload_params=cpu",
        "--nodes 4 train.micro_batch_samples=8",
    ):
        assert change in advice
    assert advice["student.gradient_checkpointing=true"]["fits"]
    assert not advice["teacher.offload_params=cpu"]["fits"]
    assert "does NOT fit" in capsys.readouterr().out
    for change, one in advice.items():
        words = change.split()
        cluster = ["--nodes", words[1], "--gpus-per-node", "8"] if words[0] == "--nodes" else [*CLUSTER]
        tried = planned(tmp_path, *cluster, "train.micro_batch_samples=16", *words[2 if words[0] == "--nodes" else 0 :])
        assert (tried["device_bytes"], tried["fits"]) == (one["device_bytes"], one["fits"]), change


def test_changes_are_put_together_where_one_is_too_little(tmp_path: Path) -> None:
    arguments = ("--nodes", "1", "--gpus-per-node", "2", "train.micro_batch_samples=32")
    found = planned(tmp_path, *arguments, gpu="a100-40g")
    assert found["fits"] is False
    singles = [one for one in found["advice"] if one["nodes"] == 1 and " " not in one["change"]]
    assert len(singles) >= 3 and not any(one["fits"] for one in singles)
    [together] = [one for one in found["advice"] if one["nodes"] == 1 and one["fits"]]
    assert "student.gradient_checkpointing=true" in together["change"] and "micro_batch_samples" in together["change"]
    tried = planned(tmp_path, *arguments, *together["change"].split(), gpu="a100-40g")
    assert (tried["device_bytes"], tried["fits"]) == (together["device_bytes"], True)


def test_nothing_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text(h100_with(name="tiny", memory_bytes=2e9))
    found = planned(tmp_path, *CLUSTER, gpu=str(gpu))
    assert (found["fits"], found["max_micro_batch"]) == (False, 0)
    assert not any(one["fits"] for one in found["advice"])
    assert "none of them fits" in capsys.readouterr().out


def test_models_by_directory_file_and_weights(small: Path, tmp_path: Path) -> None:
    """A directory with config.json, a file, and weights give the same model; nothing is loaded."""
    by_config = planned(tmp_path, config=small)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    model.save_pretrained(tmp_path / "saved")
    by_weights = planned(tmp_path, f"student.path={tmp_path / 'saved'}", config=small)
    for key in ("flops", "memory_bytes", "parameters"):
        assert by_config[key] == by_weights[key], key
    assert by_config["parameters"]["student"] == model.num_parameters()
    assert by_config["measurements"] == 5  # 400, 400, 400, 300 steps, and the end
    # Without domains in configuration or data: the paper's ten, and it says so.
    more = planned(tmp_path, "data.domains=null", config=small)
    assert any("assumed: 10 domains" in line for line in more["assumptions"])


def test_prepared_data(small: Path, tmp_path: Path) -> None:
    """Domains, vocabulary, dtype and size are those of domains.json."""
    sizes, length, domains = {"a": 40, "b": 90, "unused": 5}, 128, {}
    for name, count in sizes.items():
        splits = {}
        for split, samples in (("train", count), ("validation", 3)):
            ids = [np.zeros(length, np.uint16)] * samples
            masks = [np.arange(length) < length // 4] * samples if name == "b" else None  # conversations
            shape: dict[str, Any] = {"sequence_length": length, "dtype": "uint16", "targets": masks}
            shape["lengths"] = [np.array([length])] * samples
            done = write_split(tmp_path / f"data/{name}/{split}", ids, **shape)
            splits[split] = SplitInfo(documents=1, tokens=samples * length, bytes=1, **done)
        domains[name] = DomainInfo(**splits, chat={} if name == "b" else None)
    write_manifest(Manifest(tmp_path / "data", length, "uint16", "-", 499, 0, domains, borders=True))
    found = planned(
        tmp_path, "stop={data_once: true}", "mixture.interval_steps=1", "optimizer.warmup_steps=0", config=small
    )
    assert found["shard_bytes"] == 2 * length * (40 + 90 + 2 * 3)
    assert (found["steps"], found["measurements"]) == (3, 4)  # of 64 samples, 130 there are
    assert any("controller: 2 domains" in line for line in found["assumptions"])
    assert any(f"targets: {(40 + 90 / 4) / 130:.0%} of the samples' tokens" in line for line in found["assumptions"])
    assert plan.main(["--config", str(small), "--gpu", "h100", "data.domains=[a,c]"]) == 2


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    gpu = tmp_path / "gpu.yaml"
    # As people write numbers: 312e12 is text to YAML.
    gpu.write_text(
        "name: ours\npeak_flop_per_s: 624e12\nmemory_bytes: 80e9\nhbm_bytes_per_s: 2e12\n"
        "nvlink_bytes_per_s: 3e11\nnetwork_bytes_per_s: 25000000000\n"
    )
    ours, known = planned(tmp_path, *CLUSTER, gpu=str(gpu)), planned(tmp_path, *CLUSTER)
    assert ours["tokens_per_s"] == pytest.approx(2 * known["tokens_per_s"])
    assert ours["device_bytes"] == known["device_bytes"]
    slow = planned(tmp_path, *CLUSTER, "--link-gb-s", "0.5")
    name = "teacher: communication not hidden"
    assert slow["simulated_step"]["parts_s"][name] > 10 * known["simulated_step"]["parts_s"][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "b300"], "--gpu b300: neither one of a100-40g"),
        (["--nodes", "0"], "--nodes 0: give 1 or more"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: give 1 or more"),
        (["--mfu", "40"], "--mfu 40: give a share of the peak"),
        (["--mfu", "0"], "--mfu 0: give a share of the peak"),
        (["--tokens-per-s-per-gpu", "0"], "--tokens-per-s-per-gpu 0: give a number above 0"),
        (["--link-gb-s", "nan"], "--link-gb-s nan: give a number above 0"),
        (["--storage-gb-s", "-3"], "--storage-gb-s -3: give a number above 0"),
        (["--nodes", "3"], "train.global_batch_samples 256 is not a multiple"),
        (["student.path=nobody/nothing"], "student.path: nobody/nothing is no directory with a config.json"),
        (["teacher.path=BROKEN"], "/BROKEN cannot be read as JSON"),
        (["teacher.path=UNKNOWN"], "/UNKNOWN describes no causal language model"),
        (["stop.steps=null", "stop.data_once=true"], "stop: the run ends with its data"),
        (["train.micro_batch_size=3"], "train.micro_batch_size=3: unknown key"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--json", "/nowhere/plan.json"], "--json /nowhere/plan.json: cannot be written"),
        (["--scaling", "/nowhere/plan.png"], "--scaling /nowhere/plan.png: cannot be written"),
        (["--vary", "train.precision"], "--vary train.precision: write key=value,value,..."),
        (["--vary", "train.precision=bf16,"], "--vary train.precision=bf16,: write key=value,value,..."),
        (["--vary", "train.precision=bf16,fp8"], "train.precision"),
        (["--scaling", "plan.xyz"], "--scaling plan.xyz: cannot be written"),
    ],
)
def test_wrong_input_is_one_clear_error(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("BROKEN").write_text("{")
    Path("UNKNOWN").write_text('{"model_type": "perceptron", "hidden_size": 3}')
    assert plan.main(["--config", str(PAPER), "--gpu", "a100-80g", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") or message in error
    assert error.count("\n") == 1, "one line"


def h100_with(**values: Any) -> str:
    return yaml.safe_dump({**H100.model_dump(), **values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds list, expected keys: name, peak_flop_per_s"),
        ("{", "cannot be read as YAML"),
        ("name: x", "memory_bytes: field required"),
        (yaml.safe_dump({**H100.model_dump(), "memory_gb": 80.0}), "memory_gb: extra inputs"),
        (
            yaml.safe_dump({**H100.model_dump(), "memory_bytes": "much"}),
            "memory_bytes: input should be a valid",
        ),
        (
            yaml.safe_dump({**H100.model_dump(), "network_bytes_per_s": 0.0}),
            "network_bytes_per_s: input should",
        ),
        (
            yaml.safe_dump({**H100.model_dump(), "compute_efficiency": 40}),
            "compute_efficiency: input should",
        ),
    ],
)
def test_a_bad_gpu_file(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text(content)
    assert plan.main(["--config", str(PAPER), "--gpu", str(gpu)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --gpu {gpu}: ") and message in error


def test_options_are_varied_in_every_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    varied = ["--vary", "student.gradient_checkpointing=true,false", "--vary", "method=cpt"]
    found = planned(tmp_path, *CLUSTER, *varied, "teacher=null")
    assert [variant["overrides"] for variant in found["variants"]] == [
        ["student.gradient_checkpointing=true", "method=cpt"],
        ["student.gradient_checkpointing=false", "method=cpt"],
    ]
    again, once = found["variants"]
    assert again["step_s"] > once["step_s"] and list(once["not_hidden"]) == ["student"]
    printed = capsys.readouterr().out
    assert f"{again['tokens_per_s']:,.0f}" in printed and "student waits" in printed and "teacher waits" not in printed


def test_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--config", str(PAPER)])
    assert "--config and --gpu are needed" in capsys.readouterr().err


def test_picture_and_known_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "scaling.png"
    found = planned(tmp_path, *CLUSTER, "--scaling", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [curve["name"].partition(",")[0] for curve in found["scaling"]] == ["strong", "strong", "weak"]
    assert max(point["gpus"] for curve in found["scaling"] for point in curve["points"]) == 1024
    capsys.readouterr()
    assert plan.main(["--known-points"]) == 0
    assert "llm-foundry" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "configs/paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pair_of_the_paper_fits_its_cluster(path: Path, tmp_path: Path) -> None:
    found = planned(tmp_path, *CLUSTER, config=path)
    assert found["fits"]
    assert found["max_micro_batch_that_divides"] >= load_config(path).train.micro_batch_samples


@pytest.mark.parametrize("name", ["h100", "H100", "h100-80g", "H100-80GB"])
def test_a_gpu_has_several_spellings(name: str) -> None:
    assert find_gpu(name) == H100
    assert find_gpu("h200") == find_gpu("H200-141GB") == GPUS["h200-141g"]
    assert find_gpu("A100-40GB").memory_bytes == 40e9


def test_a_spelling_of_two_gpus_names_both() -> None:
    with pytest.raises(ConfigError, match="--gpu a100: there are two of them: a100-40g or a100-80g"):
        find_gpu("a100")


def test_the_answer_comes_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = planned(tmp_path)
    first, *rest = " ".join(capsys.readouterr().out.split()).split("memory of a device")
    assert first.startswith(f"fits: {found['device_bytes'] / 1e9:.2f} of ") and rest
    for text in (
        f"{found['hours']:.1f} hours, {found['gpu_hours']:,.0f} GPU-hours for 15.00 B tokens on 1 x 8 GPUs",
        "by an assumed MFU of 40.0%",
        f"the simulated step (below) has an MFU of {found['simulated_step']['mfu']:.1%}",
        f"which gives {found['steps'] * found['simulated_step']['seconds'] / 3600:.1f} hours: a ceiling",
        f"disk: {(found['checkpoint']['kept_bytes'] + found['checkpoint']['export_bytes']) / 1e9:.2f} GB",
    ):
        assert text in first, first


def test_a_speed_above_the_ceiling_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    planned(tmp_path, "--mfu", "0.9")
    printed = " ".join(capsys.readouterr().out.split())
    assert "so the assumed 90.0% is too high for this configuration" in printed
    planned(tmp_path, "--tokens-per-s-per-gpu", "1000")
    printed = " ".join(capsys.readouterr().out.split())
    assert "by the measured speed, an MFU of" in printed and "--tokens-per-s-per-gpu takes" not in printed
