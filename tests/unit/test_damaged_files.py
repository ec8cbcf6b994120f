"""Every file of a run and of its data, damaged in every way, under every reader: right, said or refused in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from ddk_ds.comm import SingleProcess
from ddk_ds.command_line import reports_user_errors
from ddk_ds.commands import (
    compare_command,
    export_command,
    replay_command,
    status_command,
    summary_command,
    verify_command,
)
from ddk_ds.config import load_config
from ddk_ds.errors import UserError
from ddk_ds.files import read_object
from ddk_ds.report.live_charts import LiveCharts
from ddk_ds.report.page import page, sections
from ddk_ds.report.records import read_runs
from ddk_ds.run_files import UNREADABLE
from ddk_ds.train.checkpoint.restore import read_roll_backs
from ddk_ds.train.checkpoint.usable_checkpoint import usable_checkpoint
from ddk_ds.train.ledger import Ledger
from ddk_ds.train.run_dir import check_run_dir, run_identity
from tests.dist.tiny import VOCAB, save_model
from tests.saved_run import end_run, save_run

NUMBER = re.compile(rb"(?<=: )\d[\d.]*")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "NUL": lambda content: _in_the_middle(content, bytes(8)),
    "garbage": lambda content: _in_the_middle(content, b"\xff}{\n]["),
    "deep": lambda content: b"[" * 5_000,
    "a list": lambda content: b"[" + content.rstrip().replace(b"\n", b" ") + b"]\n",
    "a string": lambda content: b'"text"\n',
    "a number": lambda content: b"4\n",
    "a string for a number": lambda content: _last_number(content, lambda number: b'"' + number + b'"'),
    "another number": lambda content: _last_number(content, lambda number: b"7" if number[:1] != b"7" else b"8"),
}
_OFTEN = ("empty", "garbage", "a string for a number")
_LONG = pytest.mark.long("ten files under seven readers each, 8 s; the other three damages find most")
DAMAGE_PARAMETERS = [pytest.param(name, marks=() if name in _OFTEN else _LONG) for name in DAMAGES]
RUN_FILES = (
    "config.yaml",
    "run.json",
    "ledger.jsonl",
    "events.jsonl",
    "summary.json",
    "roll_backs.json",
    "checkpoints/step-00000004/manifest.json",
    "export/ddk_ds_export.json",
    "export/config.json",
    "stacks/rank-0.txt",
)
# A number of these has no second source; the ledger has one when the run continues, the hash of its checkpoint.
WITHOUT_A_HASH = ("ledger.jsonl", "summary.json", "events.jsonl", "roll_backs.json")
READERS = ("resume", "status", "report", "replay", "summary", "export", "compare")


def _in_the_middle(content: bytes, with_this: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + with_this + content[half + len(with_this) :]


def _last_number(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    found = list(NUMBER.finditer(content))
    if not found:
        return b"4\n"
    last = found[-1]
    return content[: last.start()] + change(last[0]) + content[last.end() :]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and runs/ddk-s0, a finished run."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "student", vocab=VOCAB, tied=True, seed=1)
    shutil.copytree(folder / "student", folder / "teacher")
    run = save_run(folder, name="ddk-s0")
    end_run(run)
    (run / "roll_backs.json").write_text('[{"step": 2, "failed_step": 3, "skip_until": 24, "reason": "spikes"}]')
    (run / "stacks").mkdir()
    (run / "stacks/rank-0.txt").write_text("export after step 4, at most 10 s\n")
    assert export_command.main([str(run), "--out", str(run / "export")]) == 0
    return folder


@pytest.fixture(scope="module")
def undamaged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each reader says about the run as it is, by its name."""
    folder, original = tmp_path_factory.mktemp("undamaged"), made / "runs/ddk-s0"
    return {
        reader: read(reader, Path(shutil.copytree(original, folder / reader / "ddk-s0")), original)
        for reader in READERS
    }


