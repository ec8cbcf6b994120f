"""Each planted fault is found by the row that it belongs to, with a message that names what, where and the fix."""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
import struct
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.commands import preflight_command
from ddk_ds.commands.distill_rank import main as distil
from ddk_ds.commands.preflight_command import main
from ddk_ds.config import load_config
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.manifest import load_manifest, write_manifest
from ddk_ds.data.teacher_cache import TeacherCache, make_cache
from ddk_ds.data.teacher_place import LocalPlace
from ddk_ds.data.teacher_samples import Drawn, bytes_a_token
from ddk_ds.engine.model_files import read_model
from ddk_ds.exit_codes import EXIT_TEMPORARY
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.preflight import PlannedRanks, Row, preflight
from ddk_ds.train.preflight.agreement import clock_offset
from ddk_ds.train.preflight.machine import available_bytes, shared_memory
from ddk_ds.train.preflight.path_checks import precision
from ddk_ds.train.preflight.rows import deadline, merge
from ddk_ds.train.teacher_store import cache_conditions
from tests.unit.mounts import tmpfs
from tests.unit.test_bad_input import swap_two_tokens
from tools.bench.small_run import write_config


def rows_of(config: Path, planned: PlannedRanks | None = None) -> dict[str, Row]:
    """Return every row of a preflight of one process, by name."""
    return {row.name: row for row in preflight(load_config(config), SingleProcess(), torch.device("cpu"), planned)}


def check(rows: dict[str, Row], name: str, *parts: str, status: str = "fail") -> None:
    """Assert that only this row does not pass, and that its message has these parts."""
    row = rows[name]
    assert row.status == status, row
    assert all(part in f"{row.found} {row.fix}" for part in parts), row
    others = [row for row in rows.values() if row.status != "pass" and row.name != name]
    assert not others, others


@pytest.fixture(autouse=True)
def free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))


@pytest.fixture
def model(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the student that a test may damage."""
    return Path(shutil.copytree(workspace / "student", tmp_path / "student"))


@pytest.fixture
def shards(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(workspace / "shards", tmp_path / "shards"))


def test_a_good_run_passes_and_leaves_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(workspace, tmp_path, teacher={"shard_within": "auto"})
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "rows.json"
    assert main(["--config", str(config), "--json", str(out)]) == 0
    assert "0 failed" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    out.unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert len(rows) > 20 and {row["status"] for row in rows} == {"pass"}, rows
    assert set(rows[0]) == {"name", "status", "found", "fix"}
    [memory] = [row["found"] for row in rows if row["name"] == "host memory"]
    assert memory.endswith("; teacher.shard_within: auto is gpu here")


def test_misspelt_key(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(workspace, tmp_path, train={"micro_batch_sampels": 2})
    out = tmp_path / "rows.json"
    assert main(["--config", str(config), "--json", str(out)]) == 2
    rows = {row["name"]: Row(**row) for row in json.loads(out.read_text())}
    check(rows, "configuration", "train.micro_batch_sampels", "did you mean train.micro_batch_samples?")
    assert "shared memory" in rows  # what needs no configuration is still checked
    assert "1 failed" in capsys.readouterr().out


def test_batch_not_divisible(workspace: Path, tmp_path: Path) -> None:
    rows = rows_of(write_config(workspace, tmp_path), PlannedRanks(3, nodes=1))
    check(rows, "batch", "train.global_batch_samples 8", "3 ranks")


def test_the_ranks_of_a_node(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a node is that of its own ranks, and whoever does not say how many they are is told so."""
    monkeypatch.setattr("ddk_ds.train.preflight.machine.available_bytes", lambda: 1 << 50)
    config = write_config(workspace, tmp_path, train={"global_batch_samples": 64})
    assumed, said, gpus = (rows_of(config, PlannedRanks(32, *more)) for more in ((), (4,), (4, True)))
    assert assumed["ranks"].status == "warn" and "32 on each node, which is assumed" in assumed["ranks"].found
    assert "--nodes" in assumed["ranks"].fix
    assert said["ranks"].status == "pass" and said["ranks"].found.endswith("a run of 32 ranks, 8 on each node")
    needed = [float(rows["host memory"].found.split()[1]) for rows in (assumed, said)]
    assert needed[0] == pytest.approx(4 * needed[1], rel=0.02)
    assert "device memory" not in said and gpus["device memory"].status == "warn"
    assert "this machine has none" in gpus["device memory"].found


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        ("", None),
        ("--ranks 32", (32, None, False)),
        ("--ranks 32 --nodes 4", (32, 4, False)),
        ("--nodes 4 --gpus-per-node 8", (32, 4, True)),
        ("--ranks 32 --gpus-per-node 8", (32, 4, True)),
        ("--gpus-per-node 8", (8, 1, True)),
        ("--nodes 4", "--nodes 4: give --gpus-per-node or --ranks too"),
        ("--ranks 30 --nodes 4", "--ranks 30 is not a multiple of --nodes 4"),
        ("--ranks 30 --gpus-per-node 8", "--ranks 30 is not 3 nodes x --gpus-per-node 8"),
        ("--ranks 0", "give a number of at least 1"),
    ],
)
def test_the_options_of_a_planned_run(options: str, planned: object, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "my.yaml", *options.split()]
    if not isinstance(planned, str):
        assert preflight_command._parse(words).planned == planned
        return
    with pytest.raises(SystemExit, match="2"):
        preflight_command._parse(words)
    assert planned in capsys.readouterr().err


