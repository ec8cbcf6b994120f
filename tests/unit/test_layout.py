"""The layout: imports point down, files and functions stay small, docstrings read at once, configurations load."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ddk_ds.comparison.comparison_jobs import read_grid
from ddk_ds.config import load_config

ROOT = Path(__file__).parents[2]
TREES = ("ddk_ds", "launch", "tools")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_README_LINES = 99
MAX_PAGES = 15
# A docstring that begins with one of these is a fragment: say what the function does, or what the object is.
FRAGMENTS = {"What", "Whether", "Of", "As", "By", "That", "How", "Where", "From"}

# From the top down. A room imports from the floors below it, never from its own floor.
FLOORS = (
    ("launch", "tools"),
    ("ddk_ds",),  # ddk_ds/__init__.py: what `import ddk_ds` offers to notebooks
    ("commands", "notebook"),
    ("train", "report", "planner", "evaluation", "comparison", "slurm"),
    ("methods",),
    ("engine",),
    ("data", "kernels", "mixture"),
    ("comm", "config", "run_files"),
    ("launcher",),
    ("remote_hosts",),
    ("command_line",),
    ("drawing", "exit_codes", "files", "lifeline", "redact", "run_schema", "remaining_time", "ties", "version"),
    ("errors",),
)
FLOOR = {room: floor for floor, rooms in enumerate(reversed(FLOORS)) for room in rooms}

# The one room that may import a library.
OWNERS = {"deepspeed": "engine", "transformers": "engine", "torch.distributed": "comm"}
# The workshop measures the project beside bare deepspeed and transformers.
WORKSHOP = Path("tools/bench")
# The one tool that is no front door: it runs before the package is installed.
BEFORE_INSTALLATION = (Path("tools/check_setup.py"), Path("tools/install.py"))
# All that a room may import beside the standard library and itself.
ALLOWED = {"mixture": ("numpy", "ddk_ds.errors"), "kernels": ("torch", "triton", "ddk_ds.errors")}


def within(name: str, parent: str) -> bool:
    """Return True if the dotted `name` is `parent` or lies in it."""
    return name == parent or name.startswith(f"{parent}.")


def room_of(name: str) -> str:
    """Return the room of a dotted name: ddk_ds.data.mds -> data, tools.plan -> tools, ddk_ds -> ddk_ds."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ddk_ds" and len(parts) > 1 else parts[0]


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the repository: ddk_ds/data/__init__.py -> ddk_ds.data."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, source: str) -> Iterator[str]:
    """Yield the dotted names that a file imports, inside functions and by `torch.distributed.x` too."""
    package = module_name(path.parent / "__init__.py").split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "distributed":
            yield f"{ast.unparse(node.value)}.distributed"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            yield from (value for value in constants if isinstance(value, str))


def import_faults(path: Path, source: str) -> list[str]:
    """Return the faults of a file's imports; `path` is relative to the repository."""
    room = room_of(module_name(path))
    if room not in FLOOR:
        return [f"{path}: {room} has no floor in {Path(__file__).name}: give it one"]
    names = sorted(set(imported_names(path, source)))
    own = {} if path.is_relative_to(WORKSHOP) else OWNERS
    return [f"{path} imports {name}: {why}" for name in names for why in _objections(room, name, own)]


def _objections(room: str, name: str, owners: dict[str, str]) -> Iterator[str]:
    for library, owner in owners.items():
        if within(name, library) and room != owner:
            yield f"only {owner} imports {library}"
    top, other = name.split(".")[0], room_of(name)
    if top in TREES:
        if other != room and FLOOR.get(other, len(FLOORS)) >= FLOOR.get(room, 0):
            yield f"{other} is not below {room}"
        if other == room:
            return
    if room in ALLOWED and top not in sys.stdlib_module_names:
        allowed = ALLOWED[room]
        if not any(within(name, library) for library in allowed):
            yield f"{room} imports the standard library, {', '.join(allowed)} and nothing else"


