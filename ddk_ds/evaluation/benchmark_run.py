"""One evaluation: check everything that can be wrong, then load each model once and measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.engine.model_files import ModelFiles, check_code, model_directory, read_model
from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.cross_code import Completion, read_languages, score_languages
from ddk_ds.evaluation.perplexity import HeldOut, open_held_out, score_domains
from ddk_ds.evaluation.results import ModelResult, score_line
from ddk_ds.evaluation.sandbox import check_sandbox
from ddk_ds.evaluation.suites import QUICK_LIMIT, Chosen, check_files
from ddk_ds.version import VERSION

NO_SANDBOX = "nothing"
"""Value of `Prepared.sandbox` if generated programs run without a sandbox."""


@dataclass(frozen=True)
class Request:
    """The models and the measurements to make of them."""

    models: Sequence[str]
    """Directories or hub names of the models."""
    benchmarks: Sequence[Chosen] = ()
    data: Path | None = None
    """Directory of the benchmarks' files; None to read them from the hub."""
    shards: Path | None = None
    """Prepared data for perplexity and bits per byte; None to leave these out."""
    documents: Literal["auto", "masked", "joined"] = "auto"
    """If the documents of a sample of the shards see each other, as `data.documents` of a run has it."""
    cross_code_eval: Path | None = None
    """Directory of CrossCodeEval's files; None to leave it out."""
    limit: int | None = None
    """Maximal number of documents of a benchmark's subject or of a language, and of samples of a domain."""
    unsafe_code: bool = False
    """True to run generated programs without a sandbox."""
    quick: bool = False
    """True if the benchmarks' limit is QUICK_LIMIT when `limit` is None."""
    batch_size: int = 8
    device: str = "cpu"
    """`cpu` (in float32) or `cuda` (in the dtype of the model's files)."""

    @property
    def benchmark_limit(self) -> int | None:
        """Return the maximal number of documents of each benchmark, or None without a limit."""
        return QUICK_LIMIT if self.quick and self.limit is None else self.limit


@dataclass(frozen=True)
class Prepared:
    """A request whose models, documents and shards have been checked and read."""

    request: Request
    files: list[ModelFiles]
    loaded: list[Any]
    """A `harness.Loaded` for each benchmark."""
    held_out: HeldOut | None
    languages: dict[str, list[Completion]]
    sandbox: str | None
    """Program in which generated code runs, with its version; `nothing` without a sandbox, None if no code runs."""


def default_device() -> str:
    """Return `cuda` if torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(request: Request) -> Prepared:
    """Check and read everything that a request needs, without loading a model.

    Raises:
        ConfigError: a model, package or device is missing, or generated programs cannot run here.
        DataError: documents or shards are missing or do not fit.
    """
    if not (request.benchmarks or request.shards or request.cross_code_eval):
        raise ConfigError("nothing to measure: give --suite, --shards or --cross-code-eval")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    if (request.benchmarks or request.cross_code_eval) and find_spec("lm_eval") is None:
        raise ConfigError("the benchmarks need lm-evaluation-harness: uv pip install -c constraints.txt -e '.[eval]'")
    sandbox = None
    if any(chosen.benchmark.runs_code for chosen in request.benchmarks):
        sandbox = NO_SANDBOX if request.unsafe_code else check_sandbox()
    files = [_model_files(path) for path in request.models]
    held_out = None if request.shards is None else open_held_out(request.shards, request.documents)
    if held_out is not None:
        for model in files:
            held_out.check_model(model)
    languages = {} if request.cross_code_eval is None else read_languages(request.cross_code_eval)
    return Prepared(request, files, _load_benchmarks(request), held_out, languages, sandbox)


def _model_files(path: str) -> ModelFiles:
    files = read_model(model_directory(path, "MODEL", SingleProcess()), "MODEL")
    check_code(files, "MODEL", trusted=False)
    return files


def _load_benchmarks(request: Request) -> list[Any]:
    if not request.benchmarks:
        return []
    from ddk_ds.evaluation import harness  # takes seconds, and is an extra

    if request.data is not None:
        subjects = {chosen.benchmark.name: harness.subjects_of(chosen.benchmark) for chosen in request.benchmarks}
        check_files(request.data, request.benchmarks, subjects)
    return [harness.load_tasks(chosen, request.data) for chosen in request.benchmarks]


def measure(
    prepared: Prepared, show: Callable[[str], None], save: Callable[[Sequence[ModelResult]], None]
) -> list[ModelResult]:
    """Measure the models one after the other. After each result, `show` gets a line and `save` all results so far.

    Raises ConfigError if a model cannot be loaded or its window is too short for a benchmark.
    """
    results: list[ModelResult] = []
    for name, files in zip(prepared.request.models, prepared.files, strict=True):
        results.append(ModelResult(name))
        show(f"{name}: measuring")
        _measure_model(prepared, files, results[-1], show, lambda: save(results))
    return results


def _measure_model(
    prepared: Prepared, files: ModelFiles, result: ModelResult, show: Callable[[str], None], save: Callable[[], None]
) -> None:
    request = prepared.request
    on_cpu = request.device == "cpu"
    model = load_model(files.directory, torch.float32 if on_cpu else "auto").to(request.device)
    if prepared.held_out is not None:
        result.domains += score_domains(
            model, files, prepared.held_out, batch_size=request.batch_size, limit=request.limit
        )
        show(f"{len(result.domains)} domains")
        save()
    if not (prepared.loaded or prepared.languages):
        return
    from ddk_ds.evaluation import harness

    lm = harness.load_lm(model, files.directory, request.batch_size)
    harness.check_window(lm, prepared.loaded)
    for loaded in prepared.loaded:
        result.scores.append(
            harness.run_benchmark(lm, loaded, request.benchmark_limit, sandboxed=not request.unsafe_code)
        )
        show(score_line(result.scores[-1]))
        save()
    if prepared.languages:
        result.code += score_languages(lm, prepared.languages, harness.generate, limit=request.limit)
        for score in result.code:
            show(score_line(score))
        save()


def versions() -> dict[str, str]:
    """Return versions by package: this one and the installed ones that the numbers depend on, such as torch."""
    names = ("torch", "transformers", "tokenizers", "lm_eval", "datasets")
    return {"ddk_ds": VERSION, **{name: version(name) for name in names if find_spec(name) is not None}}
