"""launch/slurm/submit.py submits the right job, and the batch script behaves as documented.

`srun`, `scontrol` and `sbatch` are replaced by small scripts, which record what the batch script asks of Slurm.
tests/slurm runs the same on a real Slurm.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddk_ds.command_line import RANK_SCRIPT
from ddk_ds.commands.submit_command import main, time_limit_s
from ddk_ds.errors import UserError
from ddk_ds.slurm.batch_script import ROOT
from tests.unit.test_bad_input import swap_two_tokens
from tools.bench.small_run import write_config

STAND_INS = {
    # Numbers the jobs from 7.
    "sbatch": """printf '%s\\n' "$*" >> "$STAND_IN/submitted"; echo $((6 + $(wc -l < "$STAND_IN/submitted")))""",
    # Runs one task, passes USR1 to it, and records its options.
    "srun": """
        printf '%s\\0' "$@" > "$STAND_IN/srun"
        while [[ $1 == --* ]]; do shift; done
        SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@" &
        task=$!
        trap 'kill -s USR1 $task' USR1
        while wait $task; kill -0 $task 2>/dev/null; do :; done
        wait $task""",
    # Ends all processes of the job when it requeues itself.
    "scontrol": """
        case $1 in
            show) echo node7; echo node8 ;;
            --oneliner) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=$4" ;;
            requeue) echo "$2" >> "$STAND_IN/requeued"; kill -s TERM 0 ;;
            update) echo "$2 $3" >> "$STAND_IN/updated" ;;
        esac""",
    # Replaces the ranks' python; each test writes its behaviour.
    "python": """
        printf '%s\\0' "$@" > "$STAND_IN/arguments"
        env -0 > "$STAND_IN/environment"
        source "$STAND_IN/behaviour" """,
    # Python in a container, and the command that starts containers.
    "python3": "exit 0",
    "apptainer": "exit 0",
}
# A rank that saves when it gets the signal, and one that does not listen yet.
SAVES = "trap 'exit 75' USR1; touch $STAND_IN/at_work; while :; do sleep 0.02; done"
DIES = "touch $STAND_IN/at_work; while :; do sleep 0.02; done"


class Desk:
    """A directory to submit from, with scripts that replace Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes = folder / "stand-in"
        self.run_dir = folder / "runs/run"
        self.snapshot = self.run_dir / "slurm/1"
        commands = folder / "stand-ins for slurm"
        commands.mkdir(parents=True)
        self.notes.mkdir()
        self.python = str(commands / "python")
        for name, text in STAND_INS.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)
        self.environment = {"PATH": f"{commands}:{os.environ['PATH']}", "STAND_IN": str(self.notes)}

    def submit(self, *options: str) -> int:
        """Submit two nodes with two ranks each, and return the exit code."""
        config = write_config(self.folder, self.folder, output_dir="runs")
        size = ["--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "2", "--time", "30"]
        return main(["--config", str(config), *size, "--no-check", "--python", self.python, *options])

    def job(self, behaviour: str, *, send: signal.Signals | None = None, **variables: str) -> tuple[int, str]:
        """Run the batch script as Slurm does, with a signal once the rank runs. Returns exit code and output."""
        (self.notes / "behaviour").write_text(behaviour)
        (self.notes / "at_work").unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[7-8]"}
        process = subprocess.Popen(
            ["bash", str(self.snapshot / "job.sbatch")],
            cwd=self.folder,
            env=self.environment | job | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            if send is not None:
                end = time.monotonic() + 20
                while not (self.notes / "at_work").exists():
                    assert time.monotonic() < end and process.poll() is None, "the rank never began"
                    time.sleep(0.01)
                process.send_signal(send)
            output, _ = process.communicate(timeout=20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def noted(self, name: str) -> list[str]:
        """Return what a replaced command recorded: lines, or words that end in a zero byte."""
        path = self.notes / name
        text = path.read_text() if path.exists() else ""
        return text.split("\0")[:-1] if "\0" in text else text.splitlines()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    result = Desk(tmp_path / "desk")
    monkeypatch.chdir(result.folder)
    for name, value in result.environment.items():
        monkeypatch.setenv(name, value)
    yield result


def directives(script: str) -> dict[str, str | None]:
    """Return the options of sbatch in a script, with their values unquoted as sbatch does."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line)[1:] for line in lines]
    assert all(len(line) == 1 for line in words), lines
    pairs = [line[0].removeprefix("--").partition("=") for line in words]
    return {key: value if equals else None for key, equals, value in pairs}


def shown(desk: Desk, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the script that --dry-run shows, after checking that bash accepts it and nothing is written."""
    assert desk.submit("--dry-run", *options) == 0
    script = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert not desk.run_dir.exists() and desk.noted("submitted") == []
    return script


def test_directives(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert directives(shown(desk, capsys)) == {
        "job-name": "run",
        "nodes": "2",
        "ntasks-per-node": "2",
        "chdir": str(desk.folder),
        "output": f"{desk.snapshot}/%j.log",
        "open-mode": "append",
        "requeue": None,
        "time": "30",
        "signal": "B:USR1@300",
    }


def test_directives_on_demand(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--partition", "gpu", "--account", "lab", "--qos", "high", "--cpus-per-task", "8", "--array", "0-3%2"]
    more = ["--signal-seconds", "60", "--sbatch-option", "mem=0", "--sbatch-option", "exclusive"]
    found = directives(shown(desk, capsys, *options, *more))
    expected = {"partition": "gpu", "account": "lab", "qos": "high", "cpus-per-task": "8", "array": "0-3%2"}
    expected |= {"signal": "B:USR1@60", "mem": "0", "output": f"{desk.snapshot}/%A_%a.log"}
    assert {key: found[key] for key in expected} == expected
    assert found["exclusive"] is None and "gpus-per-node" not in found


def test_gpus_have_a_rank_each(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(desk.folder, desk.folder, train={"micro_batch_samples": 1})
    size = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1-0"]
    assert main(["--config", str(config), *size, "--no-check", "--dry-run"]) == 0
    found = directives(capsys.readouterr().out)
    assert (found["gpus-per-node"], found["ntasks-per-node"], found["time"]) == ("4", "4", "1-0")
    # Slurm's defaults are one core a task, and often a few GB for each core.
    assert (found["cpus-per-task"], found["mem"]) == ("6", "0")
    other = ["--cpus-per-task", "12", "--sbatch-option", "mem-per-gpu=90G"]
    assert main(["--config", str(config), *size, *other, "--no-check", "--dry-run"]) == 0
    found = directives(capsys.readouterr().out)
    assert (found["cpus-per-task"], found["mem-per-gpu"]) == ("12", "90G") and "mem" not in found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("1:02:03", 3723),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("7-23:59:59", 691199),
    ],
)
def test_time_in_all_of_sbatchs_notations(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-", "1-1-1", "1.5", "UNLIMITED", "10\n"])
def test_no_time(text: str) -> None:
    with pytest.raises(UserError, match=r"--time .*: write it as minutes"):
        time_limit_s(text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--time", "1h"], "--time '1h': write it as"),
        (["--time", "5"], "--signal-seconds 300 is not less than --time 5"),
        (["--signal-seconds", "0"], "--signal-seconds is 0: must be at least 1"),
        (["--array", "a-b"], "--array 'a-b': write it as"),
        (["--array", "0-3%"], "--array '0-3%'"),
        (["--seed-from-task"], "--seed-from-task goes with --array"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--chain", "0"], "--chain is 0"),
        (["--cpus-per-task", "0"], "--cpus-per-task is 0"),
        (["--nodes", "3"], "train.global_batch_samples"),
        (["--gpus-per-node", "-1"], "--gpus-per-node is -1"),
        (["--gpus-per-node", "4"], "--ranks-per-node goes with --gpus-per-node 0"),
        (["--ranks-per-node", "0"], "--ranks-per-node is 0"),
        (["--sbatch-option", "time=5"], "--sbatch-option 'time=5': time is set by this command's own options"),
        (["--sbatch-option", "no-requeue"], "no-requeue is set by this command's own options"),
        (["--sbatch-option", "--mem=5"], "write it as one of sbatch's long options"),
        (["--sbatch-option", "mem="], "write it as one of sbatch's long options"),
        (["--sbatch-option", "comment=a\nscancel 1"], "write it as one of sbatch's long options"),
        (["--partition", "gpu\nscancel 1"], "'gpu\\nscancel 1' cannot stand in a batch script: it holds a line break"),
        (["--python", "/usr/bin/python\r"], "cannot stand in a batch script"),
        (["--container", "image.sif", "--container-mount", "/a:/b"], "/a:/b: a path with a comma or a colon"),
        (["train.micro_batch_samples=two"], "train.micro_batch_samples"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_refusals(desk: Desk, capsys: pytest.CaptureFixture[str], options: list[str], expected: str) -> None:
    joined = [f"{options[0]}={options[1]}"] if len(options) == 2 else options  # a value may begin with a dash
    assert desk.submit(*joined) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, error
    assert not desk.run_dir.exists() and desk.noted("submitted") == []


def cut_a_shard(workspace: Path) -> str:
    shard = next((workspace / "shards/cpp/train").glob("shard*.mds"))
    shard.write_bytes(shard.read_bytes()[:-10])
    return "data.path={}/shards"


def cut_the_weights(workspace: Path) -> str:
    weights = workspace / "student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return "student.path={}/student"


def change_the_tokenizer(workspace: Path) -> str:
    swap_two_tokens(workspace / "teacher/tokenizer.json")
    return "teacher.path={}/teacher"


@pytest.mark.usefixtures("offline_hub")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.path=nonexistent", "student.path: nonexistent is neither a directory"),
        ("student.path=./nonexistent", "student.path: there is no "),
        ("teacher.path=/nonexistent/x", "teacher.path: there is no /nonexistent/x"),
        ("data.path=nonexistent", "data.path: there is no "),
        (cut_a_shard, "bytes, its index says"),
        (cut_the_weights, "which is not what its header says"),
        (change_the_tokenizer, "their vocabularies differ"),
        ("data.validation_samples=4000", "data.validation_samples asks for 4000"),
        ("train.global_batch_samples=12", "change one of the three: train.global_batch_samples=8 or 16"),
        ("output_dir=/proc/x", "/proc/x"),
    ],
)
def test_a_run_that_cannot_start_is_not_submitted(
    desk: Desk,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str | Callable[[Path], str],
    expected: str,
) -> None:
    if not isinstance(override, str):
        copy = Path(shutil.copytree(workspace, tmp_path / "copy"))
        override = override(copy).format(copy)
    config = write_config(workspace, tmp_path)
    size = ["--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "2", "--time", "30"]
    assert main(["--config", str(config), *size, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["--config", str(config), *size, "--dry-run", override]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.count("\n") == 1 and captured.out == "", captured.err
    assert "--no-check" in captured.err or "global_batch" in override
    assert desk.noted("submitted") == []


def test_without_slurm_nothing_is_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert desk.submit() == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err and not desk.run_dir.exists()


def test_a_chain_is_submitted_job_after_job(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.submit("--chain", "3") == 0
    after = ["", "--dependency=afterany:7 ", "--dependency=afterany:8 "]
    assert desk.noted("submitted") == [f"--parsable {word}{desk.snapshot}/job.sbatch" for word in after]
    assert capsys.readouterr().out.splitlines()[-1] == f"submitted: 7 8 9; logs in {desk.snapshot}"
    assert desk.submit() == 0
    assert (desk.run_dir / "slurm/2/job.sbatch").is_file()


def test_secrets_do_not_reach_the_snapshot(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex(16)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PASSWORD"):
        monkeypatch.setenv(name, secret)
    assert desk.submit() == 0
    files = {path.name: path.read_bytes() for path in desk.snapshot.iterdir()}
    assert {"config.yaml", "code.json", "job.sbatch"} <= set(files)
    assert not any(secret.encode() in content for content in files.values())


def test_what_a_rank_is_started_with(desk: Desk) -> None:
    assert desk.submit("--cpus-per-task", "3", "--interface", "ib0") == 0
    assert desk.job("exit 0")[0] == 0
    config = str(desk.snapshot / "config.yaml")
    assert desk.noted("arguments") == [str(RANK_SCRIPT), "--config", config]
    found = dict(line.split("=", 1) for line in desk.noted("environment"))
    expected = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    expected |= {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "15007", "OMP_NUM_THREADS": "3"}
    expected |= {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert {key: found.get(key) for key in expected} == expected
    assert desk.noted("srun")[:4] == [
        *("--kill-on-bad-exit=0", "--wait=60", "--distribution=block", "--cpus-per-task=3"),
    ]


def test_odd_values_arrive_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path / """100% "it's" $HOME `id` @name@ #1 \\""")
    monkeypatch.chdir(desk.folder)
    for name, value in desk.environment.items():
        monkeypatch.setenv(name, value)
    odd = """two words 'single' "double" 50% $(id) #"""
    assert desk.submit("--sbatch-option", f"comment={odd}", "--partition", odd, "--interface", odd) == 0
    found = directives((desk.snapshot / "job.sbatch").read_text())
    assert (found["comment"], found["partition"], found["chdir"]) == (odd, odd, str(desk.folder))
    assert found["output"] == str(desk.snapshot).replace("%", "%%") + "/%j.log"  # sbatch makes %% a %
    assert desk.job("exit 0") == (0, "job 7: ended with exit code 0\n")
    assert desk.noted("arguments")[-1] == str(desk.snapshot / "config.yaml")
    assert f"GLOO_SOCKET_IFNAME={odd}" in desk.noted("environment")
    assert (desk.snapshot / "ended").read_text() == "0\n"


def test_containers(desk: Desk) -> None:
    paths = [str(ROOT), str(desk.folder), str(desk.folder / "runs"), "/data/my text"]
    options = ["--container", "my image.sif", "--container-mount", "/data/my text", "--python", "python3"]
    assert desk.submit(*options) == 0
    desk.job("exit 0")
    pyxis = [f"--container-mounts={','.join(f'{path}:{path}' for path in paths)}"]
    pyxis = ["--container-image=my image.sif", *pyxis, f"--container-workdir={desk.folder}"]
    assert desk.noted("srun")[3:6] == pyxis
    rank = ["python3", str(RANK_SCRIPT), "--config"]
    assert desk.noted("srun")[-4:-1] == rank
    assert desk.submit(*options, "--container-runtime", "apptainer") == 0
    desk.snapshot = desk.run_dir / "slurm/2"
    desk.job("exit 0")
    binds = [word for path in paths for word in ("--bind", f"{path}:{path}")]
    command = ["apptainer", "exec", *binds, "--pwd", str(desk.folder), "my image.sif", *rank]
    words = desk.noted("srun")
    assert words[:4] == ["--kill-on-bad-exit=0", "--wait=60", "--distribution=block", "bash"]
    assert words[-len(command) - 1 : -1] == command


def test_gpus_in_apptainer(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(desk.folder, desk.folder)
    size = ["--nodes", "1", "--gpus-per-node", "4", "--time", "30", "--no-check", "--dry-run"]
    container = ["--container", "x.sif", "--container-runtime", "apptainer"]
    assert main(["--config", str(config), *size, *container]) == 0
    assert "apptainer exec --nv --bind" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "code", "ends"),
    [("exit 0", 0, True), ("exit 2", 2, True), ("exit 3", 3, True), ("exit 1", 1, False), ("kill -9 $$", 137, False)],
)
@pytest.mark.parametrize("chain", ["1", "2"])
def test_ends(desk: Desk, behaviour: str, code: int, ends: bool, chain: str) -> None:
    assert desk.submit("--chain", chain) == 0
    found, output = desk.job(behaviour)
    assert found == code and output.endswith(f"job 7: ended with exit code {code}\n"), output
    ended = desk.snapshot / "ended"
    assert (ended.read_text() if ended.exists() else None) == (f"{code}\n" if ends else None)
    assert desk.noted("requeued") == []


@pytest.mark.parametrize(("chain", "requeued"), [("1", ["7"]), ("2", [])])
@pytest.mark.parametrize("behaviour", [SAVES, DIES])
def test_the_time_limit(desk: Desk, behaviour: str, chain: str, requeued: list[str]) -> None:
    assert desk.submit("--chain", chain) == 0
    code, output = desk.job(behaviour, send=signal.SIGUSR1)
    # A rank that the signal kills has exit code 128 + 10.
    assert code == (75 if requeued or behaviour == SAVES else 138), output
    assert "got USR1, ranks are asked to save" in output
    assert desk.noted("requeued") == requeued and not (desk.snapshot / "ended").exists()


def test_a_run_that_saved_of_itself_is_requeued(desk: Desk) -> None:
    assert desk.submit() == 0
    assert desk.job("exit 75")[0] == 75
    assert desk.noted("requeued") == ["7"]


@pytest.mark.parametrize(("behaviour", "code"), [(SAVES, 75), (DIES, 138)])
def test_a_cancelled_job_saves_and_is_not_requeued(desk: Desk, behaviour: str, code: int) -> None:
    assert desk.submit() == 0
    found, output = desk.job(behaviour, send=signal.SIGTERM)
    assert found == code and "got TERM" in output, output
    assert desk.noted("requeued") == [] and not (desk.snapshot / "ended").exists()


def test_tasks_of_an_array(desk: Desk) -> None:
    assert desk.submit("--array", "0-3", "--seed-from-task") == 0
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "40"}
    assert desk.job("exit 75", **task)[0] == 75
    assert desk.noted("arguments")[-2:] == ["name=run-3", "seed=3"]
    assert desk.noted("requeued") == ["40_3"]
    assert desk.job("exit 3", **task)[0] == 3
    assert (desk.snapshot / "ended-3").read_text() == "3\n"
    assert desk.job("exit 0", **task | {"SLURM_ARRAY_TASK_ID": "2"})[0] == 0  # another run


def test_without_seed_from_task_tasks_share_the_seed(desk: Desk) -> None:
    assert desk.submit("--array", "1,5") == 0
    assert desk.job("exit 0", SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_JOB_ID="40")[0] == 0
    assert desk.noted("arguments")[-1] == "name=run-5"


@pytest.mark.parametrize("code", [0, 2, 3])
def test_later_jobs_of_a_chain_leave_at_once(desk: Desk, code: int) -> None:
    assert desk.submit("--chain", "2") == 0
    assert desk.job(f"exit {code}")[0] == code
    (desk.notes / "srun").unlink()
    found, output = desk.job("exit 1", SLURM_JOB_ID="8")
    assert found == code and f"job 8: this submission has ended with exit code {code}: submit anew" in output
    assert not (desk.notes / "srun").exists()


def checkpoint(step: int, *, run: str = "run", complete: bool = True) -> str:
    """Return the shell code of a rank that writes a checkpoint and ends like a rank that has saved."""
    folder = f"runs/{run}/checkpoints/step-{step:08d}"
    return f"mkdir -p {folder}; {f'touch {folder}/manifest.json; ' if complete else ''}exit 75"


def test_requeuing_ends_where_nothing_is_gained(desk: Desk) -> None:
    assert desk.submit() == 0
    assert desk.job(checkpoint(9))[0] == 75
    assert desk.job(checkpoint(10), SLURM_RESTART_COUNT="1")[0] == 75
    assert desk.job("exit 75", SLURM_RESTART_COUNT="2")[0] == 75  # once may be a slow file system
    assert desk.job(checkpoint(11), SLURM_RESTART_COUNT="3")[0] == 75
    assert desk.job("exit 75", SLURM_RESTART_COUNT="4")[0] == 75
    assert len(desk.noted("requeued")) == 5
    code, output = desk.job(checkpoint(12, complete=False), SLURM_RESTART_COUNT="5")
    assert code == 4, output
    assert "two starts, and no checkpoint after step-00000011: not requeued; give it more --time" in output
    assert len(desk.noted("requeued")) == 5 and not (desk.snapshot / "ended").exists()
    # After a new submission with another limit, restarts are counted from zero.
    assert desk.job("exit 75", SLURM_JOB_ID="9")[0] == 75
    assert desk.noted("requeued")[-1] == "9"


@pytest.mark.parametrize("chain", ["1", "2"])
def test_what_time_may_mend_is_requeued_with_growing_pauses(desk: Desk, chain: str) -> None:
    assert desk.submit("--chain", chain) == 0
    for restart in range(8):
        code, output = desk.job("exit 69", SLURM_RESTART_COUNT=str(restart))
        assert code == 69 and "time may mend it: requeued in" in output, output
    assert desk.noted("updated") == [f"JobId=7 StartTime=now+{60 << restart}" for restart in range(8)]
    code, output = desk.job("exit 69", SLURM_RESTART_COUNT="8")
    assert code == 69 and "9 ends with code 69 at none: not requeued" in output, output
    assert desk.noted("requeued") == ["7"] * 8 and not (desk.snapshot / "ended").exists()


def test_a_new_checkpoint_begins_the_pauses_anew(desk: Desk) -> None:
    assert desk.submit() == 0
    assert desk.job("exit 69", DDK_REQUEUE_PAUSE_S="5")[0] == 69
    behaviour = checkpoint(9).replace("exit 75", "exit 69")
    assert desk.job(behaviour, SLURM_RESTART_COUNT="1", DDK_REQUEUE_PAUSE_S="5")[0] == 69
    assert desk.noted("updated") == ["JobId=7 StartTime=now+5"] * 2
    # A start that ended with 69 does not count as one that was too short.
    assert desk.job("exit 75", SLURM_RESTART_COUNT="2")[0] == 75
    assert len(desk.noted("requeued")) == 3


def test_a_cancelled_job_does_not_wait(desk: Desk) -> None:
    assert desk.submit() == 0
    code, output = desk.job(SAVES.replace("exit 75", "exit 69"), send=signal.SIGTERM)
    assert code == 69 and desk.noted("requeued") == [], output


def test_a_limit_too_short_for_a_first_step(desk: Desk) -> None:
    assert desk.submit() == 0
    assert desk.job(DIES, send=signal.SIGUSR1)[0] == 75
    code, output = desk.job(DIES, send=signal.SIGUSR1, SLURM_RESTART_COUNT="1")
    assert code == 4 and "no checkpoint after none" in output, output


def test_tasks_of_an_array_are_counted_apart(desk: Desk) -> None:
    assert desk.submit("--array", "0-1") == 0
    tasks = [{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "40"} for task in range(2)]
    codes = [desk.job(checkpoint(step, run="run-0"), SLURM_RESTART_COUNT=str(step), **tasks[0])[0] for step in range(3)]
    assert codes == [75, 75, 75]
    assert [desk.job("exit 75", SLURM_RESTART_COUNT=str(step), **tasks[1])[0] for step in range(2)] == [75, 4]


def test_a_chain_does_not_count(desk: Desk) -> None:
    assert desk.submit("--chain", "4") == 0
    assert [desk.job("exit 75", SLURM_JOB_ID=str(job))[0] for job in (7, 8, 9, 10)] == [75] * 4
    assert desk.noted("requeued") == []