def long_parts(path: Path, source: str) -> list[str]:
    """Return the file, and each function in it, that is longer than allowed."""
    num_lines = len(source.splitlines())
    faults = [f"{path}: {num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None, "ast.parse sets it"
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                faults.append(f"{path}:{node.lineno}: {node.name} has {num_lines} lines")
    return faults


def project_files() -> dict[Path, str]:
    """Return the source of every Python file outside tests/, by its path in the repository."""
    paths = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))]
    assert paths, f"no Python file under {ROOT}"
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}


def test_imports_point_down() -> None:
    faults = [fault for path, source in project_files().items() for fault in import_faults(path, source)]
    assert not faults, "\n".join(faults)


def test_a_front_door_holds_nothing_and_is_never_imported() -> None:
    """launch/ and tools/ start commands of the package; only the workshop, tools/bench/, imports of the workshop."""
    for path, source in project_files().items():
        in_bench = path.is_relative_to(WORKSHOP)
        if path.parts[0] in ("launch", "tools") and not in_bench and path not in BEFORE_INSTALLATION:
            defined = [node for node in ast.parse(source).body if not isinstance(node, ast.Import | ast.ImportFrom)]
            assert len(defined) == 2, f"{path}: a docstring and sys.exit(main()) alone; the rest to ddk_ds/commands/"
            assert "from ddk_ds.commands." in source, f"{path} starts no command of ddk_ds/commands/"
        for name in imported_names(path, source):
            if name.split(".")[0] in ("tools", "launch"):
                assert in_bench and within(name, "tools.bench"), f"{path} imports {name}: move what it needs below both"


def test_no_file_changes_the_import_path() -> None:
    faults = [str(path) for path, source in project_files().items() if "sys.path" in source]
    assert not faults, f"{faults}: `make setup` installs the package; start the workshop by python -m tools.bench.X"


def test_file_names_are_unique() -> None:
    """A name in a traceback, a search or an editor's tab says which file it is."""
    by_name: dict[str, list[str]] = {}
    for path in project_files():
        if path.name != "__init__.py":
            by_name.setdefault(path.name, []).append(str(path))
    assert not {name: paths for name, paths in by_name.items() if len(paths) > 1}


