"""Runs of tests against mutants, each in a forked child: what the tests import is imported once for all.

A mutant inside a function that a test calls gives its code to the function objects of a process that has collected the
tests. Any other is imported in place of its file, together with the tests, by a process that has imported only what
others wrote.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

from tools.bench.mutants import Mutant

_PYTEST = ("-qx", "--noconftest", "--timeout=0", "-m", "not long", "-pno:cacheprovider", "-pno:xdist", "-Wignore")
_NOT_SWAPPED, _NO_PROGRAM = 70, 71  # exit codes: the change needs an import; cosmic-ray made no Python
# hypothesis' attribute of a test. A mutant that lives runs every test that calls it: few examples must do.
_OPTIONS, _EXAMPLES = "_hypothesis_internal_use_settings", 15


@dataclass
class Baseline:
    """The tests without a change."""

    calls: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    """Test -> (file, line) of the functions that it calls."""
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each test."""
    failed: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    """Modules of other projects that the tests import."""

    def tests_for(self, mutant: Mutant) -> list[str]:
        """Return the tests that call the mutant's function, fast ones first; outside of one its file's, or all."""
        chosen = self._calling(mutant.path, *(mutant.function or (0, sys.maxsize)))
        chosen = chosen or self._calling(mutant.path, 0, sys.maxsize)  # a function that only an import calls
        return sorted(chosen or self.calls, key=self.seconds.__getitem__)

    def calls_function(self, mutant: Mutant) -> bool:
        """Return True if the mutant lies in a function, and a test calls it."""
        return mutant.function is not None and bool(self._calling(mutant.path, *mutant.function))

    def _calling(self, path: str, first: int, last: int) -> list[str]:
        return [
            test
            for test, calls in self.calls.items()
            if any(file == path and first <= line <= last for file, line in calls)
        ]


def run_mutants(
    mutants: Sequence[Mutant], tests: Sequence[str], say: Callable[[Mutant, bool], None]
) -> list[bool | None]:
    """Return for each mutant True if one of the tests (arguments of pytest) notices it, None if it is no program.

    `say` is called for each mutant that was tried. Raises SystemExit if a test fails without a change.
    """
    baseline, codes = _in_child(partial(_collected, mutants, tests, say))
    if baseline.failed or not baseline.calls:
        raise SystemExit(f"without a change these tests fail: {', '.join(baseline.failed) or 'all'}")
    if _NOT_SWAPPED in codes:
        _import(baseline.modules)
    for number, mutant in enumerate(mutants):
        if codes[number] == _NOT_SWAPPED:
            codes[number] = _forked(partial(_run_imported, mutant, baseline.tests_for(mutant), baseline))
            say(mutant, codes[number] != 0)
    return [None if code == _NO_PROGRAM else code != 0 for code in codes]


def _collected(
    mutants: Sequence[Mutant], tests: Sequence[str], say: Callable[[Mutant, bool], None]
) -> tuple[Baseline, list[int]]:
    """Collect the tests in this process, and return their baseline and the exit code of each mutant."""
    result: tuple[Baseline, list[int]] = Baseline(), []

    class Instead:
        """A plugin of pytest that runs something else in place of the collected tests."""

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtestloop(self, session: pytest.Session) -> bool:
            nonlocal result
            result = _run_collected(mutants, session.items, say)
            return True

    pytest.main([*_PYTEST, "-s", *tests], plugins=[Instead()])
    return result


def _run_collected(
    mutants: Sequence[Mutant], items: list[pytest.Item], say: Callable[[Mutant, bool], None]
) -> tuple[Baseline, list[int]]:
    functions = _functions_by_file({mutant.path for mutant in mutants})
    for item in items:
        if (options := getattr(item.obj, _OPTIONS, None)) is not None:  # type: ignore[attr-defined]
            few = hypothesis.settings(options, max_examples=min(options.max_examples, _EXAMPLES))
            setattr(getattr(item.obj, "__func__", item.obj), _OPTIONS, few)  # type: ignore[attr-defined]
    baseline: Baseline = _in_child(partial(_measure, items, functions))
    if not baseline.failed and baseline.modules - sys.modules.keys():
        # What only a test's run imports costs each child seconds: once for all, and measured again.
        _import(baseline.modules)
        gc.collect()
        gc.freeze()  # a collection in a child would copy all memory
        baseline = _in_child(partial(_measure, items, functions))
    by_id = {item.nodeid: item for item in items}
    codes = []
    for mutant in mutants if not baseline.failed else ():
        chosen = [by_id[test] for test in baseline.tests_for(mutant)]
        work = partial(_run_swapped, mutant, functions[mutant.path], chosen, baseline)
        codes.append(_forked(work) if baseline.calls_function(mutant) else _NOT_SWAPPED)
        if codes[-1] not in (_NOT_SWAPPED, _NO_PROGRAM):
            say(mutant, codes[-1] != 0)
    return baseline, codes


