"""Run everything that needs a GPU, without network: tests, benchmarks, and the time of a step's parts.

    python -m tools.bench.gpu_suite --out runs/gpu-suite
    python -m tools.bench.gpu_suite --out runs/gpu-suite --part step_benchmark
    python -m tools.bench.gpu_suite --out runs/gpu-suite --part option_benchmark --trl-python trl-env/bin/python
    python -m tools.bench.gpu_suite --out runs/gpu-suite --part compiled_layers

The first command takes at most 18 minutes on an H100, the second 5, the third 45, the fourth 15.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddk_ds.engine.flops import utilisation
from ddk_ds.errors import UserError
from ddk_ds.files import write_text
from ddk_ds.run_files import read_ledger
from tools.bench.bench_step import TRLS
from tools.bench.step_profile import FULL, QUICK, Setting, step_flops
from tools.bench.step_setting import describe, save_byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = {"parsers": ("json", "email", "html"), "network": ("asyncio", "http", "urllib")}  # of the standard library
WARM_UP_STEPS, ENGINE_STEPS, VALIDATION_SAMPLES = 2, 6, 4


class PartFailed(Exception):
    """A part of the suite failed; `result` is what it has measured nevertheless."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


class PartSkipped(Exception):
    """This machine lacks something that a part needs."""


@dataclass
class Bench:
    """The directories and options of one part of the suite."""

    name: str
    out: Path
    scratch: Path
    device: str
    quick: bool
    trl_python: Path | None = None
    """Interpreter of an environment that has TRL (docs/benchmarks.md)."""
    deadline: float = 0.0
    """Value of time.monotonic() at which the part must have ended."""

    def run(self, *command: str) -> None:
        """Run a command from the project's root, and append its output to <out>/<name>.log.

        Raises PartFailed if it fails or runs past the deadline, when its processes are killed.
        """
        log_path = self.out / f"{self.name}.log"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise PartFailed(f"{command[1]} {command[2]} ran past the part's time limit, see {log_path}") from None
            finally:
                # Its child processes are in the session that it leads.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            raise PartFailed(f"{' '.join(command[1:4])} ended with {code}: {_last_line(log_path)}; see {log_path}")