@pytest.mark.usefixtures("offline_hub")
def test_missing_model_directory(workspace: Path, tmp_path: Path) -> None:
    rows = rows_of(write_config(workspace, tmp_path, teacher={"path": str(tmp_path / "nowhere")}))
    check(rows, "teacher files", "teacher.path", "there is no ", "/nowhere: give a model's directory")
    rows = rows_of(write_config(workspace, tmp_path, teacher={"path": "no/where"}))
    check(rows, "teacher files", "teacher.path", "no/where", "neither a directory")


@pytest.mark.parametrize("kept", [-10, 5, 40])
def test_truncated_safetensors(workspace: Path, tmp_path: Path, model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    rows = rows_of(write_config(workspace, tmp_path, student={"path": str(model)}))
    check(rows, "student files", "student.path", str(model), "copy the complete model directory again")


def split_in_two(model: Path) -> dict[str, str]:
    """Split the model's safetensors into two files with an index; return its weight map."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(model, weight_map)
    return weight_map


def write_index(model: Path, weight_map: dict[str, str]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("file gone", ("model-00002-of-00002.safetensors", "which its index names")),
        ("not in the index", ("names 1 of the 2 files",)),
        (
            "one file too",
            ("two sets of weights, model.safetensors and", "model.safetensors.index.json", "move one"),
        ),
        ("a tensor twice", ("model-00001-of-00002.safetensors and", "model-00002-of-00002.safetensors both hold")),
        ("a tensor too many", ("names tensor model.extra in model-00001-of-00002.safetensors",)),
        ("a layer gone", ("config.json has 3 layers", "none of layer 2")),
    ],
)
def test_index(workspace: Path, tmp_path: Path, model: Path, fault: str, parts: tuple[str, ...]) -> None:
    weight_map = split_in_two(model)
    config = write_config(workspace, tmp_path, student={"path": str(model)})
    assert rows_of(config)["student files"].status == "pass"
    if fault == "file gone":
        (model / "model-00002-of-00002.safetensors").unlink()
    elif fault == "one file too":
        shutil.copyfile(workspace / "student/model.safetensors", model / "model.safetensors")
    elif fault == "a tensor twice":
        shutil.copyfile(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")
    elif fault == "not in the index":
        write_index(model, {name: file for name, file in weight_map.items() if "00001-of" in file})
    elif fault == "a tensor too many":
        write_index(model, weight_map | {"model.extra": "model-00001-of-00002.safetensors"})
    else:
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    check(rows_of(config), "student files", str(model), *parts)


def test_vocabularies_differ(workspace: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(workspace / "teacher", tmp_path / "teacher"))
    swap_two_tokens(teacher / "tokenizer.json")
    rows = rows_of(write_config(workspace, tmp_path, teacher={"path": str(teacher)}))
    check(rows, "tokenizers and data", "teacher.path", "vocabularies differ in 2 tokens", "choose a pair")


def test_another_tokenizer(workspace: Path, tmp_path: Path, model: Path) -> None:
    swap_two_tokens(model / "tokenizer.json")
    rows = rows_of(write_config(workspace, tmp_path, student={"path": str(model)}))
    check(rows, "tokenizers and data", "data.path", "tokenised with another tokenizer", "prepare the data with it")


def test_quantised_weights(workspace: Path, tmp_path: Path, model: Path) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "awq"}}))
    rows = rows_of(write_config(workspace, tmp_path, student={"path": str(model)}))
    check(rows, "student files", "student.path", "quantised by 'awq'", "full weights")


def test_fp8_without_such_a_gpu(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = read_model(workspace / "teacher", "teacher.path")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for kind, status in ("fp8", "fail"), ("int8", "pass"), ("int8_dynamic", "pass"):
        section = {"quantize": kind}
        config = load_config(write_config(workspace, tmp_path, teacher=section, train={"precision": "bf16"}))
        row = precision(config, files, "teacher", torch.device("cuda:0"))
        assert row.status == status and (status == "pass" or "A100 has compute capability 8.0" in row.found)
        assert precision(config, files, "student", torch.device("cuda:0")).status == "pass"
        assert precision(config, files, "teacher", torch.device("cpu")).status == "pass"


def test_skipped_layers_that_are_not_there(workspace: Path, tmp_path: Path) -> None:
    section = {"quantize": "int8", "quantize_skip_layers": [0, 77]}
    rows = rows_of(write_config(workspace, tmp_path, teacher=section))
    check(rows, "teacher files", "teacher.quantize_skip_layers names layer 77", "the teacher's are 0 to")


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_shard(workspace: Path, tmp_path: Path, shards: Path, fault: str) -> None:
    shard = next((shards / "cpp" / "train").glob("shard*.mds"))
    if fault == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-10])
    rows = rows_of(write_config(workspace, tmp_path, data={"path": str(shards)}))
    says = "is missing" if fault == "missing" else f"has {shard.stat().st_size:,} bytes, its index says"
    check(rows, "shards", str(shard), says, "prepare the data again, or copy it again whole")


def test_few_samples(workspace: Path, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A domain with more held out than left to train on, and domains that the run draws many times over."""
    sizes = {name: domain.train.samples for name, domain in load_manifest(shards).domains.items()}
    steps = 5 * 3 * max(sizes.values()) // 8  # an equal share is 5 passes over the largest
    config = write_config(workspace, tmp_path, data={"path": str(shards)}, stop={"steps": steps})
    often = [f"{name} {8 * steps / 3 / size:.1f} times" for name, size in sizes.items()]
    check(rows_of(config), "samples of domains", f"{8 * steps:,} draws", *often, "max_passes", status="warn")
    capped = write_config(workspace, tmp_path, stop={"steps": steps}, mixture={"exhaustion": "cap", "max_passes": 100})
    assert rows_of(capped)["samples of domains"].status == "pass"

    manifest = load_manifest(shards)
    swapped = replace(manifest.domains["cpp"], train=manifest.domains["cpp"].validation)
    few = replace(swapped, validation=manifest.domains["cpp"].train)
    for part in ("train", "validation"):
        (shards / "cpp" / part).rename(shards / "cpp" / f"{part}-before")
    (shards / "cpp/train-before").rename(shards / "cpp/validation")
    (shards / "cpp/validation-before").rename(shards / "cpp/train")
    write_manifest(replace(manifest, domains={**manifest.domains, "cpp": few}))
    config = write_config(workspace, tmp_path, data={"path": str(shards)}, stop={"steps": 3})
    named = f"cpp ({few.train.samples:,} and {few.validation.samples:,})"
    check(rows_of(config), "samples of domains", "than held out", named, "--validation-samples", status="warn")
    assert distil(["--config", str(config), "--dry-run"]) == 0
    assert named in " ".join(capsys.readouterr().out.split())


def test_disk_full(workspace: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=1m") as small:
        rows = rows_of(write_config(workspace, tmp_path, output_dir=str(small)))
        check(rows, "disk for checkpoints", str(small), "1.05 MB free", "4 checkpoints", "checkpoint.keep_last")


def test_cache_of_the_teacher(workspace: Path, tmp_path: Path) -> None:
    """10 steps of 8 samples draw 27 of each of three domains at equal shares; 50 of python are there, 9 of cpp."""

    def written(**cache: Any) -> Path:
        return write_config(
            workspace,
            tmp_path,
            mixture={"controller": "equal", "ratio_cap": None, "initial_floor": 0.0},
            teacher={"path": str(workspace / "teacher"), "cache": {"draws": 64, **cache}},
        )

    nothing = str(tmp_path / "nothing")
    row = rows_of(written(path=nothing))["teacher's cache"]
    most = 81 * 64 * bytes_a_token("sampled", 64, 600)
    assert row.status == "pass" and f"81 go through the teacher, at most {most / 1e3:.3g} kB of" in row.found, row
    check(
        rows_of(written(path=nothing, mode="read_only")),
        "teacher's cache",
        "81 samples are missing",
        "ddk teach --samples 27 ",
    )
    assert not Path(nothing).exists()
    with tmpfs(tmp_path / "small", "size=256k") as small:
        check(rows_of(written(path=str(small / "cache"))), "teacher's cache", "of 262 kB that are free", "free space")
    path = str(tmp_path / "cache")
    config = load_config(written(path=path))
    inputs = check_inputs(config, SingleProcess())
    dataset, conditions = MixtureDataset(inputs.store, inputs.names), cache_conditions(config, inputs)
    place = LocalPlace(Path(path))
    make_cache(place, conditions)
    cache = TeacherCache(place, conditions, dict(zip(dataset.names, dataset.shas, strict=True)), 600, inputs.teachers)
    for name, count in (("python", 50), ("cpp", 9)):
        order = DomainOrder(name, dataset.shard_sizes[dataset.names.index(name)], config.seed)
        for number in order.take(0, count):
            cache.add(name, int(number), Drawn(np.zeros((64, 64), np.int64), *np.zeros((2, 64), np.float32)))
    cache.publish()
    rows = rows_of(written(path=path, mode="read_only"))
    of_python, of_cpp = "50 of python, of about 27 that the run draws 27", "9 of cpp, of about 27 that the run draws 9"
    check(rows, "teacher's cache", of_python, of_cpp, "a short read gives", "45 samples are missing", status="warn")
    other = rows_of(written(path=path, draws=32))
    check(other, "teacher's cache", "it was computed with draws 64, the run has 32")


def test_read_only_output(workspace: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "fixed", "size=64m,ro") as fixed:
        rows = rows_of(write_config(workspace, tmp_path, output_dir=str(fixed)))
    assert rows["output directory"].status == "fail"
    assert all(part in rows["output directory"].found for part in ("output_dir", str(fixed), "Read-only"))


def test_small_shared_memory(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "shm", "size=64m") as shm:
        row = shared_memory(8, shm)
    assert row.status == "fail" and "67.1 MB free" in row.found and "--shm-size=1600m" in row.fix


def test_port_taken(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        check(rows_of(write_config(workspace, tmp_path)), "port", f"MASTER_PORT {port} is not free", "--master_port")


def test_directory_of_another_run(workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"format": FORMAT, "seed": 9}))
    rows = rows_of(write_config(workspace, tmp_path))
    check(rows, "run directory", str(run_dir), "holds another run", "Set another name")


def test_directory_in_use(workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    with (run_dir / ".lock").open("w") as lock:
        lock.write("process 7 on node-3")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = rows_of(write_config(workspace, tmp_path))
    check(rows, "run directory", str(run_dir), "process 7 on node-3 is running in it", "stop that")


def write_checkpoint(config: Path, step: int) -> Path:
    """Write a checkpoint of that step with one file of 1000 bytes; return its directory."""
    loaded = load_config(config)
    directory = loaded.run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "shard.pt").write_bytes(bytes(1000))
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": 4, "ledger_bytes": 0, "run": {}}
    (directory / "manifest.json").write_text(json.dumps(manifest | {"versions": {}, "files": {"shard.pt": [1000, ""]}}))
    return directory


@pytest.mark.parametrize("older", [True, False])
def test_newest_checkpoint_damaged(workspace: Path, tmp_path: Path, older: bool) -> None:
    from ddk_ds.train.inputs import check_inputs
    from ddk_ds.train.run_dir import run_identity

    config = write_config(workspace, tmp_path)
    newest = write_checkpoint(config, 6)
    if older:
        write_checkpoint(config, 3)
    loaded = load_config(config)
    identity = run_identity(loaded, check_inputs(loaded, SingleProcess()).fingerprints)
    (loaded.run_dir / "run.json").write_text(json.dumps(identity))
    whole = rows_of(config)["newest checkpoint"]
    assert whole.status == "pass" and "step-00000006" in whole.found and "converted" in whole.found
    (newest / "shard.pt").write_bytes(bytes(990))
    rows = rows_of(config)
    parts = (str(newest), "shard.pt has 990 bytes, manifest.json says 1,000", "move it away")
    if older:
        check(rows, "newest checkpoint", *parts, "continue from step-00000003", status="warn")
    else:
        row = rows["newest checkpoint"]
        assert row.status == "fail" and all(part in f"{row.found} {row.fix}" for part in parts), row
        assert "none is complete" in rows["run directory"].found


def write_huge_model(source: Path, directory: Path) -> Path:
    """A model of 70 B parameters: config.json, tokenizer, and safetensors whose bytes are a hole."""
    shutil.copytree(source, directory)
    hidden, layers, vocab = 8192, 80, 600
    values = json.loads((directory / "config.json").read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": 28672,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    (directory / "config.json").write_text(json.dumps(values))
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.weight"] = (3 * 28672, hidden)
        shapes[f"model.layers.{layer}.attention.weight"] = (2 * (8192 + 1024), hidden)
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [end, end := end + 2 * rows * columns],
        }
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return directory


def test_memory_that_cannot_fit(workspace: Path, tmp_path: Path) -> None:
    huge = write_huge_model(workspace / "student", tmp_path / "huge")
    teacher = {"shard_within": "auto"}
    rows = rows_of(write_config(workspace, tmp_path, student={"path": str(huge)}, teacher=teacher))
    assert rows["student files"].status == "pass", rows["student files"]
    row = rows["host memory"]
    assert row.status == "fail", row
    assert all(part in f"{row.found} {row.fix}" for part in ("master weights and moments", "auto is world", "--ranks"))
    assert rows["disk for checkpoints"].status == "fail"  # 16 bytes x 70 B x 4
    assert available_bytes() > 0


def test_clock_offset() -> None:
    first = [(10.0, 10.2), (11.0, 11.1)]
    assert clock_offset(first, [(10.1, 10.2), (11.0, 11.1)]) == 0.0
    ahead = [(before + 70, after + 70) for before, after in first]
    assert 69.8 < clock_offset(first, ahead) < 70.2
    assert -70.2 < clock_offset(ahead, first) < -69.8


def test_merge_names_the_rank() -> None:
    good, bad = Row("shm", "pass", "enough"), Row("shm", "fail", "too small", "more")
    merged = merge([[good], [bad], [bad]], ["a", "b", "c"])
    assert [asdict(row) for row in merged] == [
        {"name": "shm", "status": "fail", "found": "rank 1 on b and 1 more: too small", "fix": "more"}
    ]
    assert merge([[good], [good]], ["a", "b"]) == [good]


def test_an_error_that_comes_of_the_end_does_not_end_a_rank_first(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    gone = threading.Event()

    def leave(code: int, _say: object) -> None:
        gone.set()  # another rank has heard of it, and has closed its connections
        time.sleep(0.5)
        left.append(code)  # the process would end here

    monkeypatch.setattr("ddk_ds.train.preflight.rows.leave", leave)
    with pytest.raises(RuntimeError, match="closed by peer"), deadline("a barrier", 0.01):
        gone.wait()
        raise RuntimeError("closed by peer")
    assert left == [EXIT_TEMPORARY]
