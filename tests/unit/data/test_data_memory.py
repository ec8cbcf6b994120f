"""Memory of a preparation does not grow with the text, and by a few times its size with a single document."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.unit.data.corpus import make_texts, write_recipe

ROOT = Path(__file__).parents[3]
# Without MDS: importing streaming takes far more memory than what is measured, and writing holds one shard.
MEASURED = """
import re, sys
from pathlib import Path
from ddk_ds.data import prepare
from ddk_ds.data.recipe import load_recipe

def write_split(directory, samples, **_options):
    return {"samples": sum(1 for _ in samples), "sha": ""}

def peak():
    # getrusage would begin with the peak of pytest, which forked this process.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def report(manifest):
    domain = manifest.domains["d"]
    print(domain.train.tokens, domain.dropped.unproven_cuts, peak())
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


# The splits' ids go to files; then each recipe's end and the peak so far are printed.
KEPT = """
import json, re, sys
from pathlib import Path
import numpy as np
from ddk_ds.data import prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.errors import DataError

def write_split(directory, samples, **_options):
    np.save(f"{directory.name}.npy", np.concatenate(list(samples)))
    return {"samples": 1, "sha": ""}

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Done(Exception):
    pass

def report(manifest):
    raise Done(manifest.domains["d"].dropped.unproven_cuts)

prepare.write_split, prepare.write_manifest = write_split, report
before = peak()
for name in sys.argv[1:]:
    try:
        plan = prepare.Plan(16, validation_samples=1)
        prepare.prepare(load_recipe(Path(name)), Path("tokenizer"), Path(name).with_suffix(""), plan)
    except (Done, DataError) as end:
        print(json.dumps([str(end), peak() - before]))
"""
# Long words are few tokens: the text is large, and tokenizers would take minutes for it as short ones.
WORDS = ["".join(random.Random(number).choices("abcdefghijklmnop", k=60)) for number in range(1000)]
PARAGRAPH = random.Random(0).choices(range(len(WORDS)), k=4000)
LINE = " ".join(WORDS[number] for number in PARAGRAPH)


def prepared(root: Path, **files: tuple[int, str]) -> list[tuple[str, int]]:
    """Prepare a file of each name and then 30 short documents; return each one's end and the peak so far in bytes.

    The first document of a file is PARAGRAPH a number of times, and then a text.
    """
    vocab = {word: number for number, word in enumerate([*WORDS, "</s>", "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (root / "tokenizer").mkdir()
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    (root / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for name, (count, end) in files.items():
        compressor, path = zstandard.ZstdCompressor(level=1), root / f"{name}.jsonl.zst"
        with path.open("wb") as file, compressor.stream_writer(file) as stream:
            stream.write(b'{"text": "')
            for _ in range(count):
                stream.write(f"{LINE}\\n".encode())
            stream.write(f'{end}"}}\n'.encode())
            for number in range(30):
                stream.write(f'{{"text": "{" ".join(WORDS[number : number + 40])}"}}\n'.encode())
        write_recipe(root / f"{name}.yaml", {"d": {"sources": [f"{name}.jsonl.zst"]}})
    command = [sys.executable, "-c", KEPT, *(f"{name}.yaml" for name in files)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.long("a document of 1 GB, half a minute")
def test_a_document_of_a_gigabyte(tmp_path: Path) -> None:
    """Its ids are those of the words in it, and memory holds its text twice; a larger one is refused by line."""
    count = 10**9 // (len(LINE) + 2)
    larger = 2**30 // (len(LINE) + 2) + 1
    (cuts, peak), (refused, all_peak) = prepared(tmp_path, whole=(count, ""), larger=(larger, ""))
    assert cuts == "0"
    ids = np.load(tmp_path / "train.npy")
    assert ids[4000 * count] == 1000, "the end of the text"
    assert (ids[: 4000 * count].reshape(count, -1) == PARAGRAPH).all()
    assert refused.startswith(f"{tmp_path}/larger.jsonl.zst, line 1 has more than 1,073,741,824 bytes")
    assert peak <= all_peak < 2.2e9


@pytest.mark.long("two documents of 60 MB, ten seconds")
@pytest.mark.parametrize(("letter", "times"), [("\u2019", 5.7), ("\U0001f600", 9.7)], ids=["quote", "emoji"])
def test_one_wide_letter_makes_all_of_a_text_wide(letter: str, times: float, tmp_path: Path) -> None:
    num_bytes = 60 * 10**6
    [(_, peak)] = prepared(tmp_path, whole=(num_bytes // len(LINE), letter))
    assert peak < times * num_bytes
