"""docs/models.md says what a user can use: its table is what was found, and what was found is still so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tools.bench.model_families import main, summary
from tools.bench.models_page import DOCS, RESULTS, table, with_table

# Of each mechanism one: wrapped text models, soft caps, sinks, no sdpa, two dtypes, a state between passes, a layer
# before the head, routers' buffers, joined experts.
FAMILIES = ["gemma3", "mistral3", "qwen2_5_vl", "gemma2", "gpt_oss", "bloom", "mamba", "apertus", "recurrent_gemma"]
FAMILIES += ["modernbert-decoder", "glm4_moe", "qwen3_moe"]


def test_the_page_has_the_table_of_what_was_found() -> None:
    page = (DOCS / "models.md").read_text()
    results = [json.loads(file.read_text()) for file in RESULTS.values()]
    assert with_table(page, table(results)) == page, "run python -m tools.bench.models_page"
    lines = [line for result in results for kind in ("families", "documents") for line in result.get(kind, {}).values()]
    assert [line for line in lines if "wrong:" in line or "crash:" in line] == []


def test_a_line_says_what_differs_by_trial_without_paths_and_numbers() -> None:
    message = (
        "refused: teacher.path: A cannot be distilled: its logits are not those of its head, but differ by up to 7"
    )
    trials = {"teacher fp32": message, "teacher bf16": message.replace("7", "9")}
    assert summary(trials) == "refused: A cannot be distilled: its logits are not those of its head"
    refused = "refused: student: /tmp/x1/model: A cannot be trained"
    trials = {"teacher fp32": "works", "teacher bf16": "works", "student fp32": refused, "student bf16": refused}
    assert summary({**trials, "export": "works"}) == "teacher: works; student: refused: A cannot be trained"
    assert summary({"teacher fp32": "works", "student bf16": "works", "export": "works"}) == "works"


@pytest.mark.long("a dozen families, a minute and a half of CPU")
def test_a_dozen_families_are_as_the_page_says(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert main(["--only", *FAMILIES, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    said = json.loads(RESULTS[transformers.__version__.partition(".")[0]].read_text())
    for kind, least in (("families", 8), ("documents", 7)):
        if kind in said:  # documents were tried with the newer version
            assert found[kind] == {family: said[kind][family] for family in found[kind]}
        assert sum(outcome == "works" for outcome in found[kind].values()) >= least
