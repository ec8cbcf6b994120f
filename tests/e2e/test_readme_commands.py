"""Every command of README.md and docs/guide.md runs on small models and data, as the tables below say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from omegaconf import OmegaConf

from tests.unit.evaluation.benchmarks import ROWS, write_rows
from tools.bench.docs_check import PROGRAMS, commands
from tools.bench.small_run import ROOT

DDK = str(Path(sys.executable).with_name("ddk"))
PAGES = ("README.md", "docs/guide.md")

# What differs from the page when a command is run: (text of the page, text that takes its place).
_SAMPLES = ("--sequence-length 2048", "--sequence-length 64 --validation-samples 12 --workers 1")
_RANKS = ("ddk distill ", "ddk distill --ranks 2 ")
_ONE_NODE = "--nodes 1"  # the small run's batch is for 8 ranks
_NO_SLURM = ("ddk submit ", "ddk submit --dry-run ")
Changes = tuple[tuple[str, str], ...]

RUN: dict[str, Changes] = {
    # README.md
    "ddk prepare --recipe my_domains.yaml --tokenizer models/student --out data/mine --sequence-length 2048": (
        _SAMPLES,
    ),
    "ddk preflight --config my.yaml --gpus-per-node 8": (),
    "ddk distill --config my.yaml": (_RANKS,),
    "ddk status runs/mine": (),
    "ddk report runs/mine": (),
    'ddk generate runs/mine --prompt "def main("': (),
    "ddk distill --ranks 2 --config my.yaml": (),
    "ddk plan --config my.yaml --nodes 4 --gpus-per-node 8 --gpu a100-80g": (),
    "ddk preflight --config my.yaml --nodes 4 --gpus-per-node 8": (("--nodes 4", _ONE_NODE),),
    "ddk submit --config my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --chain 4": (_NO_SLURM,),
    # docs/guide.md
    "ddk prepare --recipe my_domains.yaml --tokenizer models/Qwen1.5-1.8B --out data/mine --sequence-length 2048": (
        _SAMPLES,
    ),
    "ddk cut-student --teacher models/Qwen1.5-14B --out models/half --layers 20 --shards data/mine": (
        ("--layers 20", "--layers 3 --sequence-length 64"),
    ),
    "ddk plan --config my.yaml --nodes 2 --gpus-per-node 8 --gpu a100-80g": (),
    "ddk preflight --config my.yaml --nodes 2 --gpus-per-node 8": (("--nodes 2", _ONE_NODE),),
    "ddk submit --config my.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --chain 4": (_NO_SLURM,),
    "ddk distill --config my.yaml train.micro_batch_samples=2": (_RANKS,),
    "ddk status runs/qwen-ddk": (),
    "ddk report runs/qwen-ddk": (),
    "ddk replay runs/qwen-ddk alpha=0.3 --picture replay.png": (),
    "ddk export runs/qwen-ddk --step 20000": (("20000", "4"),),
    'ddk generate runs/qwen-ddk --prompt "def fibonacci(n):" --prompt "The capital of France is"': (),
    "ddk evaluate runs/qwen-ddk/export models/Qwen1.5-1.8B models/Qwen1.5-14B --suite paper "
    "--data data/benchmarks --shards data/mine --allow-code-execution --out scores.json": (
        ("--suite paper", "--suite paper --tasks arc_easy"),
    ),
    "ddk compare --config my.yaml --methods cpt,kd,ddk --seeds 3 --out runs/compared --ranks 16": (
        ("cpt,kd,ddk --seeds 3", "cpt,ddk --seeds 1"),
        ("--ranks 16", "--ranks 2"),
    ),
}

# What a test cannot run here, and what does instead.
ELSEWHERE = {
    "make setup": ".ci/run; tests/unit/test_check_setup.py",
    "make demo": "a clone; its output is docs/results/demo.md",
    "make test": ".ci/run; docs/results/test_full.md is what make test-full writes",
    "make test-full": ".ci/run runs its parts",
    "pip install -c constraints.txt -e .": "make test-transformers4 has the versions that it brings",
    "ddk tokenizer --convert models/X": "tests/unit/engine/test_tokenizer_conversion.py",
    "deepspeed launch/distill.py --config my.yaml": "tests/e2e/test_run.py",
    "make clean-demo": "by hand: it deletes what a user has in runs/",
    "ddk distill --hostfile hosts --config my.yaml": "tests/nodes/test_two_nodes.py",
    "uv pip install -c constraints.txt -e '.[eval]'": "make setup: the extra `test` has all of `eval`, see below",
    "python -m pytest tests/e2e/test_readme_commands.py -m long": "make test-full; it is this file",
    "git clone <this repository> ddk_ds": "every clone",
    "cd ddk_ds": "every clone",
    "source .venv/bin/activate": "every clone",
    "hf download Qwen/Qwen1.5-14B --local-dir models/Qwen1.5-14B": "by hand: 28 GB from the hub",
    "hf download Qwen/Qwen1.5-1.8B --local-dir models/Qwen1.5-1.8B": "by hand: 4 GB from the hub",
    "tensorboard --logdir runs": "it serves until it is stopped; the run's events are looked for below",
}

# The guide's configuration, with these values: a run of seconds that 2, 8, 16 and 32 ranks divide.
SMALL = {
    "data": {"sequence_length": 64, "validation_samples": 12},
    "mixture": {"interval_steps": 2, "ratio_cap": 5.0, "initial_floor": 0.02},
    "optimizer": {"learning_rate": 5e-3, "min_learning_rate": 5e-4, "warmup_steps": 2},
    "train": {"global_batch_samples": 64, "micro_batch_samples": 2, "precision": "fp32"},
    "stop": {"steps": 6},
    "checkpoint": {"every_steps": 2},
}

MADE = {
    "README.md": ("data/mine/domains.json", "runs/mine/export/model.safetensors"),
    "docs/guide.md": (
        *("data/mine/domains.json", "models/half/config.json", "runs/qwen-ddk/export/model.safetensors"),
        *("runs/qwen-ddk/report/report.html", "runs/qwen-ddk/monitor/tensorboard", "replay.png"),
        *("runs/qwen-ddk/exports/step-00000004-fp32/model.safetensors", "scores.json", "runs/compared/comparison.png"),
    ),
}


def shell_lines(text: str) -> Iterator[str]:
    """Yield each command of a page's indented blocks and of its `code` that begins with a known program.

    A program that is only named, such as `ddk prepare`, is no command.
    """
    shown = (command.text for command in commands(text))
    yield from (line for line in shown if line.split()[0] not in ("ddk", "deepspeed") or len(line.split()) > 2)
    blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    for line in re.findall(r"(?m)^(?: {4,}|\t)(\S.*)$", blocks):
        parts = (" ".join(part.split()) for part in line.split("&&"))
        yield from (part for part in parts if part.split()[0] not in PROGRAMS)


@pytest.mark.parametrize("page", PAGES)
def test_the_table_knows_every_command(page: str) -> None:
    unknown = [line for line in shell_lines((ROOT / page).read_text()) if line not in {*RUN, *ELSEWHERE}]
    assert not unknown, f"{page} has commands that no test runs; add them to RUN or ELSEWHERE: {unknown}"


def test_the_table_has_no_command_too_many() -> None:
    shown = {line for page in PAGES for line in shell_lines((ROOT / page).read_text())}
    assert not {*RUN, *ELSEWHERE} - shown
    for where in ELSEWHERE.values():
        for path in re.findall(r"\b(?:tests|docs)/\S+\.\w+|\.ci/\w+", where):
            assert (ROOT / path).is_file(), path


def test_the_extra_of_the_guide_is_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["eval"]) <= set(extras["test"])


@pytest.mark.long("every command of two pages, three minutes")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run(page: str, workspace: Path, tmp_path: Path) -> None:
    """A page's commands run in their order in one directory, each with exit code 0, and make what the page says."""
    make_world(workspace, tmp_path, page)
    for command in commands((ROOT / page).read_text()):
        if command.text in RUN:
            run(command.text, RUN[command.text], tmp_path)
    assert not [path for path in MADE[page] if not (tmp_path / path).exists()]


