"""A wheel, installed in an environment of its own, prepares text, plans and distils from another directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ddk_ds.launcher import free_port
from tools.bench.small_run import RECIPE, ROOT, write_config

pytestmark = pytest.mark.long("a wheel, an environment and a start; the commands have unit tests")

BUILT = ("ddk_ds", "configs", "pyproject.toml", "README.md", "LICENSE")
PACKAGED = (
    "ddk_ds/commands/distill_rank.py",
    "ddk_ds/evaluation/tasks/",
    "ddk_ds/kernels/rows.cpp",
    "ddk_ds/comparison/suites/mixtures.yaml",
    "ddk_ds/planner/models/Qwen1.5-1.8B.json",
    "ddk_ds/slurm/job.sbatch",
)


def build(folder: Path) -> Path:
    """Build the wheel from a copy of the files that it is made of, so that nothing is left in the checkout."""
    source = folder / "source"
    source.mkdir()
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel in a new environment, in which every other package is that of this one; return its bin/."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    # A path file adds a directory without reading the path files in it: the clone that is installed there stays hidden.
    packages = next(folder.glob("lib/python3*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *options], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build(folder)
    names = zipfile.ZipFile(wheel).namelist()
    assert all(any(name.startswith(wanted) for name in names) for wanted in PACKAGED), names
    assert not [name for name in names if name.startswith(("tools", "launch", "tests"))]
    return install(wheel, folder / "environment")


def test_the_wheel_prepares_plans_and_distils(programs: Path, workspace: Path, tmp_path: Path) -> None:
    """Nothing comes from the clone: the working directory is another, PYTHONPATH is unset."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": extensions}

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(programs / program), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    where = run("python", "-c", "import ddk_ds, torch; print(ddk_ds.__file__)")
    assert where.startswith(str(programs.parent)), where
    (tmp_path / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(RECIPE)))
    options = ["--sequence-length", "64", "--validation-samples", "12", "--workers", "1"]
    tokenizer = str(workspace / "tokenizer")
    run("ddk", "prepare", "--recipe", "recipe.yaml", "--tokenizer", tokenizer, "--out", "shards", *options)
    short = {"stop": {"steps": 2}, "mixture": {"interval_steps": 2}, "optimizer": {"warmup_steps": 1}}
    config = write_config(workspace, tmp_path, data={"path": str(tmp_path / "shards")}, **short)
    cluster = ["--nodes", "1", "--gpus-per-node", "4", "--gpu", "h100"]
    assert "memory" in run("ddk", "plan", "--config", str(config), *cluster)
    known = ["student.path=Qwen/Qwen1.5-1.8B", "teacher.path=Qwen/Qwen1.5-14B"]  # by the packaged shapes
    assert "memory" in run("ddk", "plan", "--config", str(config), *cluster, *known)
    output = run("ddk", "distill", "--ranks", "2", "--master_port", str(free_port()), "--config", str(config))
    assert "finished: 2 steps done" in output
    assert "Setting accelerator" not in output and "INFO" not in output and "CUDA" not in output, output
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["steps"] == 2
    assert (tmp_path / "runs/run/export/model.safetensors").is_file()
