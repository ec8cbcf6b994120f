"""Each thing a user can get wrong gives one clear error and exit code 2, before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ddk_ds import data, distil
from ddk_ds.commands import distill_rank
from ddk_ds.commands.distill_rank import main
from ddk_ds.config import load_config
from ddk_ds.errors import UserError
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT
from ddk_ds.train.run_dir import claim_run_dir
from tools.bench.small_run import write_config

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("unknown key", {"data": {"sequence_lenght": 64}}, ("data.sequence_lenght", "sequence_length")),
    ("wrong type", {"train": {"micro_batch_samples": "two"}}, ("train.micro_batch_samples", "'two'")),
    ("alpha", {"mixture": {"alpha": 1.5}}, ("mixture.alpha", "1.5")),
    ("no such domain", {"data": {"domains": ["python", "latin"]}}, ("'latin'", "python, cpp, mathematics")),
    ("validation", {"data": {"validation_samples": 4000}}, ("'python'", "4000", "validation_samples")),
    ("sequence length", {"data": {"sequence_length": 128}}, ("data.sequence_length", "128", "64")),
    ("batch", {"train": {"micro_batch_samples": 3}}, ("train.global_batch_samples 8", "3")),
    ("no data", {"data": {"path": "nowhere"}}, ("data.path", "/nowhere: make it with `ddk prepare`")),
    ("no end", {"stop": {"steps": None}}, ("stop", "steps")),
    ("deepspeed", {"deepspeed": {"gradient_clipping": 7.0}}, ("gradient_clipping", "optimizer.clip_norm")),
    ("fixed", {"deepspeed": {"zero_optimization": {"stage": 1}}}, ("zero_optimization.stage", "remove it")),
    ("no teacher", {"teacher": None}, ("teacher.path",)),
    ("warm-up", {"optimizer": {"warmup_steps": 99}}, ("optimizer.warmup_steps is 99", "at most 10 steps")),
    ("not a list", {"data": {"domains": "python"}}, ("data.domains", "a list", "'python'")),
    ("not a section", {"checkpoint": "often"}, ("checkpoint", "a section", "'often'")),
    ("flash", {"student": {"attn_implementation": "flash_attention_2"}}, ("student.attn_impl", "flash_attn", "sdpa")),
    ("divergence", {"loss": {"divergence": "kl"}}, ("loss.divergence", "'kl'")),
    ("output", {"output_dir": "/proc/x"}, ("output_dir", "/proc/x")),
]


def error_of(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error that the user reads; assert that it is one line and that the exit code is 2."""
    assert main(["--config", str(config), "--dry-run"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(("name", "sections", "expected"), CASES, ids=[case[0] for case in CASES])
def test_configuration_errors(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    sections: dict[str, Any],
    expected: tuple[str, ...],
) -> None:
    text = error_of(write_config(workspace, tmp_path, **sections), capsys)
    assert all(part in text for part in expected), text


def test_a_good_configuration_passes(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(write_config(workspace, tmp_path)), "--dry-run"]) == 0
    assert "every check passed" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def damaged(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the prepared data that a test may damage."""
    return Path(shutil.copytree(workspace / "shards", tmp_path / "shards"))


def test_half_written_data(workspace: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / "domains.json").unlink()
    text = error_of(write_config(workspace, tmp_path, data={"path": str(damaged)}), capsys)
    assert "half-written" in text


def test_truncated_shard(workspace: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((damaged / "cpp" / "train").glob("shard*.mds"))
    shard.write_bytes(shard.read_bytes()[:-10])
    text = error_of(write_config(workspace, tmp_path, data={"path": str(damaged)}), capsys)
    assert shard.name in text and "cpp" in text


def test_empty_domain(workspace: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damaged / "domains.json"
    content = json.loads(path.read_text())
    content["domains"]["cpp"]["train"]["samples"] = 0
    path.write_text(json.dumps(content))
    assert "cpp" in error_of(write_config(workspace, tmp_path, data={"path": str(damaged)}), capsys)


def swap_two_tokens(tokenizer: Path) -> None:
    """Give two tokens of the vocabulary each other's id."""
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizer.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "fixes"),
    [
        (12, 4, 2, "train.global_batch_samples=8 or 16; train.micro_batch_samples=3 or 6; 1 or 3 ranks"),
        (256, 3, 16, "train.global_batch_samples=240 or 288; train.micro_batch_samples=2 or 4"),
        (4, 4, 2, "train.global_batch_samples=8; train.micro_batch_samples=2; 1 ranks"),
    ],
)
def test_a_batch_that_does_not_fit_names_the_values_that_do(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int, micro: int, ranks: int, fixes: str
) -> None:
    train = {"global_batch_samples": batch, "micro_batch_samples": micro}
    config = write_config(workspace, tmp_path, train=train)
    assert main(["--config", str(config), "--print-config", "--ranks", str(ranks)]) == 2
    assert f"x {ranks} ranks = {micro * ranks}: change one of the three: {fixes}\n" in capsys.readouterr().err
    for fix in fixes.split("; "):
        key, _, values = fix.removesuffix(" ranks").rpartition("=")
        for value in values.split(" or "):
            given = ["--ranks", value] if not key else ["--ranks", str(ranks), f"{key}={value}"]
            assert main(["--config", str(config), "--print-config", *given]) == 0


def test_a_dry_run_takes_the_number_of_ranks(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(workspace, tmp_path)
    assert main(["--config", str(config), "--dry-run", "--ranks", "4"]) == 0
    assert "4 ranks x 1 micro-batches x 2 samples" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert main(["--config", str(config), "--print-config", "--ranks", "4"]) == 2
    assert "--ranks 4: under a launcher" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "expected"), [("teacher", "vocabularies differ"), ("student", "tokenised with")])
