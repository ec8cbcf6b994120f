"""Every command starts by each of its names, from any directory, and says what it does before it imports much."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from ddk_ds.commands import console, distill_command

ROOT = Path(__file__).parents[2]
DDK = str(Path(sys.executable).with_name("ddk"))
HEAVY = ("torch", "transformers", "deepspeed", "streaming", "datasets", "lm_eval")
# On an idle computer a command takes the time of its CPU; other processes do not lengthen that.
MAX_CPU_S = 2.0
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK")}


def front_doors() -> list[list[str]]:
    """Return the command of each file in launch/ and tools/, and of each subcommand of ddk."""
    files = [path for tree in ("launch", "tools") for path in sorted((ROOT / tree).glob("*.py"))]
    files = [path for path in files if "from ddk_ds.commands." in path.read_text(encoding="utf-8")]
    return [*([sys.executable, str(path)] for path in files), [DDK], *([DDK, name] for name in console.NAMES)]


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    output: str
    cpu_s: float


def run(command: Sequence[str], folder: Path, **variables: str) -> Ended:
    """Run a command from a foreign directory without PYTHONPATH, and measure the time of its CPU."""
    with (folder / f"{abs(hash(tuple(command)))}.txt").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT | variables, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return Ended(process.returncode, output.read(), usage.ru_utime + usage.ru_stime)


@pytest.mark.long("forty starts, 14 s; what a command imports before its arguments is tested below in one process")
def test_every_help(tmp_path: Path) -> None:
    doors = front_doors()
    assert len(doors) > 30, doors
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda door: run([*door, "--help"], tmp_path), doors))
    faults = []
    for door, ended in zip(doors, results, strict=True):
        if ended.code != 0 or ended.cpu_s > MAX_CPU_S or len(ended.output) < 100:
            faults.append(f"{door}: code {ended.code}, {ended.cpu_s:.1f} s\n{ended.output[-500:]}")
        elif len(door) == 2 and door[0] == DDK:
            assert ended.output.startswith(f"usage: ddk {door[1]} "), ended.output
    assert not faults, "\n".join(faults)


def test_nothing_heavy_is_imported_before_the_arguments_are_read() -> None:
    script = f"import sys\nfrom ddk_ds.commands import console, distill_rank\nfor name in {console.NAMES}:\n"
    script += f"    console.command(name)\nassert not (found := sys.modules.keys() & set({HEAVY})), found"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_fits_a_screen_and_knows_every_command(tmp_path: Path) -> None:
    lines = run([DDK, "--help"], tmp_path).output.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) < 80
    modules = {path.name for path in (ROOT / "ddk_ds/commands").glob("*_command.py")}
    assert {f"{name.replace('-', '_')}_command.py" for name in console.NAMES} == modules
    assert all(any(name in line.split()[:2] for line in lines) for name in console.NAMES)


def test_no_such_command(tmp_path: Path) -> None:
    ended = run([DDK, "prepar"], tmp_path)
    assert ended.code == 2 and ended.output == "error: ddk has no command 'prepar': did you mean 'prepare'?\n"
    assert run([DDK, "--version"], tmp_path).output.startswith("ddk 0.")


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("ddk pre", {"prepare", "preflight"}),
        ("ddk export --dty", {"--dtype"}),
        ("ddk export --dtype ", {"bf16", "fp32"}),
        ("ddk distill --hostf", {"--hostfile"}),
        ("ddk plan --config my", {"my.yaml"}),
    ],
)
def test_bash_completes(tmp_path: Path, typed: str, completions: set[str]) -> None:
    """The shell function that argcomplete's script defines is called as bash calls it at a Tab."""
    (tmp_path / "my.yaml").touch()
    script = """
        set -f; eval "$(register-python-argcomplete ddk)"
        COMP_LINE="$1"; COMP_POINT=${#1}; COMP_TYPE=9; COMP_WORDS=($1)
        _python_argcomplete ddk; printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script, "bash", typed],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert {line.strip() for line in done.stdout.splitlines()} == completions, done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mixture.alhpa=0.3"], "mixture.alhpa=0.3: unknown key, did you mean mixture.alpha"),
        (["mixture.alpha=3"], "mixture.alpha=3: input should be less than or equal to 1"),
        (["student.path=./nothing"], "student.path: there is no"),
        (["method=doremi"], "ddk stages --config"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_starts(
    tmp_path: Path, given: list[str], message: str
) -> None:
    """On the launcher's side of `ddk distill`, and in a rank before it imports torch."""
    (tmp_path / "my.yaml").write_text(
        "name: mine\nstudent: {path: .}\nteacher: {path: .}\ndata: {path: ., sequence_length: 64}\n"
        "optimizer: {warmup_steps: 1}\nstop: {steps: 4}\n"
    )
    rank = [sys.executable, str(ROOT / "launch/distill.py"), "--local_rank=0"]
    for command in ([DDK, "distill", "--ranks", "2"], rank):
        ended = run([*command, "--config", "my.yaml", *given], tmp_path, RANK="0")
        assert ended.code == 2 and message in " ".join(ended.output.split()), ended.output
        assert ended.output.startswith("error: ") and ended.cpu_s < MAX_CPU_S


def test_ddk_distill_knows_the_launchers_options(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {*distill_command._VALUES, *distill_command._FLAGS, "--num_gpus", "--num_accelerators"}
    # What these do, `ddk distill` does itself.
    own = {"--module", "--no_python", "--no_local_rank", "--autotuning", "--quiet", "--help"}
    parsers = []
    monkeypatch.setattr(runner.argparse.ArgumentParser, "parse_args", lambda parser, args: parsers.append(parser))
    runner.parse_args([])
    options = {name for action in parsers[0]._actions for name in action.option_strings if name.startswith("--")}
    assert known == options - own
