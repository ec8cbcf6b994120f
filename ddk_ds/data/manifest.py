"""domains.json: what a prepared data directory holds. Written last, so that it marks a complete directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddk_ds.data.documents import Dropped
from ddk_ds.data.mds import AGAIN, read_index
from ddk_ds.errors import DataError
from ddk_ds.files import write_text

FORMAT = 1
FILE_NAME = "domains.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class SplitInfo:
    """One split of one domain: `bytes` of its documents' text (UTF-8), `tokens` in whole samples."""

    documents: int
    tokens: int
    samples: int
    bytes: int
    sha: str


@dataclass(frozen=True)
class DomainInfo:
    """One domain's two splits, and what the preparation dropped."""

    train: SplitInfo
    validation: SplitInfo
    dropped: Dropped = field(default_factory=Dropped)


@dataclass(frozen=True)
class Manifest:
    """A prepared data directory; `domains` are in the recipe's order."""

    root: Path
    sequence_length: int
    dtype: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    domains: dict[str, DomainInfo]

    def require(self, names: Sequence[str]) -> None:
        """DataError if one of `names` is not among the domains."""
        for name in names:
            if name not in self.domains:
                raise DataError(f"{self.root} has no domain {name!r}; it has {', '.join(self.domains)}")


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.root`/domains.json atomically."""
    content = {
        "format": FORMAT,
        "sequence_length": manifest.sequence_length,
        "dtype": manifest.dtype,
        "tokenizer": {
            "fingerprint": manifest.tokenizer_fingerprint,
            "vocab_size": manifest.vocab_size,
            "eos_token_id": manifest.eos_token_id,
        },
        "domains": {name: asdict(domain) for name, domain in manifest.domains.items()},
    }
    write_text(manifest.root / FILE_NAME, json.dumps(content, indent=1))


def load_manifest(root: str | Path) -> Manifest:
    """Read domains.json and check every domain's shards against it (presence, sizes, hashes of the indices).

    Raises:
        DataError: the directory is missing or half-written, domains.json is broken, a shard is missing,
            truncated or of another preparation, or a domain is empty.
    """
    root = Path(root)
    path = root / FILE_NAME
    if not root.is_dir():
        raise DataError(f"data directory {root} does not exist; make it with tools/prepare_data.py")
    if not path.is_file():
        raise DataError(
            f"{root} has no {FILE_NAME}: it is half-written, or not made by tools/prepare_data.py; "
            "prepare the data again"
        )
    manifest = _parse(root, path)
    for name, domain in manifest.domains.items():
        for split in SPLITS:
            _check_split(root, name, split, getattr(domain, split))
    return manifest


def _parse(root: Path, path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, not {FORMAT}; prepare the data again")
        domains = {name: _domain(entry) for name, entry in content["domains"].items()}
        tokenizer = content["tokenizer"]
        return Manifest(
            root=root,
            sequence_length=int(content["sequence_length"]),
            dtype=str(content["dtype"]),
            tokenizer_fingerprint=str(tokenizer["fingerprint"]),
            vocab_size=int(tokenizer["vocab_size"]),
            eos_token_id=int(tokenizer["eos_token_id"]),
            domains=domains,
        )
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from None


def _domain(entry: dict[str, Any]) -> DomainInfo:
    train, validation = (SplitInfo(**entry[split]) for split in SPLITS)
    return DomainInfo(train, validation, Dropped(**entry.get("dropped", {})))


def _check_split(root: Path, name: str, split: str, info: SplitInfo) -> None:
    if info.samples < 1:
        raise DataError(f"domain {name!r} of {root} is empty: no {split} sample; prepare it with more text")
    index = read_index(root / name / split)
    if (index.num_samples, index.sha) != (info.samples, info.sha):
        raise DataError(
            f"{root / name / split} is not what {root / FILE_NAME} describes ({index.num_samples:,} samples, "
            f"expected {info.samples:,} of hash {info.sha[:12]}); {AGAIN}"
        )
