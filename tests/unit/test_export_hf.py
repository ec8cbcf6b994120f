"""tools/export_hf.py: the model card, what is refused and how, and what is never lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from ddk_ds.commands.export_command import main
from ddk_ds.data.tokenizer import EOS_TOKEN, PAD_TOKEN, save_tokenizer
from ddk_ds.engine.export import CheckpointExport
from ddk_ds.engine.model_files import read_licence, read_model
from tests.dist.tiny import VOCAB, save_model
from tests.saved_run import save_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and a run."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder / "student", vocab=VOCAB, tied=True, seed=1)
    shutil.copytree(folder / "student", folder / "teacher")
    save_run(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's directory, a copy of its own; no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(shutil.copytree(made / "runs/tiny", tmp_path / "tiny"))


def card_of(directory: Path) -> tuple[dict[str, Any], str]:
    """The fields at the head of the model card, and its text."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def write_tokenizer(model: Path) -> None:
    """Give a model a tokenizer in all its forms, two chat templates, and files that are not a student's."""
    save_tokenizer(Tokenizer(models.WordLevel({EOS_TOKEN: 0, PAD_TOKEN: 1, "hi": 2}, unk_token=PAD_TOKEN)), model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ messages[-1].content }} with tools")
    for name in ("own.tiktoken", "tokenizer.model", "merges.txt", "LICENSE"):
        (model / name).write_text(name)
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    (model / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_processor_type": "X"}')
    (model / "pytorch_model.bin.index.json").write_text("{}")


def test_tokenizer_templates_and_settings_are_carried(made: Path, tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(made / name, tmp_path / name)
    write_tokenizer(tmp_path / "student")
    out = tmp_path / "out"
    assert main([str(save_run(tmp_path, steps=(2,))), "--out", str(out)]) == 0
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "config.json", "ddk_ds_export.json", "model.safetensors", "LICENSE", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "merges.txt"),
        *("own.tiktoken", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    }
    for name in files - {"README.md", "config.json", "ddk_ds_export.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (tmp_path / "student" / name).read_bytes()
    messages = [{"role": "user", "content": "hi"}]
    for template, expected in ((None, "<user>hi"), ("tool_use", "hi with tools")):
        texts = [
            AutoTokenizer.from_pretrained(directory).apply_chat_template(
                messages, chat_template=template, tokenize=False
            )
            for directory in (out, tmp_path / "student")
        ]
        assert texts == [expected, expected]
    # An image processor's settings belong to no text model; those of a text model's are its own.
    assert main([str(tmp_path / "runs/tiny"), "--out", str(out)]) == 0, "an export with a directory is replaced"
    (tmp_path / "student/preprocessor_config.json").write_text('{"tokenizer_class": "X"}')
    assert main([str(tmp_path / "runs/tiny"), "--out", str(out)]) == 0
    assert (out / "preprocessor_config.json").is_file()


def test_newest_step_by_default(run: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    out = run / "exports/step-00000004-fp32"
    assert f"{out}: step 4, fp32" in capsys.readouterr().out
    ours, start = load_file(out / "model.safetensors"), load_file(made / "student/model.safetensors")
    assert ours.keys() == start.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, 4 * start[name], rtol=0, atol=0)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_the_card(run: Path, made: Path) -> None:
    assert main([str(run), "--step", "2", "--out", str(run / "x")]) == 0
    front, text = card_of(run / "x")
    assert front["license"] == "unknown" and front["base_model"] == "student"
    assert "**Unknown: see the starting model**, student, which names none" in text
    assert "teacher's licence may have terms" in text
    assert "# tiny, step 2" in text and "student after 8,000 tokens, teacher teacher" in text
    # Measured at step 2: 40 - 2 against 20. What the ledger has of step 4 is not in it.
    assert "| code | 40.00 | 38.00 | 20.00 | 1.900 | 2,000 | 25.0% |" in text
    assert "| 2 | 0.270 | 0.730 |" in text and "| 4 |" not in text
    assert "learning_rate: 0.001" in text and "torch 2.9" in text
    assert str(made) not in text, "a path of this machine"


def test_the_licence_of_the_students_own_card(made: Path, tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "student/README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Student\n")
    (tmp_path / "student/LICENSE").write_text("terms")
    run = save_run(tmp_path, steps=(2,), teacher=None, method="cpt")
    assert main([str(run), "--out", str(tmp_path / "x")]) == 0
    front, text = card_of(tmp_path / "x")
    assert front["license"] == "mit" and "mit, as student names it." in text and "teacher's licence" not in text
    assert (tmp_path / "x/LICENSE").read_text() == "terms"


@pytest.mark.parametrize(
    ("card", "config", "licence"),
    [
        ("license: other\nlicense_name: llama3\nlicense_link: LICENSE", {}, ("other", "llama3")),
        ("language: en", {"license": "bsd-3-clause"}, ("bsd-3-clause", None)),  # as `ddk cut-student` notes it
        ("license: unknown", {}, None),  # the card of an export whose start named none
        ("license: other", {"license": ""}, None),
        ("license: [mit", {}, None),
    ],
)
def test_the_licence_that_a_model_names(
    made: Path, tmp_path: Path, card: str, config: dict[str, str], licence: tuple[str, str | None] | None
) -> None:
    student = shutil.copytree(made / "student", tmp_path / "student")
    (student / "README.md").write_text(f"---\n{card}\n---\n# Student\n")
    values = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(values | config))
    found = read_licence(read_model(student, "student"))
    assert (found.get("license"), found.get("license_name")) == (licence or (None, None))


def test_a_card_of_many_intervals_stays_short(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    many = [{**lines[0], "step": 0}] * 500
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*many, *lines[1:])))
    assert main([str(run), "--out", str(run / "x")]) == 0
    _, text = card_of(run / "x")
    assert "12 of the 502 intervals" in text and text.count("\n") < 120


