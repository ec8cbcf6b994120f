"""Damage to each file of a run's directory, one at a time, and what the next start and the readers make of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ddk_ds.files import size_and_xxh64
from tools.bench.fault_cases import TRACEBACK, Case, Setting, note_command, refusal
from tools.bench.faults import intact_checkpoints
from tools.bench.forked import READERS, ForkedJob, Said, run_commands

RESUMED, READ = "file damaged, then resumed", "file damaged, then read"
_RANKS = 2
# A status has ages and the disk's free bytes, which are others a second later.
_PASSING = re.compile(r"last sign of life .*? ago|, [^,\n]* old|disk free [\d.,]+ GB")
# A changed digit, or lines that are missing at the end, of a file of lines without hashes: nobody can know.
_UNKNOWABLE = {("events.jsonl", "empty"), ("events.jsonl", "cut in half"), ("ledger.jsonl", "cut in half")}
_UNKNOWABLE |= {(name, "one bit flipped") for name in ("events.jsonl", "ledger.jsonl", "config.yaml", "summary.json")}


def _empty(content: bytes, rng: np.random.Generator) -> bytes:
    return b""


def _half(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    flipped = bytearray(content)
    flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def _garbage(content: bytes, rng: np.random.Generator) -> bytes:
    middle, size = len(content) // 2, min(64, max(1, len(content) // 4))
    return content[:middle] + rng.bytes(size) + content[middle + size :]


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "empty": _empty,
    "cut in half": _half,
    "one bit flipped": _flip,
    "garbage in the middle": _garbage,
}


def damages(runs: Path) -> list[tuple[str, str]]:
    """Return every pair of a file below `runs` that is not empty and a kind of damage.

    Of a finished run's checkpoints only the newest is taken: nothing reads the others.
    """
    files = sorted(path for path in runs.rglob("*") if path.is_file() and path.stat().st_size)
    if (runs / "run/summary.json").exists():
        newest = max(path for path in runs.glob("run/checkpoints/step-*"))
        files = [path for path in files if "checkpoints" not in path.parts or path.is_relative_to(newest)]
    return [(str(path.relative_to(runs)), damage) for path in files for damage in DAMAGES]


def damaged(setting: Setting, count: int, rng: np.random.Generator) -> Iterator[Case]:
    """Damage files of an interrupted and of a finished run in `count` ways, all of them if there are fewer.

    Each is read by the commands and started again.
    """
    sources = [setting.interrupted(_RANKS), setting.reference(_RANKS).parent]
    chosen = [(source, name, damage) for source in sources for name, damage in damages(source)]
    if count < len(chosen):
        chosen = [chosen[number] for number in np.sort(rng.permutation(len(chosen))[:count])]
    expected: dict[Path, dict[str, str]] = {}
    for number, (source, name, damage) in enumerate(chosen):
        if source not in expected:
            expected[source] = _undamaged(setting, source)
        folder = setting.folder / f"damage-{number:03d}"
        shutil.copytree(source, folder / "runs")
        path = folder / "runs" / name
        written = path.stat()
        path.write_bytes(DAMAGES[damage](path.read_bytes(), rng))
        os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))  # else the run would look alive
        finished = source == sources[1]
        fault = f"{'finished' if finished else 'interrupted'} run's {name} {damage}"
        read = _readers(folder, fault, name, damage, expected[source])
        cases = [read, _resume(setting, folder, fault, finished=finished)]
        if not any(case.broken for case in cases):
            shutil.rmtree(folder)
        yield from cases


def _undamaged(setting: Setting, source: Path) -> dict[str, str]:
    folder = setting.folder / f"{source.parent.name}-read"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder / "runs")
    return _read(folder)[1]


def _resume(setting: Setting, folder: Path, fault: str, *, finished: bool) -> Case:
    run_dir = folder / "runs/run"
    case = Case(RESUMED, fault, (_RANKS, _RANKS))
    intact = {path.name for path in intact_checkpoints(run_dir)}
    job = ForkedJob(setting.config(folder.name), run_dir, _RANKS)
    case.exit_codes.append(job.run())
    if finished:  # nothing is left to do, and nothing is to be written
        note_command(case, Said(case.exit_codes[0], job.output()))
    else:
        setting.judge(case, run_dir, job.output())
    loaded = re.search(r"resumed from \S+/(step-\d+)", job.output())
    if loaded and loaded[1] not in intact:
        case.broken.append("partial checkpoint loaded")
    return case


def _readers(folder: Path, fault: str, name: str, damage: str, expected: dict[str, str]) -> Case:
    """Return what the commands make of the directory with the damaged file `name`.

    `expected` is what each says of an undamaged one. Other output must name the file, or the file's checkpoint.
    """
    path = Path(name)
    named = next((part for part in path.parts if part.startswith("step-")), path.name)
    said, shown = _read(folder)
    case = Case(READ, fault, (), [code for code, _ in said.values()], result="same")
    for reader, (code, text) in said.items():
        if TRACEBACK in text:
            case.broken.append(f"{reader}: traceback")
        elif code is None:
            case.broken.append(f"{reader}: hang")
        elif shown[reader] == expected[reader]:
            continue
        elif code in (1, 2) and refusal(text):
            case.result, case.line = "refused", refusal(text)
        elif shown[reader].count(named) > expected[reader].count(named):
            case.result = "said"
        elif (path.name, damage) in _UNKNOWABLE:
            case.result = "not to be known"
        else:
            case.broken.append(f"{reader}: other output, and nothing said")
    return case


def _read(folder: Path) -> tuple[dict[str, Said], dict[str, str]]:
    """Return what each command printed, and all that it said: its output, its page's text, its model's hash."""
    run, out = folder / "runs/run", folder / "out"
    options = {"report": ["--out", str(out / "report")], "export": ["--out", str(out / "exported")]}
    said = run_commands([[name, str(run), *options.get(name, [])] for name in READERS], folder / "said")
    by_name = dict(zip(READERS, said, strict=True))
    shown = {name: f"{code} {text.replace(str(folder), '')}" for name, (code, text) in by_name.items()}
    shown["status"] = _PASSING.sub("", shown["status"])
    page, model = out / "report/report.html", out / "exported/model.safetensors"
    if page.is_file():
        text = re.sub(r"(?s)<(script|style|svg)\b.*?</\1>|<[^>]*>", " ", page.read_text())
        shown["report"] += re.sub(r"\s+", " ", text).replace(str(folder), "")
    if model.is_file():
        shown["export"] += size_and_xxh64(model)[1] + (model.parent / "README.md").read_text()
    return by_name, shown
