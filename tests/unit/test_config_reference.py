"""docs/configuration.md is up to date and has a description of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from ddk_ds.config import METHODS, Config
from ddk_ds.config.keys import all_keys, section_of
from tools.bench import config_reference
from tools.bench.config_reference import _kind, main, reference


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_key_has_a_row_with_a_description() -> None:
    rows = {line.split("|")[1].strip(): line for line in reference().splitlines() if line.startswith("| `")}
    for name, field in Config.model_fields.items():
        section = section_of(field)
        keys = [name] if section is None else [key for key, _ in all_keys(section, f"{name}.")]
        for key in keys:
            description = rows.pop(f"`{key}`").replace("\\|", "").split("|")[4]
            assert len(description) > 10, f"{key} has no description"
    assert set(rows) == {f"`{name}`" for name in METHODS} | {"`teacher.cache`"}, "methods, and a section in a section"


def test_types_in_words() -> None:
    assert _kind(int, [Field(ge=1).metadata[0]]) == "integer >= 1"
    assert _kind(Annotated[float, Field(gt=0, le=1)] | None) == "number > 0, <= 1, or null"
    assert _kind(dict[str, Annotated[float, Field(ge=0)]]) == "mapping of number >= 0"
    assert _kind(tuple[str, ...]) == "list of text" and _kind(tuple[int, int]) == "[integer, integer]"
    assert _kind(Literal["a", "b"]) == "`a`, `b`"


def test_an_old_page_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(config_reference, "PAGE", page)
    assert main(["--check"]) == 1
    assert main([]) == 0 and main(["--check"]) == 0
    page.write_text(page.read_text().replace("0.5", "0.6"))
    assert main(["--check"]) == 1
    assert "run python -m tools.bench.config_reference" in capsys.readouterr().err
