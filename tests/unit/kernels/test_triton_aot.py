"""The Triton kernel compiled ahead of time for GPUs that are not here: registers, spills and bytes moved.

Vocabularies are what users have: the tokenizer's largest id + 1 (151,646 of Qwen, 50,257 of GPT-2), no multiple of 16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.long("forty variants are compiled, 20 s; test_divergences.py runs the kernel")

_WORKER = Path(__file__).with_name("triton_aot_worker.py")
LINEAR, BENT = 0, 2


@pytest.fixture(scope="module")
def compiled() -> list[dict]:  # type: ignore[type-arg]
    """Return one record for each variant, from a separate process, because this one interprets Triton."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, _WORKER], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_variant_spills(compiled: list[dict]) -> None:  # type: ignore[type-arg]
    for record in compiled:
        assert record["spill_bytes"] == 0, record
        assert record["shared_bytes"] < 1024, record
        # At least two programs of 256 threads fit into the 65,536 registers of a multiprocessor.
        assert record["registers"] <= 128, record
    assert {record["capability"] for record in compiled} == {80, 90}
    assert {record["vocab_size"] for record in compiled} == {50_257, 151_646, 151_936}


def test_forward_kl_keeps_to_64_registers(compiled: list[dict]) -> None:  # type: ignore[type-arg]
    """Four programs fit a multiprocessor: enough loads in flight to fill the memory's bandwidth."""
    assert all(r["registers"] <= 64 for r in compiled if r["kind"] == 1 and r["form"] == LINEAR)


def test_bytes_by_element(compiled: list[dict]) -> None:  # type: ignore[type-arg]
    """CE + forward KL reads both logits twice and writes a bf16 gradient once: 18 bytes an element.

    With a teacher that is known by some tokens it is 10, as of CE alone, and with logits in bf16.
    """
    seen = Counter(record["kind"] for record in compiled)
    assert seen[1] >= 8 and sum(record["known"] > 0 for record in compiled) >= 8
    for record in compiled:
        passes = {0: 2, 1: 2}.get(record["kind"], 3)
        models = 1 if record["kind"] == 0 or record["known"] else 2
        width = 4 if record["logits"] == "float32" else 2
        assert record["load_bytes_per_element"] == width * models * passes, record
        # The zeros of an ignored row are a second, exclusive, write.
        assert record["store_bytes_per_element"] == 2 * 2, record


def test_every_load_and_store_of_a_block_is_wide(compiled: list[dict]) -> None:  # type: ignore[type-arg]
    """Scalar are a row's label, the logit at it, its two losses (also of an ignored row), and one store of padding.

    A row's known tokens are elsewhere in memory: ids, logits and probabilities come one by one, with the tail's.
    """
    for record in compiled:
        if record["known"]:
            assert (record["scalar_loads"], record["scalar_stores"]) == (2 + 4, 4 + 1 + 2), record
            continue
        assert record["scalar_loads"] == 2, record
        assert record["scalar_stores"] == 4 + (1 if record["kind"] == 0 else 2), record


def test_bf16_logits_save_bytes_and_not_instructions(compiled: list[dict]) -> None:  # type: ignore[type-arg]
    """Four exponentials an element, two of each model, and as many instructions more as logits are unpacked.

    A thread also computes two exponentials in the first pass to correct its sums: 1 / 8 by element.
    """
    both = [r for r in compiled if r["kind"] == 1 and r["vocab_size"] == 151_936 and r["capability"] == 90]
    by_logits = {record["logits"]: record for record in both}
    assert set(by_logits) == {"float32", "model"}
    for record in both:
        assert record["exponentials_per_element"] == 4 + 1 / 8, record
    instructions = [by_logits[name]["instructions_per_element"] for name in ("float32", "model")]
    assert 60 < instructions[0] < instructions[1] < instructions[0] + 8, instructions
    assert by_logits["model"]["registers"] < by_logits["float32"]["registers"] <= 64
