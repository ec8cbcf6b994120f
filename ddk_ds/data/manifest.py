"""domains.json, the content of a prepared data directory; written last, so that it marks a complete directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ddk_ds.data.documents import Dropped
from ddk_ds.data.mds import read_index
from ddk_ds.data.store import AGAIN, LocalStore, Store
from ddk_ds.errors import DataError
from ddk_ds.files import write_text

FORMAT = 1
FILE_NAME = "domains.json"
SPLITS = ("train", "validation")
Packing = Literal["cut", "best_fit"]


@dataclass(frozen=True)
class SplitInfo:
    """Sizes of one split of one domain: `bytes` of its documents' text (UTF-8), `tokens` of them in complete samples.

    `largest_id` is the largest token id, and `cut_documents` the number of those that are not whole in one sample; both
    are -1 in data of earlier versions. `padding_tokens` fill samples up. Of adopted data `bytes` and `cut_documents`
    are -1; `documents` counts their parts in samples, -1 if the borders are not known. Of a domain of conversations,
    `target_tokens` of `tokens` are targets; -1: all are.
    """

    documents: int
    tokens: int
    samples: int
    bytes: int
    sha: str
    largest_id: int = -1
    cut_documents: int = -1
    padding_tokens: int = 0
    target_tokens: int = -1


@dataclass(frozen=True)
class DomainInfo:
    """One domain's two splits, and the counts of what the preparation dropped.

    `adopted` says which shards of another program a domain is, and how they were cut (adopt.py); {} if it was prepared.
    `contaminated` are the documents that have text of a benchmark, by its name.
    `chat` says how conversations were made tokens: the recipe's section, with the hash of the template and what it said
    of the first conversation that it refused; None for text.
    """

    train: SplitInfo
    validation: SplitInfo
    dropped: Dropped = field(default_factory=Dropped)
    adopted: dict[str, Any] = field(default_factory=dict)
    contaminated: Mapping[str, int] = field(default_factory=dict)
    chat: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """Return the hashes of both splits."""
        return f"{self.train.sha}/{self.validation.sha}"


@dataclass(frozen=True)
class Manifest:
    """A prepared data directory: `root` is its path or, if remote, its address; `domains` has the recipe's order.

    `bos` are the ids at the beginning of each document. `probe_hash` says how the tokenizer cuts text (same_cuts.py);
    "" in data of earlier versions. `borders` is True if the samples have the borders of their documents, which data of
    earlier versions lack. Samples of `packing` "best_fit" can be padded, in documents of one token each. `commits` are
    those at which data sets of a hub were read, by their addresses in the recipe. `settings` are those that the data
    depend on beside their text: seed, held-out share, duplicates and benchmarks that were left out, and so on; {} in
    adopted data and in those of earlier versions.
    """

    root: Path | str
    sequence_length: int
    dtype: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    domains: dict[str, DomainInfo]
    bos: tuple[int, ...] = ()
    probe_hash: str = ""
    borders: bool = False
    packing: Packing = "cut"
    commits: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_path: str = ""
    """Directory in which the tokenizer was, for a look at the data; what counts is the fingerprint."""

    def require(self, names: Sequence[str]) -> None:
        """Raise DataError if one of `names` is not among the domains."""
        for name in names:
            if name not in self.domains:
                raise DataError(f"{self.root} has no domain {name!r}; it has {', '.join(self.domains)}")

    def masked(self, documents: Literal["auto", "masked", "joined"], key: str) -> bool:
        """Return True if the documents of a sample are kept apart, as the option `key` asks by its value `documents`.

        Raises DataError if they are to be and the samples lack their borders, or if they are not to be and samples are
        padded: the padding would be text. That of conversations is no target, and nothing follows it in a sample.
        """
        if documents == "joined":
            text = [name for name, domain in self.domains.items() if domain.chat is None]
            self.require_no_padding(f"{key} is joined", f"set {key} to auto", text)
        if documents == "masked" and not self.borders:
            raise DataError(
                f"{key} is masked, and the shards of {self.root} have no borders of documents (an earlier version made "
                f"them): prepare the data again, or set {key} to joined"
            )
        return self.borders and documents != "joined"

    def packing_of(self, name: str) -> Packing:
        """Return how a domain's documents became samples: conversations always by best fit."""
        return self.packing if self.domains[name].chat is None else "best_fit"

    def require_no_padding(self, what: str, fix: str, names: Sequence[str]) -> None:
        """Raise DataError if samples of the domains `names` may be padded, where `what` would take padding for text.

        `fix` says what to do.
        """
        if padded := [name for name in names if self.packing_of(name) == "best_fit"]:
            raise DataError(
                f"{what}, and the samples of {', '.join(padded)} of {self.root} are padded (conversations, or ddk "
                f"prepare --packing best_fit): {fix}, or prepare text with --packing cut"
            )

    def mostly_held_out(self, names: Sequence[str]) -> list[str]:
        """Return a text for each domain of `names` that has fewer samples to train on than held-out ones."""
        domains = {name: self.domains[name] for name in names}
        return [
            f"{name} ({domain.train.samples:,} and {domain.validation.samples:,})"
            for name, domain in domains.items()
            if domain.train.samples < domain.validation.samples
        ]


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.root`/domains.json, which appears complete or not at all."""
    content = {
        "format": FORMAT,
        "sequence_length": manifest.sequence_length,
        "dtype": manifest.dtype,
        "borders": manifest.borders,
        "packing": manifest.packing,
        "commits": dict(manifest.commits),
        "settings": dict(manifest.settings),
        "tokenizer": {
            "fingerprint": manifest.tokenizer_fingerprint,
            "vocab_size": manifest.vocab_size,
            "eos_token_id": manifest.eos_token_id,
            "bos": list(manifest.bos),
            "probe_hash": manifest.probe_hash,
            "path": manifest.tokenizer_path,
        },
        "domains": {name: asdict(domain) for name, domain in manifest.domains.items()},
    }
    write_text(Path(manifest.root) / FILE_NAME, json.dumps(content, indent=1))


def load_manifest(root: str | Path | Store) -> Manifest:
    """Read domains.json and check that every domain's two splits are those that it describes.

    Check the hash of each split's index, and in a local directory also that all shards exist with their sizes. No shard
    is read.

    Raises:
        ConfigError: the limit of a remote directory's cache is too small for the shards.
        DataError: the directory is missing or half-written, domains.json is broken, a shard is missing,
            truncated or of another preparation, or a domain is empty.
    """
    store = LocalStore(root) if isinstance(root, str | Path) else root
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise DataError(f"data directory {store.root} does not exist; make it with ddk prepare")
    try:
        text = store.read(FILE_NAME, fresh=True)
    except FileNotFoundError:
        raise DataError(
            f"{store.location} has no {FILE_NAME}: it is half-written, or not made by ddk prepare; "
            "prepare the data again"
        ) from None
    manifest = _parse(store, text)
    for name, domain in manifest.domains.items():
        for split in SPLITS:
            _check_split(store, manifest, f"{name}/{split}", getattr(domain, split), targets=domain.chat is not None)
    return manifest


def _parse(store: Store, text: bytes) -> Manifest:
    path = f"{store.location}/{FILE_NAME}"
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, not {FORMAT}; prepare the data again")
        domains = {name: _domain(entry) for name, entry in content["domains"].items()}
        tokenizer = content["tokenizer"]
        return Manifest(
            root=store.root if isinstance(store, LocalStore) else store.location,
            sequence_length=int(content["sequence_length"]),
            dtype=str(content["dtype"]),
            tokenizer_fingerprint=str(tokenizer["fingerprint"]),
            vocab_size=int(tokenizer["vocab_size"]),
            eos_token_id=int(tokenizer["eos_token_id"]),
            domains=domains,
            bos=tuple(map(int, tokenizer.get("bos", ()))),
            probe_hash=str(tokenizer.get("probe_hash", "")),
            borders=bool(content.get("borders", False)),
            packing=_packing(content.get("packing", "cut")),
            commits={str(address): str(commit) for address, commit in content.get("commits", {}).items()},
            settings=dict(content.get("settings", {})),
            tokenizer_path=str(tokenizer.get("path", "")),
        )
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from None


def _packing(value: str) -> Packing:
    """Return a known way of packing. Raises ValueError for another one."""
    if value not in get_args(Packing):
        raise ValueError(f"packing {value!r}")
    return cast(Packing, value)


def _domain(entry: dict[str, Any]) -> DomainInfo:
    train, validation = (SplitInfo(**entry[split]) for split in SPLITS)
    more = {key: dict(entry.get(key, {})) for key in ("adopted", "contaminated")}
    return DomainInfo(train, validation, Dropped(**entry.get("dropped", {})), **more, chat=entry.get("chat"))


def _check_split(store: Store, manifest: Manifest, directory: str, info: SplitInfo, *, targets: bool) -> None:
    if info.samples < 1:
        name, _, split = directory.partition("/")
        raise DataError(f"domain {name!r} of {store.location} is empty: no {split} sample; prepare it with more text")
    index = read_index(store, directory)
    if index.sha != info.sha:
        index = read_index(store, directory, fresh=True)  # a cache can hold the index of an earlier preparation
    if (index.num_samples, index.sha) != (info.samples, info.sha):
        raise DataError(
            f"{store.location}/{directory} is not what {store.location}/{FILE_NAME} describes "
            f"({index.num_samples:,} samples, expected {info.samples:,} of hash {info.sha[:12]}); {AGAIN}"
        )
    index.check_format(manifest.dtype, manifest.sequence_length, borders=manifest.borders, targets=targets)