def test_another_tokenizer(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, expected: str
) -> None:
    copy = Path(shutil.copytree(workspace / model, tmp_path / model))
    swap_two_tokens(copy / "tokenizer.json")
    text = error_of(write_config(workspace, tmp_path, **{model: {"path": str(copy)}}), capsys)
    assert expected in text


PROBE = (Path(data.__file__).parent / "probe.txt").read_text(encoding="utf-8").splitlines()


def without_merges(directory: Path, most: float) -> None:
    """Take merges from a tokenizer that make up to this share of the probe text's tokens; its vocabulary stays."""
    plain = AutoTokenizer.from_pretrained(directory)
    found = Counter(token for line in PROBE for token in plain.convert_ids_to_tokens(plain(line).input_ids))
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    used = {part for merge in merges for part in merge}
    left, kept = most * found.total(), []
    for merge in merges:
        count = found["".join(merge)]
        if "".join(merge) in used or not 0 < count <= left:
            kept.append(merge)
        else:
            left -= count
    assert len(kept) < len(merges)
    content["model"]["merges"] = kept
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def cut_differently(student: Path, teacher: Path) -> float:
    """Return the share of the probe text's tokens by one tokenizer that the other has not, by plain transformers."""
    tokens: list[list[tuple[int, int, tuple[int, int]]]] = [[], []]
    for found, directory in zip(tokens, (student, teacher), strict=True):
        plain = AutoTokenizer.from_pretrained(directory)
        for number, line in enumerate(PROBE):
            encoded = plain(line, return_offsets_mapping=True)
            places = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            found += [(number, token, place) for token, place in places]
    others = set(tokens[1])
    return sum(token not in others for token in tokens[0]) / len(tokens[0])


@pytest.mark.parametrize("most", [0.002, 0.2])
def test_tokenizers_of_one_vocabulary_and_other_merges(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], most: float
) -> None:
    teacher = Path(shutil.copytree(workspace / "teacher", tmp_path / "teacher"))
    without_merges(teacher, most)
    share = cut_differently(workspace / "student", teacher)
    assert 0 < share < 0.01 if most < 0.01 else share > 0.01
    config = write_config(workspace, tmp_path, teacher={"path": str(teacher)})
    if share > 0.01:
        text = error_of(config, capsys)
        assert f"one vocabulary and cut {share:.1%} of a probe text's tokens differently" in text
    allowed = ("data.allow_other_cuts=true",) if share > 0.01 else ()
    assert main(["--config", str(config), "--dry-run", *allowed]) == 0
    assert f"the teacher cuts {share:.2%} of a probe text's tokens differently" in capsys.readouterr().out


def test_data_without_the_bos_of_the_tokenizer(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = Path(shutil.copytree(workspace / "student", tmp_path / "student"))
    plain = AutoTokenizer.from_pretrained(student)
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="B $A", special_tokens=[("B", plain.pad_token_id)]
    )
    plain.save_pretrained(student)
    begin = AutoTokenizer.from_pretrained(student)("").input_ids
    assert main(["--config", str(write_config(workspace, tmp_path, student={"path": str(student)})), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"documents of the data begin with the ids [], the tokenizer itself begins a text with {begin}" in printed


def test_data_of_a_tokenizer_with_other_merges(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = Path(shutil.copytree(workspace / "student", tmp_path / "student"))
    without_merges(student, 0.002)
    text = error_of(write_config(workspace, tmp_path, student={"path": str(student)}), capsys)
    assert "cuts text differently (other merges): prepare the data with the student's" in text


def test_a_directory_of_another_run(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(workspace, tmp_path)
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "notes.txt").write_text("mine")
    assert "holds files of something else" in error_of(config, capsys)
    (run_dir / "run.json").write_text(json.dumps({"format": FORMAT, "seed": 9}))
    text = error_of(config, capsys)
    assert "holds another run" in text and (run_dir / "notes.txt").read_text() == "mine"


def test_no_such_model(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = error_of(write_config(workspace, tmp_path, student={"path": str(empty)}), capsys)
    assert "student.path" in text and "config.json" in text


def test_distil_finds_a_missing_path_before_it_starts_ranks(workspace: Path, tmp_path: Path) -> None:
    config = write_config(workspace, tmp_path)
    with pytest.raises(UserError, match=r"data\.path: there is no /nowhere"):
        distil(config, "data.path=/nowhere", ranks=2, quiet=True)
    assert not list((tmp_path / "runs").glob("*")), "the launcher would have left its output in <name>.log"


def test_a_run_that_goes_on_elsewhere_keeps_its_directory(workspace: Path, tmp_path: Path) -> None:
    config = load_config(write_config(workspace, tmp_path))
    claim_run_dir(config, {})
    other = "from ddk_ds.config import load_config; from ddk_ds.train.run_dir import claim_run_dir; import sys; "
    code = other + "claim_run_dir(load_config(sys.argv[1]), {})"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run.yaml"], capture_output=True, text=True)
    assert "CheckpointError" in done.stderr and f"process {os.getpid()} on" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("local_rank", "error", "said"),
    [
        ("1", RuntimeError("no such device"), f"rank 9 on {socket.gethostname()}: Traceback"),
        ("0", UserError("not on this node"), "error: not on this node"),
        ("1", UserError("not on this node"), ""),
    ],
)
def test_an_error_of_one_machine_is_said_before_the_ranks_have_met(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    local_rank: str,
    error: Exception,
    said: str,
) -> None:
    def run(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(distill_rank, "_run", run)
    monkeypatch.setattr(distill_rank, "follow_launcher", lambda: None)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main(["--config", str(write_config(workspace, tmp_path))]) == (1 if "Traceback" in said else 2)
    text = capsys.readouterr().err
    assert text.startswith(said) and (str(error) in text) == bool(said)