def _measure(items: list[pytest.Item], functions: dict[str, list[FunctionType]]) -> Baseline:
    """Run the tests in this process, and note which of the functions each of them calls."""
    _silence()
    baseline = Baseline()
    for file, of_file in functions.items():
        _swap(of_file, file, _noting_calls(file))
    for item, following in zip(items, [*items[1:], None], strict=True):
        called: set[tuple[str, int]] = set()
        builtins._called = called.add  # type: ignore[attr-defined]
        began = time.process_time()
        if not _passes(item, following):
            baseline.failed.append(item.nodeid)
        baseline.calls[item.nodeid], baseline.seconds[item.nodeid] = called, time.process_time() - began
    named = {name for name, module in sys.modules.items() if getattr(module, "__spec__", None) is not None}
    ours = ("ddk_ds", "tests", "tools", "__main__")
    baseline.modules = {name for name in named if name.partition(".")[0] not in ours}
    return baseline


def _import(modules: set[str]) -> None:
    for name in sorted(modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run one test, and return True if it and its fixtures passed."""
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def _run_swapped(mutant: Mutant, functions: list[FunctionType], items: list[pytest.Item], baseline: Baseline) -> int:
    """Return 1 if a test notices a mutant inside a function, else 0."""
    try:
        _swap(functions, mutant.path, mutant.source())
    except SyntaxError:
        return _NO_PROGRAM
    except (ValueError, KeyError):
        return _NOT_SWAPPED
    _limit(sum(baseline.seconds[item.nodeid] for item in items))
    return 0 if all(_passes(*pair) for pair in zip(items, [*items[1:], None], strict=True)) else 1


def _run_imported(mutant: Mutant, tests: list[str], baseline: Baseline) -> int:
    """Return 1 if a test notices a mutant that is imported in place of its file, else 0."""
    _limit(sum(baseline.seconds[test] for test in tests) + 10)
    sys.meta_path.insert(0, _Changed(mutant))
    return int(pytest.main([*_PYTEST, *tests]) != pytest.ExitCode.OK)


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked child."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    if (pid := os.fork()) == 0:
        theirs.send(work())
        os._exit(0)
    theirs.close()
    result = ours.recv()
    os.waitpid(pid, 0)
    return result


def _forked(work: Callable[[], int]) -> int:
    """Return the exit code of `work` in a forked child without output; negative: ended by that signal."""
    if (pid := os.fork()) == 0:
        try:
            _silence()
            os._exit(work())
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _limit(seconds: float) -> None:
    """End this process if it needs many times the memory and CPU seconds that the tests need without a change."""
    end = int(time.process_time() + 3 * seconds) + 3
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 5))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), used + (4 << 30)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(100 * seconds) + 300)  # for one that waits


def _functions_by_file(files: set[str]) -> dict[str, list[FunctionType]]:
    """Return the functions that were made from each file."""
    found: dict[str, list[FunctionType]] = {file: [] for file in files}
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename in files:
            found[one.__code__.co_filename].append(one)
    return found


def _swap(functions: list[FunctionType], file: str, changed: str | ast.Module) -> None:
    """Give the functions of a file the code of its changed source. Raises ValueError for other free variables."""
    before, after = _numbered(Path(file).read_text(), file), _numbered(changed, file)
    keys = {(code.co_qualname, code.co_firstlineno): key for key, code in before.items()}
    for function in functions:
        code = function.__code__
        function.__code__ = after[keys[code.co_qualname, code.co_firstlineno]]


def _numbered(source: str | ast.Module, file: str) -> dict[tuple[str, int], CodeType]:
    """Return all code objects of a source by qualified name and number among those of that name."""
    count: Counter[str] = Counter()
    found = {}
    for code in _codes(compile(source, file, "exec", dont_inherit=True)):
        found[code.co_qualname, count[code.co_qualname]] = code
        count[code.co_qualname] += 1
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _noting_calls(file: str) -> ast.Module:
    """Return the file's source with a note of each function's call, at its beginning."""
    tree = ast.parse(Path(file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            (note,) = ast.parse(f"_called(({file!r}, {node.lineno}))").body
            node.body.insert(ast.get_docstring(node) is not None, note)
    return ast.fix_missing_locations(tree)


class _Changed(MetaPathFinder, SourceLoader):  # type: ignore[misc]  # typeshed knows SourceLoader.source_to_code twice
    """Imports one module from a mutant's source."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the specification of the mutant's module; None for any other."""
        if fullname != self._name:
            return None
        package = self._mutant.file.endswith("/__init__.py")
        spec = spec_from_loader(fullname, self, origin=self._mutant.path, is_package=package)
        if spec is not None and spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(str(Path(self._mutant.path).parent))
        return spec

    def get_filename(self, fullname: str) -> str:
        """Return the path of the file that the mutant changes."""
        return self._mutant.path

    def get_data(self, path: str | bytes) -> bytes:
        """Return the mutant's source in place of the file's."""
        return self._mutant.source().encode()