def _last_line(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def kernel_tests(bench: Bench) -> dict[str, Any]:
    """Run the tests of the loss head, and return what `run_tests` does."""
    return run_tests(bench, "tests/gpu/test_kernel_gpu.py")


def first_hour(bench: Bench) -> dict[str, Any]:
    """Run the tests of what a CPU never shows (docs/cluster.md), and return what `run_tests` does."""
    return run_tests(bench, "tests/gpu/test_first_hour_gpu.py")


def compiled_layers(bench: Bench) -> dict[str, Any]:
    """Run the test that compiled layers must pass to become the default, and return what `run_tests` does."""
    return run_tests(bench, "tests/gpu/test_compiled_gpu.py")


def run_tests(bench: Bench, file: str) -> dict[str, Any]:
    """Run a file of tests. The log names failed tests.

    Returns:
        The numbers of `tests` and of `skipped` tests, and by test what it has `measured`: its `record_property` calls.
    """
    report = bench.scratch / f"{bench.name}.xml"
    command = (sys.executable, "-m", "pytest", file, "-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={report}")
    try:
        bench.run(*command)
    except PartFailed as failure:
        raise PartFailed(str(failure), {"measured": measured(report)} if report.is_file() else None) from None
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped")}
    if counts["skipped"] == counts["tests"]:
        nothing_ran = PartFailed if bench.device == "cuda" else PartSkipped
        raise nothing_ran(f"all of {counts['tests']} tests were skipped: see {bench.name}.log")
    return {**counts, "measured": measured(report)}


def measured(report: Path) -> dict[str, dict[str, str]]:
    """Return the properties that tests have recorded in a report of pytest, by test."""
    return {
        str(case.get("name")): {str(each.get("name")): str(each.get("value")) for each in case.iter("property")}
        for case in ElementTree.parse(report).iter("testcase")
        if case.find(".//property") is not None
    }


def loss_benchmark(bench: Bench) -> dict[str, Any]:
    """Run tools/bench/bench_kd_loss.py, also by kernel, and return its results."""
    picture = ["--picture", str(bench.out / "bench_kd_loss.png")] if find_spec("matplotlib") else []
    return _bench_kd_loss(bench, "bench_kd_loss.json", "--by-kernel", *picture)


def linear_ce_benchmark(bench: Bench) -> dict[str, Any]:
    """Run tools/bench/bench_kd_loss.py for the cross-entropy alone, and return its results."""
    return _bench_kd_loss(bench, "bench_linear_ce.json", "--gamma", "0")


def _bench_kd_loss(bench: Bench, file: str, *arguments: str) -> dict[str, Any]:
    results = bench.out / file
    options = ["--device", bench.device, "--json", str(results), *arguments]
    if bench.quick:
        options += ["--case", "256,1000,64,96", "--repeats", "2"]
    bench.run(sys.executable, "-m", "tools.bench.bench_kd_loss", *options)
    return {"results": json.loads(results.read_text(encoding="utf-8"))}


def step_profile(bench: Bench) -> dict[str, Any]:
    """Run tools/bench/step_profile.py, and return its result: the parts of a distillation step on plain torch."""
    result = bench.scratch / "step.json"
    options = ["--device", bench.device, "--out", str(result), *(["--quick"] if bench.quick else [])]
    bench.run(sys.executable, "-m", "tools.bench.step_profile", *options)
    return json.loads(result.read_text(encoding="utf-8"))


def engine_run(bench: Bench) -> dict[str, Any]:
    """Run the same models on the project's engines: a short run of launch/distill.py on one rank."""
    if find_spec("deepspeed") is None:
        raise PartSkipped("deepspeed is not installed")
    setting = QUICK if bench.quick else FULL
    config = write_run(bench.scratch / "run", setting, bench)
    port = str(20000 + os.getpid() % 20000)
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    bench.run(sys.executable, *launcher, "launch/distill.py", "--config", str(config))
    records = read_ledger(config.parent / "runs" / "engines")
    steps = [record for record in records if record["kind"] == "step"][WARM_UP_STEPS:]
    tokens_per_s = statistics.median(record["clock"]["tokens_per_s"] for record in steps)
    seconds = statistics.median(record["clock"]["step_s"] for record in steps)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    return {
        "tokens": setting.samples * setting.length,
        "step_ms": seconds * 1e3,
        "tokens_per_s": tokens_per_s,
        "mfu": utilisation(sum(step_flops(setting).values()), seconds, name),
        "loss": [record["loss"] for record in records if record["kind"] == "step"],
    }


def step_benchmark(bench: Bench) -> dict[str, Any]:
    """Run tools/bench/bench_step.py with a teacher of 7 B and a student of 1 B parameters, and return its cases."""
    size = ["--tokens", "16384", "--length", "2048", "--accumulation", "4"]
    return _bench_step(bench, *size)


def option_benchmark(bench: Bench) -> dict[str, Any]:
    """Time each option of a step of a pair of 7 B and 1.5 B, on and off, beside TRL's trainers if TRL is there."""
    size = ["--size", "pair", "--vocab", "151936", "--tokens", "16384", "--length", "2048", "--accumulation", "4"]
    return _bench_step(bench, *size, "--impl", "floor", "kd", *(TRLS if bench.trl_python else ()), "--each-option")


def _bench_step(bench: Bench, *arguments: str) -> dict[str, Any]:
    """Run tools/bench/bench_step.py on one rank, and return its cases; `--quick` takes the place of their sizes."""
    results = bench.out / f"{bench.name}.json"
    options = ["--device", bench.device, "--ranks", "1", "--json", str(results)]
    if find_spec("matplotlib"):
        options += ["--picture", str(results.with_suffix(".png"))]
    if bench.trl_python:
        options += ["--trl-python", str(bench.trl_python)]
    quick = ["--tokens", "128", "--length", "32", "--accumulation", "2", "--steps", "2", "--size", "quick"]
    quick += ["--vocab", "1000"]
    options += [*arguments, *(quick if bench.quick else ())]  # of an option that comes twice the last one counts
    bench.run(sys.executable, "-m", "tools.bench.bench_step", *options)
    return {"cases": json.loads(results.read_text(encoding="utf-8"))["cases"]}


def write_run(folder: Path, setting: Setting, bench: Bench) -> Path:
    """Write tokenizer, shards, random models and the configuration of a run, and return the configuration's path."""
    folder.mkdir()
    save_byte_tokenizer(setting.student.vocab_size, folder / "tokenizer")
    domains = {name: {"sources": [f"stdlib:{part}/*.py" for part in parts]} for name, parts in DOMAINS.items()}
    # JSON is YAML too.
    (folder / "recipe.yaml").write_text(json.dumps({"domains": domains}))
    tokenizer = ("--tokenizer", str(folder / "tokenizer"))
    shards = ("--out", str(folder / "shards"), "--sequence-length", str(setting.length), "--workers", "1")
    held_out = ("--validation-samples", str(VALIDATION_SAMPLES))
    prepare = ("tools/prepare_data.py", "--recipe", str(folder / "recipe.yaml"))
    bench.run(sys.executable, *prepare, *tokenizer, *shards, *held_out)
    for name, shape in (("teacher", setting.teacher), ("student", setting.student)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asdict(shape) | {"dtype": "bfloat16"}))
        options = ("--config", str(path), *tokenizer, "--out", str(folder / name), "--device", bench.device)
        bench.run(sys.executable, "tools/init_model.py", *options)
    samples, precision = setting.samples, "bf16" if bench.device == "cuda" else "fp32"
    data = {"sequence_length": setting.length, "validation_samples": VALIDATION_SAMPLES}
    values = {
        "name": "engines",
        "output_dir": str(folder / "runs"),
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"path": str(folder / "shards"), **data},
        "mixture": {"controller": "equal", "interval_steps": ENGINE_STEPS},
        "optimizer": {"warmup_steps": 1},
        "train": {"global_batch_samples": samples, "micro_batch_samples": samples, "precision": precision},
        "stop": {"steps": ENGINE_STEPS},
    }
    config = folder / "run.yaml"
    config.write_text(json.dumps(values))
    return config


