"""Text to prepared data: every domain of a recipe is read, encoded, split and packed into MDS shards.

A directory next to the output, `.<out>.partial`, holds the unfinished preparation, and its data are renamed to the
output at the end. After a kill or a full disk the same command continues there. Memory holds a few batches of text and
the keys of the held-out documents.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_ds.data.best_fit import pack_best_fit
from ddk_ds.data.chat_encoding import ChatStyle, as_recorded, chat_style
from ddk_ds.data.contamination import Contamination
from ddk_ds.data.documents import Dropped, check_first_texts
from ddk_ds.data.encoding import BatchEncoder, batch_encoder
from ddk_ds.data.held_out import HeldOut, choose_validation
from ddk_ds.data.long_documents import DocumentCutter
from ddk_ds.data.manifest import FILE_NAME, DomainInfo, Manifest, Packing, SplitInfo, load_manifest, write_manifest
from ddk_ds.data.mds import Ids, Lengths, Targets, pack, pack_lengths, token_dtype, write_split
from ddk_ds.data.near_duplicates import NearKeys
from ddk_ds.data.reading import DomainText, Progress, Spool
from ddk_ds.data.recipe import Recipe, SourceFile, list_files
from ddk_ds.data.same_cuts import probe_hash
from ddk_ds.data.screening import Screening
from ddk_ds.data.spooled import Spooled
from ddk_ds.data.tokenizer import TokenizerInfo, load_tokenizer
from ddk_ds.data.workdir import Reading, WorkDir, open_work
from ddk_ds.errors import ConfigError, DataError

# MDSWriter holds about three times a shard in memory.
SHARD_BYTES = 1 << 25


@dataclass(frozen=True)
class Plan:
    """Options of a preparation.

    Exactly one of `validation_samples` (least number of held-out samples of each domain) and
    `validation_fraction` (share of the documents) is given. `seed` decides which documents are held out.
    """

    sequence_length: int
    validation_samples: int | None = None
    validation_fraction: float | None = None
    workers: int = 1
    seed: int = 0
    packing: Packing = "cut"
    """How documents become samples: joined and cut at each sample's end, or by best fit (best_fit.py).

    Conversations are always packed by best fit."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("sequence length", self.sequence_length, 1),
            ("number of validation samples", self.validation_samples, 1),
            ("number of workers", self.workers, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise DataError(f"the {name} is {value}; give {least} or more")
        if (self.validation_samples is None) == (self.validation_fraction is None):
            raise DataError("give either a number of validation samples or a validation fraction")
        if self.validation_fraction is not None and not 0.0 < self.validation_fraction < 1.0:
            raise DataError(f"the validation fraction is {self.validation_fraction}; give a number between 0 and 1")


def prepare(
    recipe: Recipe,
    tokenizer: Path,
    out: Path,
    plan: Plan,
    *,
    progress: Progress = lambda _domain, _done, _total: None,
    start_anew: bool = False,
    contamination: Contamination | None = None,
) -> Manifest:
    """Prepare all domains of `recipe` into the new directory `out`, and return its manifest.

    The files are the same for any number of workers, and also if the preparation was killed and continued.

    Args:
        tokenizer: directory of the tokenizer, which must name an EOS token.
        progress: called after every batch with the amounts that `Progress` describes.
        start_anew: delete what an earlier call left unfinished.
        contamination: finds the benchmarks that the recipe keeps out (`decontaminate`).

    Raises:
        DataError: `out` exists, the tokenizer has no EOS, a chat template does not fit, text cannot be read, a domain
            has too little, the disk is full, another process prepares the same directory, or the unfinished
            preparation has another recipe, tokenizer, template or plan.
    """
    refuse_existing(out)
    info = tokenizer_with_eos(tokenizer)
    bos = bos_ids(recipe, info)
    styles = _styles(recipe, info, bos, plan)
    screening = Screening(NearKeys(recipe.minhash) if recipe.dedup == "minhash" else None, contamination)
    if (recipe.decontaminate is None) != (contamination is None):
        raise ConfigError(f"decontaminate is {recipe.decontaminate!r}: give the texts of its benchmarks beside it")
    with open_work(out.parent / f".{out.name}.partial", start_anew=start_anew) as work:
        refuse_existing(out)  # another process may have finished it in between
        settings = plan_settings(recipe, info, bos, plan, contamination, styles)
        work.claim(settings)
        files = files_to_read(recipe, work)
        work.check_domains(recipe.domains, files)
        for name in recipe.domains:
            if work.result(name) is None:
                check_first_texts(files[name])
        domains = {}
        cutter = DocumentCutter(info.text.tokenizer)
        with batch_encoder(info, token_dtype(info.vocab_size), bos, plan.workers, screening) as encode:
            for number, (name, domain) in enumerate(recipe.domains.items()):
                text = DomainText(
                    name, number, domain, files[name], plan.seed, cutter, bool(screening), styles.get(name)
                )
                domains[name] = _prepare_domain(text, work, encode, info, plan, progress)
        write_manifest(make_manifest(work.data, info, bos, plan, domains, files, settings))
        work.data.rename(out)
    shutil.rmtree(work.path)
    return load_manifest(out)


def refuse_existing(out: Path) -> None:
    """Raise DataError unless `out` is missing, or an empty directory."""
    if (out / FILE_NAME).exists():
        raise DataError(f"{out} already holds prepared data; choose another directory or delete it first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty directory; choose another directory")


def files_to_read(recipe: Recipe, work: WorkDir) -> dict[str, list[SourceFile]]:
    """Return the files of every domain, those of a hub at the commits with which the preparation began."""
    commits = work.commits()
    files = list_files(recipe, commits)
    work.keep_commits(commits)
    return files


def tokenizer_with_eos(directory: Path) -> TokenizerInfo:
    """Return the tokenizer of a directory. Raises DataError if it names no EOS token."""
    info = load_tokenizer(directory)
    if info.eos_token_id is None:
        raise DataError(f"{directory} names no EOS token to join documents; set it in tokenizer_config.json")
    return info


def bos_ids(recipe: Recipe, info: TokenizerInfo) -> tuple[int, ...]:
    """Return the ids that the recipe puts before each document."""
    add = recipe.tokenizer.add_bos
    if add is True and not info.bos:
        if info.bos_token is None:
            raise DataError(f"tokenizer.add_bos is true, and {info.path.parent} names no BOS token: give auto or false")
        return (info.vocab[info.bos_token],)
    return info.bos if add else ()


def _styles(recipe: Recipe, info: TokenizerInfo, bos: tuple[int, ...], plan: Plan) -> dict[str, ChatStyle]:
    """Return how the conversations of each domain that holds some become tokens. Raises DataError naming the domain."""
    begin = bos if recipe.tokenizer.add_bos is True else ()
    styles = {}
    for name, domain in recipe.domains.items():
        if domain.chat is not None:
            try:
                styles[name] = chat_style(domain.chat, info, plan.sequence_length, begin)
            except DataError as error:
                raise DataError(f"domain {name!r}: {error}") from None
    return styles


def plan_settings(
    recipe: Recipe,
    info: TokenizerInfo,
    bos: tuple[int, ...],
    plan: Plan,
    contamination: Contamination | None = None,
    styles: Mapping[str, ChatStyle] = {},
) -> dict[str, Any]:
    """Return the settings that all prepared data depend on. A preparation can continue only with the same settings."""
    templates = {name: style.sha256 for name, style in styles.items()}
    return {
        **({"templates": templates} if templates else {}),
        "tokenizer": hashlib.sha256(info.path.read_bytes()).hexdigest(),
        "bos": bos,
        "eos_token_id": info.eos_token_id,
        "sequence_length": plan.sequence_length,
        "validation_samples": plan.validation_samples,
        "validation_fraction": plan.validation_fraction,
        "seed": plan.seed,
        "packing": plan.packing,
        "dedup": recipe.minhash.model_dump() if recipe.dedup == "minhash" else "exact",
        "decontaminate": contamination and contamination.fingerprint,
    }


def make_manifest(
    root: Path,
    info: TokenizerInfo,
    bos: tuple[int, ...],
    plan: Plan,
    domains: dict[str, DomainInfo],
    files: dict[str, list[SourceFile]],
    settings: dict[str, Any],
) -> Manifest:
    """Return the manifest of data at `root` that were prepared from `files` with the settings of `plan_settings`."""
    assert info.eos_token_id is not None, "checked before"
    return Manifest(
        root=root,
        sequence_length=plan.sequence_length,
        dtype=token_dtype(info.vocab_size),
        tokenizer_fingerprint=info.fingerprint,
        vocab_size=info.vocab_size,
        eos_token_id=info.eos_token_id,
        bos=bos,
        probe_hash=probe_hash(info),
        borders=True,
        packing=plan.packing,
        tokenizer_path=str(info.path.parent.absolute()),
        domains=domains,
        commits={file.shard.address: file.shard.commit for found in files.values() for file in found if file.shard},
        settings=settings,
    )


def _prepare_domain(
    text: DomainText, work: WorkDir, encode: BatchEncoder, info: TokenizerInfo, plan: Plan, progress: Progress
) -> DomainInfo:
    finished = work.result(text.name)
    if finished is not None:
        progress(text.name, max(text.disk_bytes, 1), max(text.disk_bytes, 1))
        train, held_out = (SplitInfo(**finished[split]) for split in ("train", "validation"))
        more = {key: finished[key] for key in ("contaminated", "chat")}
        return DomainInfo(train, held_out, Dropped(**finished["dropped"]), **more)
    spool, reading = text.spool(work, token_dtype(info.vocab_size), encode, progress)
    try:
        domain = _pack_domain(text, spool, reading, work.data / text.name, plan, info)
    finally:
        spool.close()
    work.finish(text.name, asdict(domain))
    spool.remove()
    return domain


def _pack_domain(
    text: DomainText, spool: Spool, reading: Reading, directory: Path, plan: Plan, info: TokenizerInfo
) -> DomainInfo:
    """Choose the held-out documents and write both splits."""
    counts = {"control_tokens": reading.control_tokens, "near_duplicates": reading.near_duplicates}
    dropped = replace(reading.dropped, **counts, **reading.conversations)
    held_out, totals = choose_held_out(text.name, spool, plan, len(text.files), dropped, reading.refusal)
    shutil.rmtree(directory, ignore_errors=True)  # of a preparation that was killed here
    packing = plan.packing if text.style is None else "best_fit"
    splits = []
    for validation, split in enumerate(("train", "validation")):
        ids, side = spool.ids(held_out, validation=bool(validation)), bool(validation)
        samples, of_samples = _samples(ids, spool.lengths(held_out, validation=side), packing, plan, info)
        masks: Iterator[Targets] | None = None
        if text.style is not None:  # packed as the ids are, and padding is no target
            packed = pack_best_fit(
                spool.targets(held_out, validation=side),
                spool.lengths(held_out, validation=side),
                plan.sequence_length,
                padding=0,
            )
            masks = (sample.tokens.view(np.bool_) for sample in packed)
        written = write_split(
            directory / split,
            samples,
            sequence_length=plan.sequence_length,
            dtype=spool.dtype,
            shard_bytes=SHARD_BYTES,
            lengths=of_samples,
            targets=masks,
        )
        split_info, tail_tokens = describe_split(spool, held_out, totals, written, plan, packing, validation=side)
        dropped.tail_tokens += tail_tokens
        splits.append(split_info)
    chat = text.domain.chat
    recorded = None if chat is None or text.style is None else as_recorded(chat, text.style, reading.refusal)
    return DomainInfo(splits[0], splits[1], dropped, contaminated=reading.contaminated, chat=recorded)


def choose_held_out(
    name: str, spooled: Spooled, plan: Plan, num_files: int, dropped: Dropped, refusal: str = ""
) -> tuple[HeldOut, npt.NDArray[np.int64]]:
    """Choose the held-out documents of a domain; also return the counts (2, 3) of both splits, as `_totals` does.

    Raises DataError if there is too little text for both splits; `refusal` is what a chat template said.
    """
    held_out = choose_validation(
        ((chunk["key"], chunk["tokens"]) for _, chunk in spooled.records()),
        min_tokens=None if plan.validation_samples is None else plan.validation_samples * plan.sequence_length,
        fraction=plan.validation_fraction,
    )
    totals = _totals(spooled, held_out)
    if not totals[:, 0].sum():
        said = f"; the chat template said {refusal!r}" if refusal else ""
        raise DataError(
            f"domain {name!r} is empty: no document is left of {num_files} files "
            f"({_counts(dropped)}{said}); check its sources, text_field and min_chars, or its chat, in the recipe"
        )
    _check_enough(name, totals, plan)
    return held_out, totals


def describe_split(
    spooled: Spooled,
    held_out: HeldOut,
    totals: npt.NDArray[np.int64],
    written: dict[str, Any],
    plan: Plan,
    packing: Packing,
    *,
    validation: bool,
) -> tuple[SplitInfo, int]:
    """Return the sizes of a split whose shards are `written` (as `write_split` says), and the tokens of its tail."""
    documents, num_bytes, tokens = totals[int(validation)].tolist()
    places = written["samples"] * plan.sequence_length
    tail, padding = max(tokens - places, 0), max(places - tokens, 0)
    more = {"padding_tokens": padding, "cut_documents": _cut(spooled, held_out, plan, packing, validation=validation)}
    return SplitInfo(documents=documents, tokens=tokens - tail, bytes=num_bytes, **more, **written), tail


def _samples(
    ids: Iterator[Ids], lengths: Iterator[Lengths], packing: Packing, plan: Plan, info: TokenizerInfo
) -> tuple[Iterator[Ids], Iterator[Lengths]]:
    """Return the samples of a split, and the lengths of the documents in each, to be read in turn."""
    if packing == "cut":
        return pack(ids, plan.sequence_length), pack_lengths(lengths, plan.sequence_length)
    assert info.eos_token_id is not None, "checked before"
    first, second = tee(pack_best_fit(ids, lengths, plan.sequence_length, info.eos_token_id))
    return (sample.tokens for sample in first), (sample.lengths for sample in second if sample.lengths is not None)


def _cut(spooled: Spooled, held_out: HeldOut, plan: Plan, packing: Packing, *, validation: bool) -> int:
    """Return the number of documents of a split that are in several samples, or partly in none."""
    cut, begin = 0, 0
    for lengths in spooled.lengths(held_out, validation=validation):
        if packing == "best_fit":
            cut += int((lengths > plan.sequence_length).sum())
            continue
        ends = begin + np.cumsum(lengths)
        cut += int(((ends - lengths) // plan.sequence_length != (ends - 1) // plan.sequence_length).sum())
        begin = int(ends[-1]) if len(ends) else begin
    return cut


def _totals(spooled: Spooled, held_out: HeldOut) -> npt.NDArray[np.int64]:
    """Return counts (2, 3): rows for the training and validation split; columns documents, bytes of text, tokens."""
    totals = np.zeros((2, 3), np.int64)
    for first, chunk in spooled.records():
        mask = held_out.mask(chunk["key"], first)
        for validation in (0, 1):
            chosen = chunk[mask == bool(validation)]
            totals[validation] += len(chosen), chosen["bytes"].sum(), chosen["tokens"].sum()
    return totals


def _check_enough(name: str, totals: npt.NDArray[np.int64], plan: Plan) -> None:
    train, validation = (totals[:, 2] // plan.sequence_length).tolist()
    wanted = plan.validation_samples or 1
    if train < 1 or validation < wanted:
        raise DataError(
            f"domain {name!r} has too little text: {totals[:, 0].sum():,} documents make {validation:,} validation "
            f"and {train:,} training samples of {plan.sequence_length:,} tokens; "
            f"{wanted:,} and 1 are needed: add text, hold out "
            f"{'fewer samples' if plan.validation_samples else 'another fraction'}, or shorten the sequence"
        )


def _counts(dropped: Dropped) -> str:
    return ", ".join(f"{name} {count}" for name, count in asdict(dropped).items())
