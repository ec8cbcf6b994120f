"""Text to prepared data: every domain of a recipe is read, encoded, split and packed into MDS shards.

A domain's ids go through a spool file, so that memory holds digests and lengths only (about 150 bytes a
document); the split is decided when all are known.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.documents import Document, Dropped, read_documents
from ddk_ds.data.encode import BatchEncoder, Encoded, batch_encoder
from ddk_ds.data.manifest import FILE_NAME, DomainInfo, Manifest, SplitInfo, load_manifest, write_manifest
from ddk_ds.data.mds import token_dtype, write_split
from ddk_ds.data.packing import Ids, choose_validation, pack
from ddk_ds.data.recipe import Domain, Recipe, SourceFile, list_files
from ddk_ds.data.tokenizer import TokenizerInfo, load_tokenizer
from ddk_ds.errors import DataError

_BATCH_BYTES = 1 << 19
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Plan:
    """What to make of a recipe's text.

    Exactly one of `validation_samples` (held-out samples that each domain has at least) and
    `validation_fraction` (share of the documents) is given. `seed` decides which documents are held out.
    """

    sequence_length: int
    validation_samples: int | None = None
    validation_fraction: float | None = None
    workers: int = 1
    seed: int = 0

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
    progress: Progress = lambda _domain, _bytes: None,
) -> Manifest:
    """Prepare all domains of `recipe` into the new directory `out`; the same for any number of workers.

    Everything is written to a sibling `.<out>.partial-<pid>`, domains.json last, and renamed at the end.

    Args:
        tokenizer: directory of the tokenizer, which must name an EOS token.
        progress: called with a domain's name and the bytes of text just encoded.

    Raises:
        DataError: `out` exists, the tokenizer has no EOS, text cannot be read, or a domain has too little.
    """
    _refuse_existing(out)
    info = load_tokenizer(tokenizer)
    if info.eos_token_id is None:
        raise DataError(f"{tokenizer} names no EOS token to join documents; set it in tokenizer_config.json")
    files = list_files(recipe)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        seen: set[bytes] = set()
        domains = {}
        with batch_encoder(tokenizer, token_dtype(info.vocab_size), plan.workers) as encode:
            for name, domain in recipe.domains.items():
                source = _DomainText(name, domain, files[name], seen, plan.seed, progress)
                domains[name] = _prepare_domain(source, partial, encode, info, plan)
        write_manifest(_manifest(partial, info, plan, domains))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # made by this process; a killed one's keeps its name
        raise
    return load_manifest(out)


def _refuse_existing(out: Path) -> None:
    if (out / FILE_NAME).exists():
        raise DataError(f"{out} already holds prepared data; choose another directory or delete it first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty directory; choose another directory")


def _manifest(root: Path, info: TokenizerInfo, plan: Plan, domains: dict[str, DomainInfo]) -> Manifest:
    assert info.eos_token_id is not None, "checked before"
    return Manifest(
        root=root,
        sequence_length=plan.sequence_length,
        dtype=token_dtype(info.vocab_size),
        tokenizer_fingerprint=info.fingerprint,
        vocab_size=info.vocab_size,
        eos_token_id=info.eos_token_id,
        domains=domains,
    )


@dataclass
class _DomainText:
    """A domain's documents in batches, and the account of what was read."""

    name: str
    domain: Domain
    files: Sequence[SourceFile]
    seen: set[bytes]
    seed: int
    progress: Progress
    dropped: Dropped = field(default_factory=Dropped)
    digests: bytearray = field(default_factory=bytearray)
    num_bytes: array[int] = field(default_factory=lambda: array("q"))

    def batches(self) -> Iterator[list[str]]:
        """Lists of texts of about _BATCH_BYTES; grows the account."""
        batch: list[str] = []
        batch_bytes = 0
        for document in self._documents():
            self.digests.extend(document.digest)
            self.num_bytes.append(document.num_bytes)
            batch.append(document.text)
            batch_bytes += document.num_bytes
            if batch_bytes >= _BATCH_BYTES:
                yield batch
                self.progress(self.name, batch_bytes)
                batch, batch_bytes = [], 0
        if batch:
            yield batch
            self.progress(self.name, batch_bytes)

    def _documents(self) -> Iterator[Document]:
        return read_documents(self.domain, self.files, seed=self.seed, seen=self.seen, dropped=self.dropped)


def _prepare_domain(
    source: _DomainText, root: Path, encode: BatchEncoder, info: TokenizerInfo, plan: Plan
) -> DomainInfo:
    spool_path = root / f"{source.name}.spool"
    dtype = token_dtype(info.vocab_size)
    lengths = _spool(spool_path, encode(source.batches()))
    if not len(lengths):
        raise DataError(
            f"domain {source.name!r} is empty: no document is left of {len(source.files)} files "
            f"({_counts(source.dropped)}); check its sources, text_field and min_chars in the recipe"
        )
    # The first 8 of a digest's 16 bytes: enough to rank by.
    keys = np.frombuffer(bytes(source.digests), ">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
    min_tokens = None if plan.validation_samples is None else plan.validation_samples * plan.sequence_length
    held_out = choose_validation(keys, lengths, min_tokens=min_tokens, fraction=plan.validation_fraction)
    _check_enough(source.name, lengths, held_out, plan)
    tokens = np.memmap(spool_path, dtype, mode="r")
    splits = {}
    for split, chosen in (("train", ~held_out), ("validation", held_out)):
        samples = pack(_chosen(tokens, lengths, chosen), plan.sequence_length)
        directory = root / source.name / split
        written = write_split(directory, samples, sequence_length=plan.sequence_length, dtype=dtype)
        packed_tokens = written["samples"] * plan.sequence_length
        source.dropped.tail_tokens += int(lengths[chosen].sum()) - packed_tokens
        splits[split] = SplitInfo(
            documents=int(chosen.sum()),
            tokens=packed_tokens,
            bytes=int(np.array(source.num_bytes, np.int64)[chosen].sum()),
            **written,
        )
    spool_path.unlink()
    return DomainInfo(splits["train"], splits["validation"], source.dropped)


def _spool(path: Path, encoded: Iterable[Encoded]) -> npt.NDArray[np.int64]:
    """Append all ids to a file; returns the number of ids of each document (documents,)."""
    lengths = [np.zeros(0, np.int64)]
    with path.open("wb") as stream:
        for tokens, batch_lengths in encoded:
            tokens.tofile(stream)
            lengths.append(batch_lengths)
    return np.concatenate(lengths)


def _chosen(tokens: Ids, lengths: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]) -> Iterator[Ids]:
    """The ids of each chosen document, in the order of the spool."""
    ends = np.cumsum(lengths)
    for document in np.flatnonzero(chosen):
        yield tokens[ends[document] - lengths[document] : ends[document]]


def _check_enough(name: str, lengths: npt.NDArray[np.int64], held_out: npt.NDArray[np.bool_], plan: Plan) -> None:
    train = int(lengths[~held_out].sum()) // plan.sequence_length
    validation = int(lengths[held_out].sum()) // plan.sequence_length
    wanted = plan.validation_samples or 1
    if train < 1 or validation < wanted:
        raise DataError(
            f"domain {name!r} has too little text: {len(lengths):,} documents make {validation:,} validation "
            f"and {train:,} training samples of {plan.sequence_length:,} tokens; "
            f"{wanted:,} and 1 are needed: add text, hold out "
            f"{'fewer samples' if plan.validation_samples else 'another fraction'}, or shorten the sequence"
        )


def _counts(dropped: Dropped) -> str:
    return ", ".join(f"{name} {count}" for name, count in asdict(dropped).items())