# Each part's time limit in seconds: 18 minutes together; the last three run only if --part names them.
PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "first_hour": (first_hour, 300.0),
    "kernel_tests": (kernel_tests, 240.0),
    "loss_benchmark": (loss_benchmark, 200.0),
    "linear_ce_benchmark": (linear_ce_benchmark, 120.0),
    "step_profile": (step_profile, 50.0),
    "engine_run": (engine_run, 130.0),
    "step_benchmark": (step_benchmark, 300.0),
    "option_benchmark": (option_benchmark, 2700.0),
    "compiled_layers": (compiled_layers, 900.0),
}
ON_DEMAND = ("step_benchmark", "option_benchmark", "compiled_layers")


def run_part(work: Callable[[Bench], dict[str, Any]], bench: Bench, limit_s: float) -> dict[str, Any]:
    """Run a part, and return its status (passed, skipped or failed), its result or error, and its seconds."""
    started = time.monotonic()
    bench.deadline = started + limit_s
    try:
        record: dict[str, Any] = {"status": "passed", "result": work(bench)}
    except PartSkipped as reason:
        record = {"status": "skipped", "error": str(reason)}
    except Exception as error:  # any error, so that the other parts still run
        text = str(error) if isinstance(error, PartFailed | UserError) else f"{type(error).__name__}: {error}"
        record = {"status": "failed", "error": text}
        if isinstance(error, PartFailed) and error.result is not None:
            record["result"] = error.result
    return {**record, "seconds": round(time.monotonic() - started, 1)}