def test_no_import_cycle() -> None:
    files = {module_name(path): (path, source) for path, source in project_files().items()}
    graph = {
        module: {known for name in imported_names(*file) if (known := _known_module(name, files)) != module}
        for module, file in files.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a cycle


def _known_module(name: str, modules: dict[str, tuple[Path, str]]) -> str:
    # `from ddk_ds.comm import Comm` is the name ddk_ds.comm.Comm: the module is its longest known part.
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def test_files_and_functions_are_small() -> None:
    faults = [fault for path, source in project_files().items() for fault in long_parts(path, source)]
    assert not faults, "\n".join(faults)


def fragment_docstrings(path: Path, source: str) -> list[str]:
    """Return the docstrings of functions and classes that begin with one of FRAGMENTS."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    texts = [(node, (ast.get_docstring(node) or "").split()) for node in nodes]
    return [
        f"{path}:{node.lineno}: {node.name}: {' '.join(words[:8])}"
        for node, words in texts
        if words[:1] and words[0] in FRAGMENTS
    ]


def test_docstrings_are_sentences() -> None:
    faults = [fault for path, source in project_files().items() for fault in fragment_docstrings(path, source)]
    assert not faults, "\n".join(faults)


def test_a_fragment_is_found() -> None:
    source = 'def f():\n    """Whether it is."""\n\ndef g():\n    """Return True if it is."""'
    assert fragment_docstrings(Path("x.py"), source) == ["x.py:1: f: Whether it is."]


def test_the_first_pages_stay_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
    assert len(list((ROOT / "docs").glob("*.md"))) <= MAX_PAGES


GRIDS = {
    "small_teacher_cache": "small",
    "mixtures_ablations": "mixtures_weak",
    "mixtures_far": "mixtures_smollm2",
}
"""Grids in configs/experiments, and the configurations that they vary."""


def test_shipped_run_configurations_load() -> None:
    configs = ROOT / "configs"
    others = {configs / name for name in ("ablations", "data", "packages", "suites")}  # which have tests of their own
    runs = [path for path in sorted(configs.rglob("*.yaml")) if path.parent not in others]
    assert runs, f"no run configuration under {configs}"
    for path in runs:
        if path.stem in GRIDS:
            for overrides in read_grid(path).values():
                load_config(path.with_name(f"{GRIDS[path.stem]}.yaml"), overrides)
        else:
            load_config(path)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("ddk_ds/engine/x.py", "from ddk_ds.train.step import run_step", "train is not below engine"),
        ("ddk_ds/data/x.py", "from ddk_ds.mixture import order", "mixture is not below data"),
        ("ddk_ds/data/x.py", "from ..kernels.chunked import y", "kernels is not below data"),
        ("ddk_ds/data/x.py", "from .. import engine", "engine is not below data"),
        ("ddk_ds/train/x.py", "from ddk_ds import report", "report is not below train"),
        ("ddk_ds/methods/x.py", "import launch.distill", "launch is not below methods"),
        ("tools/x.py", "from launch.distill import main", "launch is not below tools"),
        ("ddk_ds/errors.py", "import ddk_ds.config", "config is not below errors"),
        ("ddk_ds/comm.py", "from ddk_ds.config import Config", "config is not below comm"),
        ("ddk_ds/comm.py", "from ddk_ds import distil", "distil is not below comm"),
        ("ddk_ds/comm.py", "import ddk_ds", "ddk_ds is not below comm"),
        ("ddk_ds/engine/x.py", "from ddk_ds.attic import y", "attic is not below engine"),
        ("ddk_ds/attic/x.py", "", "attic has no floor"),
        ("ddk_ds/train/x.py", "import deepspeed", "only engine imports deepspeed"),
        ("launch/x.py", "from deepspeed.ops import adam", "only engine imports deepspeed"),
        (
            "ddk_ds/data/x.py",
            "def f():\n    from transformers import AutoTokenizer",
            "only engine imports transformers",
        ),
        ("ddk_ds/data/x.py", "importlib.import_module('transformers')", "only engine imports transformers"),
        ("ddk_ds/engine/x.py", "import torch.distributed as dist", "only comm imports torch.distributed"),
        ("ddk_ds/engine/x.py", "from torch import distributed", "only comm imports torch.distributed"),
        ("ddk_ds/engine/x.py", "torch.distributed.barrier()", "only comm imports torch.distributed"),
        ("ddk_ds/mixture/x.py", "import torch", "mixture imports the standard library"),
        ("ddk_ds/mixture/x.py", "from ddk_ds.config import Config", "mixture imports the standard library"),
        ("ddk_ds/kernels/x.py", "import numpy as np", "kernels imports the standard library"),
        ("ddk_ds/kernels/x.py", "from streaming import MDSWriter", "kernels imports the standard library"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, fault: str) -> None:
    faults = import_faults(Path(path), source)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ddk_ds/engine/x.py", "import deepspeed\nfrom ddk_ds.kernels.linear_kd import linear_kd_loss"),
        (
            "ddk_ds/mixture/x.py",
            "import math\nimport numpy as np\nfrom ddk_ds.errors import DataError\nfrom . import y",
        ),
        ("ddk_ds/mixture/x.py", "from ddk_ds.mixture.ddk import initial_factors"),
        ("ddk_ds/comm.py", "import torch.distributed as dist\nfrom ddk_ds.errors import UserError"),
        ("launch/x.py", "from ddk_ds.train import loop"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert import_faults(Path(path), source) == []


def test_long_parts_are_found() -> None:
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert long_parts(Path("x.py"), function) == [f"x.py:1: f has {MAX_FUNCTION_LINES + 1} lines"]
    assert long_parts(Path("x.py"), "\n" * (MAX_FILE_LINES + 1)) == [f"x.py: {MAX_FILE_LINES + 1} lines"]
