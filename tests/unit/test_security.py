"""A run unpickles nothing, runs no untrusted code and writes no credentials."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.commands.distill_rank import main
from ddk_ds.config import load_config
from ddk_ds.engine.model_files import check_code, read_model
from ddk_ds.errors import ConfigError
from ddk_ds.redact import redact
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.ledger import Ledger
from tools.bench.small_run import write_config

ROOT = Path(__file__).parents[2]


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in the project's own code, with its file and line."""
    for tree in ("ddk_ds", "launch", "tools"):
        for path in (ROOT / tree).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_only_tensors_are_unpickled() -> None:
    loads = 0
    for where, call in calls():
        name = ast.unparse(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), where
        assert keywords.get("allow_pickle", "False") == "False", where
        if name == "torch.load":
            loads += 1
            assert keywords.get("weights_only") == "True", where
    assert loads


def test_libraries_that_load_files_cannot_unpickle_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "ddk_ds/engine/runtime.py").read_text()
    assert 'os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"' in source
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"bad": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "a.pt", weights_only=False)


def test_no_shell_and_no_code_from_text() -> None:
    for where, call in calls():
        name = ast.unparse(call.func)
        assert name not in ("os.system", "os.popen", "eval", "exec", "subprocess.getoutput"), where
        assert all(keyword.arg != "shell" for keyword in call.keywords), where


def test_weights_are_only_safetensors(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((workspace / "student/config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds no safetensors weights"):
        read_model(tmp_path, "student.path")


def test_a_models_code_runs_only_if_it_is_trusted(workspace: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for path in (workspace / "student").iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    values = json.loads((student / "config.json").read_text())
    values |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (student / "config.json").write_text(json.dumps(values))
    (student / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = load_config(write_config(workspace, tmp_path, student={"path": str(student)}))
    with pytest.raises(ConfigError, match=r"'unheard_of'.* student.trust_remote_code: true"):
        check_inputs(config, SingleProcess())
    assert not (tmp_path / "ran").exists()
    files = read_model(student, "student.path")
    check_code(files, "student", trusted=True)
    (student / "code.py").unlink()
    with pytest.raises(ConfigError, match="needs Python code that is not in it"):
        check_code(files, "student", trusted=True)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("data.path=https://user:sesame@store/shards", "data.path holds a credential (https://***@store/shards)"),
        ("data.path=s3://b/x?X-Amz-Signature=sesame", "data.path holds a credential (s3://b/x?X-Amz-Signature=***)"),
        ("deepspeed.wandb.api_key=sesame", "deepspeed.wandb.api_key holds a credential (***)"),
    ],
)
def test_a_configuration_takes_no_credentials(
    workspace: Path, tmp_path: Path, override: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(workspace, tmp_path, data={"cache_dir": str(tmp_path / "cache")})
    assert main(["--config", str(config), "--dry-run", override]) == 2
    error = capsys.readouterr().err
    assert shown in error.replace("\n", "") and "sesame" not in error


def test_credentials_are_removed_from_what_is_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, rank=0)
    ledger.rewind(0)
    ledger.event("data", reason="https://user:sesame@store/x failed: token=sesame, next")
    ledger.write({"kind": "step", "domain_tokens": [1, 2], "text": "password: sesame"})
    written = (tmp_path / "events.jsonl").read_text() + (tmp_path / "ledger.jsonl").read_text()
    assert "sesame" not in written
    assert json.loads((tmp_path / "events.jsonl").read_text())["reason"].endswith("token=***, next")
    assert json.loads((tmp_path / "ledger.jsonl").read_text())["domain_tokens"] == [1, 2]


def test_ordinary_text_is_not_changed() -> None:
    for text in ("s3://bucket/a@b/c", "12 tokens/s", "tokenizer: x", "data.path=/a/b", '{"domain_tokens": [1]}'):
        assert redact(text) == text