def table(parts: dict[str, dict[str, Any]]) -> Table:
    """Return the table of parts: status, seconds and a summary of the result."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("part", "status", "seconds", "result"):
        result.add_column(head, justify="right" if head == "seconds" else "left")
    colours = {"passed": "green", "skipped": "yellow", "failed": "bold red"}
    for name, part in parts.items():
        status = f"[{colours[part['status']]}]{part['status']}[/]"
        result.add_row(name, status, f"{part['seconds']:.1f}", escape(_summary(part)))
    return result


def _summary(part: dict[str, Any]) -> str:
    result = part.get("result", {})
    numbers = [f"{name}: {value}" for test in result.get("measured", {}).values() for name, value in test.items()]
    if "error" in part:
        return "\n".join([str(part["error"]), *numbers])
    if "tests" in result:
        return "\n".join([f"{result['tests']} tests, {result['skipped']} of them skipped", *numbers])
    if "cases" in result:
        return "\n".join(_case_summary(case) for case in result["cases"])
    if "tokens_per_s" not in result:
        return "see its log and its JSON file"
    lines = [
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['step_ms']:.1f} ms a step of {result['tokens']:,} tokens"
    ]
    if result["mfu"] is not None:
        lines.append(f"MFU {result['mfu']:.1%}")
    if result.get("peak_memory_bytes"):
        lines.append(f"peak memory {result['peak_memory_bytes'] / 1e9:.1f} GB")
    lines += [f"{name} {milliseconds:.1f} ms" for name, milliseconds in result.get("ms", {}).items()]
    return "\n".join(lines)


def _case_summary(case: dict[str, Any]) -> str:
    name = " ".join([case["impl"], *case["options"]])
    if case["error"]:
        return f"{name}: {case['error']}"
    over, mfu = (format(case[key], form) if case[key] else "-" for key, form in (("over_floor", ".2f"), ("mfu", ".1%")))
    reserved = f", {case['reserved_bytes'] / 1e9:.1f} GB reserved" if case["reserved_bytes"] else ""
    parts = "".join(f", {part} {seconds * 1e3:.0f} ms" for part, seconds in case["parts_s"].items())
    return f"{name}: {case['tokens_per_s']:,.0f} tokens/s, {over} x floor, MFU {mfu}{reserved}{parts}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts. Returns 0, or 1 if a part failed; exits with 2 if the options do not fit this machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-suite"), help="directory for results and logs (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and one case of the benchmark")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the suite itself")
    usual = [name for name in PARTS if name not in ON_DEMAND]
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        default=usual,
        help=f"parts to run (default: all except {', '.join(ON_DEMAND)})",
    )
    parser.add_argument("--trl-python", type=Path, metavar="FILE", help="interpreter of an environment that has TRL")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: run it where there is one, or give --device cpu --quick")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu would take hours at full size: add --quick")
    trl_python = options.trl_python and options.trl_python.absolute()  # not resolved: a link is its environment
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    result: dict[str, Any] = {**describe(options.device), "quick": options.quick, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        for name in options.part:
            work, limit_s = PARTS[name]
            (out / f"{name}.log").unlink(missing_ok=True)
            with console.status(f"{name}, at most {limit_s:.0f} s"):
                bench = Bench(name, out, Path(scratch), options.device, options.quick, trl_python)
                result["parts"][name] = run_part(work, bench, limit_s)
            write_text(out / "gpu_suite.json", json.dumps(result, indent=1))
    console.print(", ".join(f"{key} {value}" for key, value in result.items() if key != "parts"), highlight=False)
    console.print(table(result["parts"]))
    console.print(f"{out / 'gpu_suite.json'}", highlight=False, soft_wrap=True)
    return int(any(part["status"] == "failed" for part in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