def make_world(workspace: Path, folder: Path, page: str) -> None:
    """Make what the page's commands expect: models, raw text, and the recipe and configuration that the guide shows."""
    for name in ("launch", "tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    readme = page == "README.md"
    (folder / "models").mkdir()
    for name, model in {"student": "student", "teacher": "teacher", "Qwen1.5-1.8B": "student"}.items():
        (folder / "models" / name).symlink_to(workspace / model)
    if not readme:  # a teacher with a layer to lose: make_student.py keeps the first two and the last
        shape = json.loads((workspace / "teacher.json").read_text()) | {"num_hidden_layers": 4}
        (folder / "teacher.json").write_text(json.dumps(shape))
        options = ("--tokenizer", "models/student", "--out", "models/Qwen1.5-14B")
        run(shlex.join(["ddk", "init", "--config", "teacher.json", *options]), (), folder)
    recipe, config = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guide.md").read_text(), flags=re.DOTALL)
    (folder / "my_domains.yaml").write_text(recipe)
    values = OmegaConf.merge(OmegaConf.create(config), SMALL)
    if readme:
        models = {"student": {"path": "models/student"}, "teacher": {"path": "models/teacher"}}
        values = OmegaConf.merge(values, {"name": "mine", **models})
    (folder / "my.yaml").write_text(OmegaConf.to_yaml(values))
    write_text(folder / "raw")
    (folder / "data/benchmarks").mkdir(parents=True)
    write_rows(folder / "data/benchmarks/arc_easy.jsonl", [ROWS["arc_easy"](number) for number in range(2)])


def write_text(folder: Path) -> None:
    """Write the two domains of the guide's recipe, in its formats: the project's code and pages."""
    for name in ("code", "math"):
        (folder / name).mkdir(parents=True)
    lines = "".join(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(ROOT.glob("ddk_ds/*/*.py")))
    (folder / "code/a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    paragraphs = [part for path in sorted(ROOT.glob("docs/*.md")) for part in path.read_text().split("\n\n")]
    pq.write_table(pa.table({"text": paragraphs}), folder / "math/a.parquet")


def run(text: str, changes: Changes, folder: Path) -> None:
    """Run a command of a page with its changes; raise AssertionError with its output if it fails."""
    for old, new in changes:
        assert old in text, f"{old} is not in {text}"
        text = text.replace(old, new, 1)
    program, *words = shlex.split(text)
    assert program == "ddk", text
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [DDK, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
