"""A mark `long` has a reason; a test without it is run by `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
HOOK = "from tests.long_tests import pytest_collection_modifyitems\n"
INI = '[pytest]\nmarkers = long: minutes\naddopts = -m "not long"\n'


@pytest.mark.parametrize(
    ("mark", "refused"),
    [
        ('("three starts of the launcher")', False),
        ("", True),
        ("()", True),
        ('("slow")', True),
        ('(reason="two new interpreters")', True),
    ],
)
def test_a_mark_without_a_reason_is_refused(pytester: pytest.Pytester, mark: str, refused: bool) -> None:
    pytester.makeini(INI)
    pytester.makeconftest(HOOK)
    pytester.makepyfile(
        f"import pytest\n@pytest.mark.long{mark}\ndef test_long(): pass\ndef test_short(): pass\n"
        f"@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.long{mark})])\ndef test_case(n): pass\n"
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    if refused:
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*write the reason*test_long*test_case[[]2[]]*"])
    else:
        result.assert_outcomes(passed=2, deselected=2)


def test_the_hook_is_in_use(pytestconfig: pytest.Config) -> None:
    names = {Path(str(getattr(plugin, "__file__", ""))).name for plugin in pytestconfig.pluginmanager.get_plugins()}
    assert "long_tests.py" in names
