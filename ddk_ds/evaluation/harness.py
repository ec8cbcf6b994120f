"""Benchmarks by lm-evaluation-harness, used as a library; importing this module takes seconds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import yaml
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ddk_ds.data.tokenizer import added_before
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.evaluation.results import Score
from ddk_ds.evaluation.sandbox import score_programs
from ddk_ds.evaluation.suites import SUBJECT, Benchmark, Chosen, find_files, read_rows

EXAMPLES_SEED = 1234
"""Seed that draws the examples before a question; the harness' own default."""
_HARNESS_TASKS = Path(lm_eval.tasks.__file__).parent
_OUR_TASKS = Path(__file__).with_name("tasks")
_MBPP_EXAMPLES = (2, 3, 4)
"""Ids of the tasks in MBPP's split `prompt` that its authors show before each question."""

# The harness warns of things that this module does on purpose.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Loaded:
    """A benchmark's documents and prompts, ready for any model."""

    chosen: Chosen
    tasks: Any
    """The harness' TaskDict."""
    name: str
    """Key of the benchmark's result in the harness' output."""


def load_tasks(chosen: Chosen, data: Path | None) -> Loaded:
    """Read a benchmark's documents from files below `data`, or from the hub if it is None.

    Raises DataError if they cannot be read or do not fit the task.
    """
    benchmark = chosen.benchmark
    try:
        if benchmark.runs_code:
            config = {**_code_config(benchmark), **_overrides(chosen, data, "")}
            return Loaded(chosen, TaskManager(include_defaults=False).load([config]), benchmark.task)
        manager = _manager(benchmark)
        subjects = _subjects(manager, benchmark).items()
        members = [{"task": task, **_overrides(chosen, data, subject)} for task, subject in subjects]
        # A group given as a dict would pass its own keys on to its tasks, which do not know them.
        tasks = manager.load([{"group": benchmark.name, "task": members}])["tasks"]
        averaged = [{"metric": benchmark.metric.partition(",")[0], "aggregation": "mean", "weight_by_size": True}]
        group = Group.from_config({"group": f"ddk_{benchmark.name}", "aggregate_metric_list": averaged})
        for task in tasks.values():
            group.add(task)
        return Loaded(chosen, manager.load([group]), group.name)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        source = f"below --data {data}" if data else f"of the hub's {benchmark.data.hub}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "" if data else "; on a machine without a hub give --data DIR (docs/evaluation.md)"
        raise DataError(f"{benchmark.name}: the documents {source} cannot be used: {reason}{fix}") from error


def subjects_of(benchmark: Benchmark) -> list[str]:
    """Return the subjects of a benchmark, or [""] if it has no subjects."""
    return list(_subjects(_manager(benchmark), benchmark).values())


def _manager(benchmark: Benchmark) -> TaskManager:
    # By default the harness would index some 14,000 files.
    folder = _HARNESS_TASKS / benchmark.folder if benchmark.folder else _OUR_TASKS
    return TaskManager(include_path=str(folder), include_defaults=False)


def _subjects(manager: TaskManager, benchmark: Benchmark) -> dict[str, str]:
    """Return the subject of each of a benchmark's tasks, by the harness' name of the task."""
    if SUBJECT not in benchmark.data.config:
        return {benchmark.task: ""}
    names = [name for name in manager.all_subtasks if name.startswith(benchmark.task)]
    return {name: str(manager.task_index[name].cfg["dataset_name"]) for name in names}


def _overrides(chosen: Chosen, data: Path | None, subject: str) -> dict[str, Any]:
    """Return the changes to the harness' task: number of examples, splits and, with `data`, the documents."""
    source = chosen.benchmark.data
    changes: dict[str, Any] = {
        "num_fewshot": chosen.shots,
        "test_split": source.split,
        "validation_split": None,
        "training_split": None,
        # Without examples, the data need not have their split.
        "fewshot_split": source.examples if chosen.shots else None,
    }
    if data is not None:
        files = find_files(data, chosen, subject)
        assert files is not None, "check_files has found them"
        changes |= {"dataset_path": str(data), "dataset_name": None, "custom_dataset": _read_splits}
        changes["dataset_kwargs"] = {"files": {split: [str(path) for path in paths] for split, paths in files.items()}}
    return changes


