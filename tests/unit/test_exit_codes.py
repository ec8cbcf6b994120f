"""The exit codes: an error's kind decides, all ranks agree on it, and the documentation has these codes alone."""

from __future__ import annotations

import errno
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddk_ds import exit_codes
from ddk_ds.comm import SingleProcess, raise_together
from ddk_ds.command_line import reports_user_errors
from ddk_ds.errors import CheckpointError, ConfigError, DataError, TemporaryError, UserError

ROOT = Path(__file__).parents[2]
CODES = {value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")}


class TwoRanks(SingleProcess):
    """Gives what this rank and one other have, as they come through a pickle."""

    def __init__(self, other: UserError | None) -> None:
        self.other = other

    def gather_objects(self, value: Any) -> list[Any]:
        return [pickle.loads(pickle.dumps(item)) for item in (value, self.other)]


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, CheckpointError, TemporaryError])
def test_an_error_keeps_its_kind_on_all_ranks(kind: type[UserError]) -> None:
    for mine, other in ((None, kind("x: why")), (kind("x: why"), None)):
        with pytest.raises(UserError, match=r"^x: why$") as raised:
            raise_together(TwoRanks(other), mine)
        assert type(raised.value) is kind


def test_what_time_does_not_mend_goes_before_what_it_may() -> None:
    time, user = TemporaryError("the store"), DataError("a shard")
    for mine, other in ((time, user), (user, time)):
        with pytest.raises(DataError, match="a shard"):
            raise_together(TwoRanks(other), mine)


@pytest.mark.parametrize(("error", "code"), [(DataError("x"), 2), (TemporaryError("x"), 69)])
def test_a_command_ends_with_the_code_of_its_error(error: UserError, code: int) -> None:
    @reports_user_errors
    def main(arguments: Any = None) -> int:
        raise error

    assert main([]) == code


def write_to_a_full_disk() -> None:
    with open("/dev/full", "w") as stream:  # Linux: each write says that the disk is full, without a name
        stream.write("numbers")


def open_what_is_no_file() -> None:
    Path("/dev/null/report.json").write_text("numbers")


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (write_to_a_full_disk, "error: No space left on device; make room, then start the same command again\n"),
        (open_what_is_no_file, "error: /dev/null/report.json: Not a directory; mend that, then start"),
    ],
)
def test_a_commands_disk_error_is_one_line(
    work: Callable[[], None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_user_errors
    def main(arguments: Any = None) -> int:
        work()
        return 0

    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_a_pipes_end_is_no_disk_error() -> None:
    @reports_user_errors
    def main(arguments: Any = None) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        main([])


def test_the_documentation_has_these_codes() -> None:
    section = (ROOT / "docs/cluster.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == CODES


def test_the_batch_script_uses_these_codes() -> None:
    script = (ROOT / "ddk_ds/slurm/job.sbatch").read_text()
    used = re.findall(r'(?:"\$code" = |requeue |code=)(\d+)', script)
    used += re.search(r"^    ([\d |]+)\) echo", script, re.MULTILINE)[1].split(" | ")  # type: ignore[index]
    assert {int(code) for code in used} == CODES - {exit_codes.EXIT_ENDED_AT_ONCE}