def read(reader: str, run: Path, original: Path) -> str:
    """Return what a reader says about a run, without times; raises UserError, as all do for an error of one line."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = _resume(run, original) if reader == "resume" else _command(reader, run)
    if code == 2:
        error = err.getvalue()
        assert error.startswith("error: ") and error.count("\n") == 1, error
        raise UserError(error)
    text = f"code {code}\n{out.getvalue()}{err.getvalue()}".replace(str(run.parent), "RUNS")
    return re.sub(r"last sign of life .* ago|, [^,]* old|free [\d.,]+", "", text)


def _command(reader: str, run: Path) -> int:
    shutil.rmtree(run.parent / "out", ignore_errors=True)
    out = str(run.parent / "out")
    mains: dict[str, Callable[[], int]] = {
        "status": lambda: status_command.main([str(run)]),
        "report": lambda: _report(run),
        "replay": lambda: replay_command.main([str(run)]),
        "summary": lambda: summary_command.main([str(run)]),
        "export": lambda: export_command.main([str(run), "--out", out]),
        "compare": lambda: compare_command.main(["--report-only", "--out", str(run.parent)]),
    }
    return mains[reader]()


@reports_user_errors
def _report_on(arguments: Sequence[str] | None) -> int:
    """Make the report's page, with charts that are not drawn, which takes seconds, and print its numbers."""
    assert arguments is not None
    runs = read_runs([Path(name) for name in arguments])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddk_ds.report.page.live", lambda charts: LiveCharts("", repr(charts)))
        assert page(runs, sections(runs), {}, "").startswith("<!")
    unreadable = [event["text"] for event in runs[0].events if event["event"] == UNREADABLE]
    print(runs[0].results, runs[0].config_fault, unreadable)
    return 0


def _report(run: Path) -> int:
    return _report_on([str(run)])


def _resume(run: Path, original: Path) -> int:
    """Print where the command that began the run would continue it."""
    config = load_config(original / "config.yaml", [f"output_dir={run.parent}"])
    student = read_object(original / "run.json", "")["content.student"]
    check_run_dir(config, run_identity(config, {"student": student}))
    found = usable_checkpoint(run, SingleProcess())
    assert found is not None
    directory, manifest, passed = found
    Ledger(run, rank=0).rewind(manifest.ledger_bytes)
    print(directory, passed, read_roll_backs(run, SingleProcess()))
    return 0


# What a reader says of a damaged file, if not its name: a checkpoint, that it is damaged; a run's identity,
# that it is another's; of a model that cannot be read, no FLOPs.
SAYS_SO = {
    "run.json": "run.json|holds another run|has format",
    "checkpoints/step-00000004/manifest.json": "step-00000004",
    "export/config.json": r"16,000 \| [\d.]+ \| - ",
}


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("damage", DAMAGE_PARAMETERS)
def test_a_runs_files(made: Path, undamaged: dict[str, str], tmp_path: Path, name: str, damage: str) -> None:
    original = made / "runs/ddk-s0"
    for reader in READERS:
        run = Path(shutil.copytree(original, tmp_path / reader / "ddk-s0"))
        (run / name).write_bytes(DAMAGES[damage]((original / name).read_bytes()))
        try:
            said = read(reader, run, original)
        except UserError as error:
            said = str(error)
            assert "\n" not in said.rstrip(), f"{reader}: {said}"
        unknowable = damage == "another number" and name in WITHOUT_A_HASH
        if said == undamaged[reader] or (unknowable and (name, reader) != ("ledger.jsonl", "resume")):
            continue
        assert re.search(SAYS_SO.get(name, Path(name).name), said), f"{reader}:\n{said}\nbut was\n{undamaged[reader]}"


@pytest.mark.parametrize("name", ["domains.json", "code/train/index.json"])
@pytest.mark.parametrize("damage", DAMAGE_PARAMETERS)
def test_the_datas_files(
    workspace: Path, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(workspace / "shards", tmp_path / "shards"))
    path = data / name.replace("code", next(path.name for path in sorted(data.iterdir()) if path.is_dir()))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    code = verify_command.main([str(data)])
    error = capsys.readouterr().err
    assert code in (0, 2) and (code == 0 or (error.startswith("error: ") and error.count("\n") == 1))
    assert code == 0 or path.name in error or "domains.json" in error
    if "number" not in damage or damage == "a number":  # `"5"` is read as 5
        assert code == 2
