"""The tool that tries every family: one that works, and one that must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.model_families import TRIALS, main


@pytest.mark.long("two families, 20 s of CPU; test_loading.py loads the same by other means")
def test_a_family_that_works_and_one_that_is_refused(tmp_path: Path) -> None:
    files = tmp_path / "found.json", tmp_path / "table.md"
    only = ["--only", "llama", "modernbert-decoder"]
    assert main([*only, "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    found = json.loads(files[0].read_text())["families"]
    assert found["llama"] == dict.fromkeys(TRIALS, "works")
    refused = "refused: teacher.path: ModernBertDecoderForCausalLM cannot be distilled"
    assert found["modernbert-decoder"]["teacher fp32"].startswith(refused)
    assert "| llama | works |" in files[1].read_text()
