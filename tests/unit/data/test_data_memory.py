"""Memory of a preparation does not grow with the text, and by three times its size with a single document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data.corpus import make_texts, write_recipe

ROOT = Path(__file__).parents[3]
# Without MDS: importing streaming takes far more memory than what is measured, and writing holds one shard.
MEASURED = """
import resource, sys
from pathlib import Path
from ddk_ds.data import prepare
from ddk_ds.data.recipe import load_recipe

def write_split(directory, samples, **_options):
    return {"samples": sum(1 for _ in samples), "sha": ""}

def report(manifest):
    domain = manifest.domains["d"]
    print(domain.train.tokens, domain.dropped.unproven_cuts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    raise SystemExit

prepare.write_split, prepare.write_manifest = write_split, report
recipe = load_recipe(Path(sys.argv[1]))
prepare.prepare(recipe, Path(sys.argv[2]), Path(sys.argv[3]), prepare.Plan(512, validation_samples=100))
"""


def peak(root: Path, tokenizer_dir: Path, num_bytes: int, document_bytes: int = 0) -> tuple[int, int]:
    """Prepare `num_bytes` of text; return (training tokens, peak resident memory in KiB).

    The last document has `document_bytes` more.
    """
    root.mkdir()
    texts = make_texts(0, 100, num_words=400)
    written = number = 0
    with (root / "d.jsonl").open("w") as stream:
        while written < num_bytes:
            written += stream.write(json.dumps({"text": f"{number} {texts[number % 100]}"}) + "\n")
            number += 1
        if document_bytes:
            part = " ".join(texts)
            stream.write('{"text": "')
            for _ in range(document_bytes // len(part)):
                stream.write(part)
            stream.write('"}\n')
    recipe = write_recipe(root / "r.yaml", {"d": {"sources": ["d.jsonl"]}})
    command = [sys.executable, "-c", MEASURED, str(recipe), str(tokenizer_dir), str(root / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    tokens, unproven_cuts, kib = map(int, done)
    assert unproven_cuts == 0
    return tokens, kib


@pytest.mark.long("40 MB of text, half a minute")
def test_memory_is_flat_over_ten_times_the_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    few, least = peak(tmp_path / "few", tokenizer_dir, 4_000_000)
    many, most = peak(tmp_path / "many", tokenizer_dir, 40_000_000)
    assert many > 9 * few
    assert most == pytest.approx(least, rel=0.15)


def test_memory_of_a_document_is_that_of_its_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    few, least = peak(tmp_path / "few", tokenizer_dir, 1_000_000)
    many, most = peak(tmp_path / "many", tokenizer_dir, 1_000_000, 8_000_000)
    assert many > 5 * few
    assert most - least < 200_000, "an encoding of all of it takes 1,240,000 KiB"


@pytest.mark.long("one document of 200 MB, a minute and a half")
def test_memory_of_a_very_large_document(tokenizer_dir: Path, tmp_path: Path) -> None:
    _, kib = peak(tmp_path / "large", tokenizer_dir, 1_000_000, 200_000_000)
    assert kib < 1_500_000