def _read_splits(*, files: Mapping[str, Sequence[str]], **_metadata: Any) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(list(read_rows([*map(Path, paths)]))) for split, paths in files.items()}


class _Names(yaml.SafeLoader):
    """A YAML loader that reads the harness' task files without running the functions that they name."""


_Names.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def _code_config(benchmark: Benchmark) -> dict[str, Any]:
    """Return the harness' task with its prompt and stops, but without its scoring, which runs code unprotected."""
    path = _HARNESS_TASKS / benchmark.folder / f"{benchmark.task}.yaml"
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _Names)
    config |= {"unsafe_code": False, "filter_list": None, "fewshot_config": None}
    config["metric_list"] = [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]
    if benchmark.name == "mbpp":
        config["fewshot_config"] = {"sampler": "first_n", "process_docs": _mbpp_examples}
    return config


def _mbpp_examples(documents: Any) -> list[dict[str, Any]]:
    # The template shows the solution of a document only if it has this column.
    return [{**doc, "is_fewshot": True} for doc in documents if doc["task_id"] in _MBPP_EXAMPLES]


def load_lm(model: Any, directory: Path, batch_size: int) -> HFLM:
    """Wrap a transformers model, which is on its device, into the harness' adapter.

    Prompts begin as the documents of prepared data do: with the tokenizer's BOS if it puts one before a text.
    """
    lm = HFLM(pretrained=model, tokenizer=str(directory), batch_size=batch_size)
    lm.add_bos_token = bool(added_before(lm.tokenizer.encode))
    return lm


def check_window(lm: HFLM, benchmarks: Sequence[Loaded]) -> None:
    """Raise ConfigError if an answer can be as long as the model's context window."""
    for loaded in benchmarks:
        for task in loaded.tasks["tasks"].values():
            longest = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
            if longest >= lm.max_length:
                name = loaded.chosen.benchmark.name
                raise ConfigError(
                    f"{name}: its answers have up to {longest} tokens, the model's window has {lm.max_length}: "
                    "leave it out by --tasks"
                )


def generate(lm: LM, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Generate greedy answers to prompts, up to the end-of-text token or `max_tokens` tokens."""
    options = {"until": [], "max_gen_toks": max_tokens, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, dict(options)), index) for index, prompt in enumerate(prompts)]
    answers: list[str] = lm.generate_until(requests)
    return answers


def run_benchmark(lm: LM, loaded: Loaded, limit: int | None, *, sandboxed: bool = True) -> Score:
    """Ask a model all questions of a benchmark, or the first `limit` of each subject, and return its score.

    Generated programs run outside of the sandbox if `sandboxed` is False.
    """
    benchmark, shots = loaded.chosen.benchmark, loaded.chosen.shots
    for task in loaded.tasks["tasks"].values():
        task.set_fewshot_seed(EXAMPLES_SEED)  # set for each model, since drawing changes the generator's state
    output = evaluate(
        lm,
        loaded.tasks,
        limit=limit,
        # Means have standard errors without bootstrapping.
        bootstrap_iters=1,
        log_samples=benchmark.runs_code,
    )
    if benchmark.runs_code:
        samples = output["samples"][loaded.name]
        answers = [(sample["doc"], sample["filtered_resps"][0]) for sample in samples]
        return score_programs(benchmark, shots, answers, sandboxed=sandboxed)
    results = output["results"]
    result = results[loaded.name]
    documents = result["sample_len"]
    if len(loaded.tasks["tasks"]) == 1:
        result = next(results[name] for name in loaded.tasks["tasks"])
    numbers = {key: float(value) for key, value in result.items() if "," in key and isinstance(value, int | float)}
    stderr = benchmark.metric.replace(",", "_stderr,")
    return Score(
        task=benchmark.name,
        title=benchmark.title,
        metric=benchmark.metric,
        shots=shots,
        value=numbers[benchmark.metric],
        stderr=numbers.get(stderr),
        documents=documents,
        more={key: value for key, value in numbers.items() if key not in (benchmark.metric, stderr)},
    )
