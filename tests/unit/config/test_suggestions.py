"""A wrong key gets the key that was meant, and an error says if an override or the file is its source."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from ddk_ds.command_line import command_parser
from ddk_ds.commands.distill_rank import main
from ddk_ds.config import Config, load_config
from ddk_ds.config.keys import all_keys
from ddk_ds.config.suggestions import _ELSEWHERE, dashes_hint, suggestions
from ddk_ds.errors import ConfigError

HUGGING_FACE = {
    "output_dir": "output_dir",
    "learning_rate": "optimizer.learning_rate",
    "warmup_steps": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_norm",
    "per_device_train_batch_size": "train.micro_batch_samples",
    "gradient_accumulation_steps": "train.global_batch_samples",
    "bf16": "train.precision",
    "max_steps": "stop.steps",
    "num_train_epochs": "stop.data_once",
    "eval_steps": "mixture.interval_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    "gradient_checkpointing": "student.gradient_checkpointing",
    "dataloader_num_workers": "data.num_workers",
    "report_to": "monitor.wandb_project",
    "run_name": "name",
    "seed": "seed",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration without errors."""
    path = tmp_path / "run.yaml"
    path.write_text("name: run\nstudent: {path: a/s}\nteacher: {path: a/t}\ndata: {path: d}\nstop: {steps: 4000}\n")
    return path


def test_the_names_of_the_trainer_lead_to_ours() -> None:
    theirs = {field.name for field in fields(TrainingArguments)}
    assert set(HUGGING_FACE) <= theirs | {"warmup_ratio"}, "transformers 5 has no warmup_ratio"
    assert {name: suggestions(Config, f"train.{name}")[0] for name in HUGGING_FACE} == HUGGING_FACE


def test_the_table_names_keys_that_exist_and_none_of_our_own() -> None:
    keys = {key for key, _ in all_keys(Config)}
    assert set(_ELSEWHERE) <= keys
    names = [name for text in _ELSEWHERE.values() for name in text.split()]
    assert len(names) == len(set(names))
    assert not {key.rpartition(".")[2].replace("_", "") for key in keys} & set(names)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lr", ["optimizer.learning_rate"]),
        ("lr", ["optimizer.learning_rate"]),
        ("batch_size", ["train.global_batch_samples"]),
        ("data.sequence_lenght", ["data.sequence_length"]),
        ("sequence-length", ["data.sequence_length"]),
        ("trian.precision", ["train.precision"]),
        ("path", ["student.path", "teacher.path", "teacher.cache.path", "data.path"]),
        ("min_learning_rte", ["optimizer.min_learning_rate"]),
        ("train.nonsense", []),
        ("nonsense", []),
    ],
)
def test_a_wrong_key(key: str, meant: list[str]) -> None:
    assert suggestions(Config, key) == meant


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1e-3", "override train.lr=1e-3: unknown key, did you mean optimizer.learning_rate=...?"),
        ("trainer.lr=1e-3", "did you mean optimizer.learning_rate=... (for trainer.lr)?"),
        ("trane={nonsense: 1}", "override trane={nonsense: 1}: unknown key, did you mean train=...?"),
        (
            "train.nonsense=1",
            "unknown key, known keys: global_batch_samples, micro_batch_samples, sequence_parallel, precision",
        ),
        ("optimizer.learning_rate=fast", "override optimizer.learning_rate=fast: input should be a valid number"),
        ("data.domains=[]", "override data.domains=[]: is empty: name at least one, or leave the key out"),
        ("data.domains=[a,b", "override 'data.domains=[a,b': its value cannot be read as YAML"),
        ("data.path.x=1", "with data.path.x=1: data.path: input should be a valid string"),
        ("method=cpt", "run.yaml with method=cpt: method: cpt takes no teacher"),
        ("mixture.exhaustion=cap", "run.yaml with mixture.exhaustion=cap: mixture: exhaustion: cap needs a limit"),
        ("learning_rate", "override 'learning_rate': write it as key.path=value"),
    ],
)
def test_an_error_says_that_the_override_is_its_source(
    config: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--print-config", override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    if message.startswith("override"):
        assert "run.yaml" not in error


def test_an_error_of_the_file_names_the_file(config: Path) -> None:
    config.write_text(config.read_text() + "train: {lr: 0.001}\noptimizer: {eps: tiny}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config, ["seed=-1"])
    file, override = f"{config}: ", "override seed=-1: input should be greater than or equal to 0, got -1"
    assert f"{file}train.lr: unknown key, did you mean optimizer.learning_rate?" in str(caught.value)
    assert f"{file}optimizer.eps: input should be a valid number" in str(caught.value)
    assert override in str(caught.value)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--optimizer.learning_rate=1e-3", "without dashes: optimizer.learning_rate=1e-3"),
        ("--optimizer.learning_rate", "without dashes: optimizer.learning_rate=..."),
        ("--batch-size=8", "without dashes: train.global_batch_samples=8"),
        ("--nonsense", ""),
    ],
)
def test_an_override_with_dashes(option: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser(None, dashes_hint)
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(SystemExit) as caught:
        parser.parse_intermixed_args([option, "seed=1"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and f"unrecognized arguments: {option}" in error
    assert meant in error and bool(meant) == ("without dashes" in error)
