"""Text to prepared data in parts, on many machines: what `prepare` makes, byte for byte, by tasks of an engine.

Three passes over the blocks of the recipe (blocks.py), each a stage of tasks: the keys of all texts, the tokens of
those that are taken, and the shards. Between them this process joins what they counted; it reads no token. All machines
share the disk with `.<out>.partial`, where a finished block is never done again, by any number of parts or any engine.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.block_keys import KeysStage, Taken, take_documents
from ddk_ds.data.block_shards import ShardGroup, ShardsStage, SplitText, group_shards, join_groups
from ddk_ds.data.block_tokens import TokensStage, sum_dropped, tokens_stem
from ddk_ds.data.blocks import BLOCK_BYTES, Block, PartsJob, Stage, deal, missing, plan_blocks
from ddk_ds.data.documents import Dropped, check_first_texts
from ddk_ds.data.engines import Engine, StageTask
from ddk_ds.data.manifest import SPLITS, DomainInfo, Manifest, load_manifest, write_manifest
from ddk_ds.data.mds import token_dtype
from ddk_ds.data.prepare import (
    SHARD_BYTES,
    Plan,
    bos_ids,
    choose_held_out,
    describe_split,
    files_to_read,
    make_manifest,
    plan_settings,
    refuse_existing,
    tokenizer_with_eos,
)
from ddk_ds.data.reading import Progress
from ddk_ds.data.recipe import Recipe
from ddk_ds.data.spooled import Spooled
from ddk_ds.data.workdir import open_work
from ddk_ds.errors import DataError

STAGES = ("keys", "tokens", "shards")
ATTEMPTS = 3
_WATCH_SECONDS = 2.0


def prepare_in_parts(
    recipe: Recipe,
    tokenizer: Path,
    out: Path,
    plan: Plan,
    engine: Engine,
    parts: int,
    *,
    progress: Progress = lambda _stage, _done, _total: None,
    start_anew: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """Prepare all domains of `recipe` into the new directory `out` by tasks of `engine`, and return the manifest.

    The files are those of `prepare`, for any engine, number of parts and machines, and after any kill.

    Args:
        tokenizer, out: on a disk that all machines share, at the same path.
        parts: number of tasks of each stage.
        progress: called with a stage's name, and the bytes that are done and that there are.
        block_bytes: stored bytes of a block, the least that a killed task repeats.

    Raises:
        ConfigError, DataError: as `prepare` raises, and if a part ended ATTEMPTS times without its results.
    """
    _refuse_one_process(recipe, plan)
    tokenizer, out = tokenizer.absolute(), out.absolute()
    refuse_existing(out)
    info = tokenizer_with_eos(tokenizer)
    bos = bos_ids(recipe, info)
    with open_work(out.parent / f".{out.name}.partial", start_anew=start_anew) as work:
        refuse_existing(out)
        settings = plan_settings(recipe, info, bos, plan)
        work.claim({**settings, "in_parts": True})
        files = files_to_read(recipe, work)
        work.claim_files(recipe.domains, files)
        for of_domain in files.values():
            check_first_texts(of_domain)
        job = PartsJob(
            work.path, recipe, files, tokenizer, bos, token_dtype(info.vocab_size), plan.sequence_length, plan.seed
        )
        run = _Runner(job, engine, parts, progress)
        blocks, taken = _taken_blocks(run, plan_blocks(files, block_bytes))
        run.stage(TokensStage(job, blocks, taken))
        domains = _write_domains(run, blocks, plan)
        write_manifest(make_manifest(work.data, info, bos, plan, domains, files, settings))
        work.data.rename(out)
    shutil.rmtree(work.path)
    return load_manifest(out)


def _refuse_one_process(recipe: Recipe, plan: Plan) -> None:
    """Raise DataError for what one process alone can do."""
    if plan.packing != "cut":
        raise DataError(
            f"--packing {plan.packing} packs by documents of a window, in one process: leave out --engine, or give "
            "--packing cut"
        )
    if recipe.dedup == "minhash" or recipe.decontaminate is not None:
        raise DataError(
            "dedup: minhash, which compares each document with all before it, and decontaminate work in one process: "
            "leave out --engine, or give dedup=exact decontaminate=null"
        )
    if chats := [name for name, domain in recipe.domains.items() if domain.chat is not None]:
        raise DataError(
            f"the conversations of {', '.join(chats)} are packed by best fit, in one process: leave out --engine, or "
            "prepare them apart from the text"
        )


class _Runner:
    """Runs stages until all of their results are there."""

    def __init__(self, job: PartsJob, engine: Engine, parts: int, progress: Progress) -> None:
        self.job = job
        self._engine, self._parts, self._progress = engine, parts, progress

    def stage(self, stage: Stage) -> None:
        """Run the parts of a stage that lack results, again where tasks failed.

        Raises DataError if a task says what a user can mend, or if tasks failed ATTEMPTS times without a new result.
        """
        logs = self.job.root / "logs" / stage.name
        task = StageTask(stage, logs / "errors")
        dealt = deal(stage.weights, min(self._parts, len(stage.weights)))
        failures, most = 0, len(stage.weights)
        while left := self._left(stage, dealt, logs):
            shutil.rmtree(task.errors, ignore_errors=True)
            with self._watched(stage):
                self._engine.run(task, logs, len(dealt))
            for error in sorted(task.errors.glob("*")):
                raise DataError(error.read_text(encoding="utf-8"))
            now = len(missing(stage, range(len(stage.weights))))
            failures, most = (0, now) if now < most else (failures + 1, most)
            if failures == ATTEMPTS:
                raise DataError(
                    f"{len(left)} of {len(dealt)} parts of the pass of {stage.name} ended {ATTEMPTS} times without a "
                    f"result: {logs / 'logs'}/task_{left[0]:05}.log is the first one's log; the same command goes on"
                )

    def _left(self, stage: Stage, dealt: Sequence[Sequence[int]], logs: Path) -> list[int]:
        """Return the parts that lack results, and make the marks of completion say so."""
        marks = logs / "completions"
        marks.mkdir(parents=True, exist_ok=True)
        open_units = set(missing(stage, range(len(stage.weights))))
        left = [part for part, units in enumerate(dealt) if not open_units.isdisjoint(units)]
        for part in range(len(dealt)):
            mark = marks / f"{part:05}"
            if part in left:
                mark.unlink(missing_ok=True)
            else:
                mark.touch()
        return left

    @contextmanager
    def _watched(self, stage: Stage) -> Iterator[None]:
        """Report the progress of a stage while the block runs."""
        end = threading.Event()

        def watch() -> None:
            left = list(range(len(stage.weights)))
            total = max(sum(stage.weights), 1)
            while True:
                left = missing(stage, left)
                self._progress(stage.name, total - sum(stage.weights[unit] for unit in left), total)
                if end.wait(_WATCH_SECONDS):
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


def _taken_blocks(run: _Runner, blocks: Sequence[Block]) -> tuple[list[Block], dict[int, Taken]]:
    """Return the blocks that are tokenised, and what is known of them.

    Of a domain with max_bytes the first blocks are looked at, as many as have that many stored bytes, then twice as
    many, until they are enough.
    """
    of_domain = {name: [block for block in blocks if block.domain == name] for name in run.job.recipe.domains}
    wanted = {}
    for name, domain in run.job.recipe.domains.items():
        ends = np.cumsum([block.num_bytes for block in of_domain[name]])
        wanted[name] = len(ends) if domain.max_bytes is None else int(np.searchsorted(ends, domain.max_bytes)) + 1
    while True:
        looked_at = [block for name, own in of_domain.items() for block in own[: wanted[name]]]
        run.stage(KeysStage(run.job, looked_at))
        taken, short = take_documents(run.job, looked_at)
        more = [name for name in short if wanted[name] < len(of_domain[name])]
        if not more:
            return [block for block in looked_at if block.number in taken], taken
        for name in more:
            wanted[name] *= 2


def _write_domains(run: _Runner, blocks: Sequence[Block], plan: Plan) -> dict[str, DomainInfo]:
    """Choose the held-out documents, write the shards of all domains and their indexes."""
    job = run.job
    texts: dict[str, tuple[list[SplitText], npt.NDArray[np.int64], Dropped]] = {}
    groups: dict[str, list[ShardGroup]] = {}
    for name in job.recipe.domains:
        own = [block for block in blocks if block.domain == name]
        spooled, dropped = Spooled([tokens_stem(job, block) for block in own], job.dtype), sum_dropped(job, own)
        held_out, totals = choose_held_out(name, spooled, plan, len(job.files[name]), dropped)
        splits = []
        for side in SPLITS:
            validation = side == "validation"
            starts = spooled.starts(held_out, validation=validation)
            splits.append(SplitText(f"{name}/{side}", spooled, held_out, validation, starts))
            groups[splits[-1].directory] = group_shards(splits[-1], plan.sequence_length, SHARD_BYTES)
        texts[name] = splits, totals, dropped
    run.stage(ShardsStage(job, [group for of_split in groups.values() for group in of_split], SHARD_BYTES))
    domains = {}
    for name, (splits, totals, dropped) in texts.items():
        infos = []
        for split in splits:
            written = join_groups(job, groups[split.directory])
            info, tail_tokens = describe_split(
                split.spooled, split.held_out, totals, written, plan, plan.packing, validation=split.validation
            )
            dropped.tail_tokens += tail_tokens
            infos.append(info)
        domains[name] = DomainInfo(infos[0], infos[1], dropped)
    return domains
