"""`ddk generate` shows what plain transformers generates with the student and the teacher of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_ds.commands.generate_command import _shown, main
from tools.bench.small_run import run_tool, write_config

PROMPTS = ["def main(argument):\n    return", "The"]
TOKENS = 6  # their text fits into a cell of the wide form


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run, as far as `ddk generate` reads it."""
    folder = tmp_path_factory.mktemp("generate")
    run = folder / "runs/run"
    run.mkdir(parents=True)
    shutil.copyfile(write_config(workspace, folder), run / "config.yaml")
    shutil.copytree(workspace / "student", run / "export")
    return run


def plain(model: Path, prompt: str) -> str:
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


def one_line(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() and letter not in " ┃│\ufffd")


@pytest.mark.parametrize("width", [60, 120])
def test_both_models(
    run: Path, workspace: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main([str(run), *prompts, "--max-new-tokens", str(TOKENS)]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    # In the wide form the two texts stand in one line, in the narrow form below each other.
    assert any("student" in line and "teacher" in line for line in output.splitlines()) == (width > 80)
    for prompt in PROMPTS:
        for model in (run / "export", workspace / "teacher"):
            assert all(one_line(line) in one_line(output) for line in plain(model, prompt).splitlines())


def test_a_terminal_obeys_no_text() -> None:
    console = Console(width=100, force_terminal=True)
    with console.capture() as output:
        console.print(_shown("a\x1b[2J", {"student": "b\x07\tc\x1b]0;title\x07"}, 100))
    assert "\x1b[2J" not in output.get() and "\x1b]0" not in output.get() and "\x07" not in output.get()
    assert "a\ufffd[2J" in output.get() and "b\ufffd" in output.get()


def test_the_newest_export_of_an_unfinished_run(
    run: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copyfile(run / "config.yaml", unfinished / "config.yaml")
    assert main([str(unfinished), "--prompt", "The"]) == 2
    assert f"ddk export {unfinished}" in capsys.readouterr().err
    for step in ("step-00000900-fp32", "step-00001000-bf16"):
        shutil.copytree(workspace / "student", unfinished / "exports" / step)
    assert main([str(unfinished), "--prompt", "The", "--no-teacher", "--max-new-tokens", "1"]) == 0
    output = one_line(capsys.readouterr().out)
    assert "step-00001000-bf16" in output and "teacher" not in output


def test_sampling_follows_its_seed(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The\n\ndef f(x):\n")
    options = [str(run / "export"), "--prompt-file", str(tmp_path / "prompts.txt"), "--temperature", "1.5"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*options, "--seed", seed, "--top-p", "0.95"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].count("prompt") == 2, "blank lines are no prompts"
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_template_is_applied(
    run: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(workspace / "teacher", chat)
    values = json.loads((chat / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}def {{ m.content }}:{% endfor %}"
    (chat / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": template}))
    for options in (["--chat", "--prompt", "main"], ["--prompt", "def main:"]):
        assert main([str(chat), "--max-new-tokens", str(TOKENS), *options]) == 0
    with_template, without = capsys.readouterr().out.split("prompt")[1:]
    assert with_template.splitlines()[1:] == without.splitlines()[1:]
    assert main([str(run), "--chat", "--prompt", "The"]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x" * 4000], "together more than the 2048 positions of"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: cannot be read: No such file"),
        (["--prompt", "The", "--device", "cud"], "--device cud: "),
    ],
)
def test_a_wrong_prompt_or_device(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    tokenizer = json.loads((other / "export/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "export/tokenizer.json").write_text(json.dumps(tokenizer))
    assert main([str(other), "--prompt", "The"]) == 2
    assert "have different tokenizers" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--prompt", "x", "--temperature", "0"], ["--prompt", "x", "--top-p", "2"]])
def test_wrong_options(run: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(run), *options])
    assert ended.value.code == 2


def test_neither_run_nor_model(tmp_path: Path) -> None:
    done = run_tool("tools/generate.py", str(tmp_path), "--prompt", "The", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "is neither" in done.stderr
