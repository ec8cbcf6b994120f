"""A mark `long` has a reason; a test without it is run by `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]
HOOK = "from tests.sets import pytest_collection_modifyitems, pytest_xdist_make_scheduler\n"
INI = '[pytest]\nnorecursedirs = .*\nmarkers = long: minutes\naddopts = -m "not long"\n'


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out a project whose conftest has this project's hooks."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini(INI)
    pytester.makeconftest(HOOK)


@pytest.mark.parametrize(
    ("mark", "refused"),
    [
        ('("three starts of the launcher")', False),
        ("", True),
        ('("slow")', True),
    ],
)
def test_a_mark_without_a_reason_is_refused(pytester: pytest.Pytester, mark: str, refused: bool) -> None:
    pytester.makepyfile(
        f"import pytest\n@pytest.mark.long{mark}\ndef test_long(): pass\ndef test_short(): pass\n"
        f"@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.long{mark})])\ndef test_case(n): pass\n"
    )
    # Not in this process: pytester then takes the finder of setuptools' distutils away from the tests after it.
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    if refused:
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*write the reason*test_long*test_case[[]2[]]*"])
    else:
        result.assert_outcomes(passed=2, deselected=2)


def test_the_hook_is_in_use(pytestconfig: pytest.Config) -> None:
    names = {Path(str(getattr(plugin, "__file__", ""))).name for plugin in pytestconfig.pluginmanager.get_plugins()}
    assert "sets.py" in names


def test_one_worker_has_all_tests_of_a_room_that_starts_processes(pytester: pytest.Pytester) -> None:
    """Two workers run at once, each room's or file's tests on one of them."""
    body = (
        "import os, pathlib, time, pytest\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_it(n):\n"
        "    time.sleep(0.2)\n"
        "    line = pathlib.Path(__file__).parent.name + ' ' + os.environ['PYTEST_XDIST_WORKER']\n"
        "    open('workers.txt', 'a').write(line + chr(10))\n"
    )
    for name in ("dist/test_a", "dist/test_b", "slurm/test_c", "nodes/test_d"):
        path = pytester.path / f"tests/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    result = pytester.runpytest_subprocess("-n", "2", "--dist", "loadscope", "--import-mode=importlib")
    result.assert_outcomes(passed=12)
    ran = {tuple(line.split()) for line in (pytester.path / "workers.txt").read_text().splitlines()}
    for rooms in (("dist",), ("slurm", "nodes")):
        assert len({worker for folder, worker in ran if folder in rooms}) == 1
    assert len({worker for _, worker in ran}) == 2
