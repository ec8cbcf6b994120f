"""Arguments and variables reach ranks on other hosts as they are: through DeepSpeed's own runner and a real shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ddk_ds import remote_hosts
from ddk_ds.errors import UserError
from ddk_ds.launcher import launcher_command
from ddk_ds.remote_hosts import decoded, variables_of_hosts

HOSTS = ["--hostfile=hosts"]
ODD = ["--config", "a b.yaml", "name=x;touch pwned", "output_dir=$HOME/`id`", "a=%n%%h", "b='\"\\ \"'", "c=[x,y]*~"]
VALUES = {
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/tmp/a b;touch pwned",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "FI_PROVIDER": "efa $HOME `id` \\ \"x\" 'y' %h %%n",
    "HF_HOME": "/models/%n",
}
SECRETS = {"HF_TOKEN": "hf_abc", "AWS_SECRET_ACCESS_KEY": "abc", "https_proxy": "http://me:pass@proxy:1"}
REST = {"EDITOR": "vi", "CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "1", "AWS_PROFILE": "two\nlines"}
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def on_a_host(arguments: list[str], lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """Arguments and environment of a rank that DeepSpeed starts by pdsh; `lines` are those of its file of variables."""
    from deepspeed.launcher import multinode_runner

    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{SHOW}\n")
    script.chmod(0o755)
    given = {name: None for name in ("ssh_port", "venv_script", "enable_each_rank_log")}
    given |= {name: False for name in ("no_python", "module", "no_local_rank", "save_pid")}
    given |= {"user_script": "rank.py", "user_args": arguments, "launcher_args": "", "master_addr": "x"}
    runner = multinode_runner.PDSHRunner(Namespace(master_port=1, **given), "world")
    for line in lines:
        runner.add_export(*line.split("=", maxsplit=1))
    monkeypatch.setattr(multinode_runner.sys, "executable", str(script))
    command, _, _ = runner.get_cmd({}, {"host": [0]})
    line = " ".join(command[command.index("-w") + 2 :])
    line = line.replace("%%", "\0").replace("%n", "0").replace("%h", "host").replace("\0", "%")  # pdsh
    done = subprocess.run(["sh", "-c", line], cwd=folder, env={"HOME": "/root"}, capture_output=True, text=True)
    assert done.returncode == 0, (line, done.stderr)
    words, environ = json.loads(done.stdout)
    return words[words.index("rank.py") + 1 :], environ


def lines_of(environ: dict[str, str], command: list[str] = HOSTS) -> list[str]:
    with variables_of_hosts(environ, command) as variables:
        return Path(variables["DS_ENV_FILE"]).read_text().splitlines()


def test_arguments_and_variables_reach_a_host_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = launcher_command(HOSTS, ODD)
    arguments = command[command.index(str(remote_hosts.RANK_SCRIPT)) + 1 :]
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = lines_of(VALUES | SECRETS | REST)
    words, environ = on_a_host(arguments, lines, tmp_path, monkeypatch)
    assert decoded(["--local_rank=0", *words]) == ["--local_rank=0", *ODD]
    assert {name: environ.get(name) for name in VALUES} == VALUES
    assert not (SECRETS | REST).keys() & environ.keys()
    assert not (tmp_path / "pwned").exists()


def test_plain_arguments_stay_readable() -> None:
    words = ["--config", "configs/demo.yaml", "optimizer.learning_rate=1e-4", "--no-preflight"]
    assert launcher_command([], words)[-len(words) :] == words


def test_the_users_file_stays_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    mine = tmp_path / "home/.deepspeed_env"
    mine.write_text("HF_HOME=/mine\n\nGLOO_SOCKET_IFNAME=eth0")
    environ = {"HF_HOME": "/other", "HF_TOKEN": "abc", "PDSH_SSH_ARGS_APPEND": "-i key"}
    with variables_of_hosts(environ, HOSTS) as variables:
        file = Path(variables["DS_ENV_FILE"])
        assert file.read_text().splitlines() == ["HF_HOME=/other", "HF_HOME=/mine", "GLOO_SOCKET_IFNAME=eth0"]
        assert file.stat().st_mode & 0o777 == 0o600
        assert variables["PDSH_SSH_ARGS_APPEND"].startswith("-i key -o ServerAliveInterval=")
    assert not file.exists() and mine.read_text().endswith("eth0")
    said = capsys.readouterr().err
    assert "not carried to the hosts: HF_TOKEN" in said and "abc" not in said
    other = tmp_path / "variables"
    other.write_text("NAME\n")
    with pytest.raises(UserError, match="variables: 'NAME': write NAME=value"):
        lines_of({"DS_ENV_FILE": str(other)})


def test_other_launchers_start_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert lines_of({"FI_PROVIDER": "a $b"}, [*HOSTS, "--launcher=openmpi"]) == ["FI_PROVIDER=a $b"]
    with variables_of_hosts({"FI_PROVIDER": "efa"}, ["--num_gpus=2"]) as variables:
        assert not variables


def test_a_path_that_a_shell_takes_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    with pytest.raises(UserError, match=r"this directory, .*/my runs, goes to a shell on each host"):
        lines_of(dict(os.environ))