@pytest.mark.parametrize("line", ["{", '["kind"]', '{"kind": "interval"}', '{"kind": "interval", "step": "0"}', None])
def test_a_damaged_ledger_keeps_no_student_back(run: Path, line: str | None) -> None:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    damaged = "" if line is None else "".join(f"{each}\n" for each in (lines[0], line, *lines[1:]))
    (run / "ledger.jsonl").write_text(damaged)
    assert main([str(run), "--out", str(run / "x")]) == 0
    assert "Not known: the run's ledger.jsonl could not be read" in card_of(run / "x")[1]
    assert (run / "x/model.safetensors").is_file()


class Refused(NamedTuple):
    """What is done to the run, the options, and what the error says."""

    change: Callable[[Path], object]
    options: tuple[str, ...]
    message: str


def damage(run: Path) -> None:
    """Change a byte of the newest checkpoint's shards."""
    path = run / "checkpoints/step-00000004/state/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unfinished(run: Path) -> None:
    """No checkpoint is complete."""
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()


def to_user(run: Path) -> None:
    """A directory of the user's."""
    (run / "mine").mkdir()
    (run / "mine/thesis.txt").write_text("all of it")


@pytest.mark.parametrize(
    "case",
    [
        Refused(lambda run: (run / "config.yaml").unlink(), (), "holds no config.yaml and checkpoints/"),
        Refused(unfinished, (), "none is complete yet"),
        Refused(lambda run: None, ("--step", "3"), "has complete checkpoints of steps 2, 4"),
        Refused(lambda run: (run / "checkpoints/step-00000002/manifest.json").unlink(), ("--step", "2"), "of steps 4"),
        Refused(damage, (), "optim_states.pt is damaged"),
        Refused(to_user, ("--out", "mine"), "is no model's directory"),
        Refused(to_user, ("--out", "mine", "--overwrite"), "is no model's directory"),
        Refused(lambda run: None, ("--max-shard-gb", "0"), "must be above 0"),
        Refused(lambda run: None, ("--student", "no-such/model"), "student.path: no-such/model is neither"),
    ],
)
def test_refused(run: Path, case: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run)
    case.change(run)
    before = sorted(run.rglob("*"))
    assert main([str(run), *case.options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and case.message in error
    assert sorted(run.rglob("*")) == before


def test_no_room(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert main([str(run)]) == 2
    assert "has 1,000 free" in capsys.readouterr().err
    assert not (run / "exports").exists()


def test_unknown_dtype(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--dtype", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


def test_another_student_than_the_runs(run: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(run / "other", vocab=VOCAB, tied=True, seed=2)
    assert main([str(run), "--student", str(run / "other")]) == 2
    assert "is not the model that the run began with" in capsys.readouterr().err
    assert main([str(run), "--student", str(made / "student")]) == 0


def test_replaces_its_own_and_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "x"
    assert main([str(run), "--step", "2", "--out", str(out)]) == 0
    assert main([str(run), "--out", str(out)]) == 0
    assert "step 4" in (out / "README.md").read_text()
    (out / "README.md").write_text("my own card")
    assert main([str(run), "--out", str(out)]) == 2
    assert "README.md in it is not as we wrote it" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "my own card"
    assert main([str(run), "--out", str(out), "--overwrite"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main([str(run), "--out", str(out)]) == 2
    assert "notes.txt in it" in capsys.readouterr().err


def test_what_changes_while_it_is_written_is_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "x"
    assert main([str(run), "--step", "2", "--out", str(out)]) == 0
    write = CheckpointExport.write

    def slow(*arguments: Any, **options: Any) -> None:
        (out / "notes").mkdir()
        (out / "notes/mine.txt").write_text("mine")
        write(*arguments, **options)

    monkeypatch.setattr(CheckpointExport, "write", slow)
    assert main([str(run), "--out", str(out)]) == 2
    assert "notes in it is not as we wrote it" in capsys.readouterr().err
    assert (out / "notes/mine.txt").read_text() == "mine" and "step 2" in (out / "README.md").read_text()


def test_never_over_what_it_is_made_from(run: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "student", run / "model/student")
    shutil.copy(made / "student/config.json", run / "model")
    arguments = [str(run), "--student", str(run / "model/student"), "--overwrite"]
    for out in (run / "model/student", run / "model"):
        assert main([*arguments, "--out", str(out)]) == 2
        assert "lies there, which the export is made from" in capsys.readouterr().err


def test_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(run), "--out", str(run / "x")]) == 2
    assert "x cannot be written: No space left on device; make room, then" in capsys.readouterr().err
    assert not list(run.glob("*x*"))
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (run / ".partial-x").mkdir()  # by one that was killed
    (run / ".partial-x/model.safetensors").write_text("half")
    assert main([str(run), "--out", str(run / "x")]) == 0
    assert not (run / ".partial-x").exists()
