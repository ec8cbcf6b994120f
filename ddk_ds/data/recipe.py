"""The recipe: a YAML file that names each domain's text sources, and the files that they stand for.

A source's `path` is a file or a glob below the recipe's `root`, or below a place that every installation has:

- `stdlib:GLOB`: the standard library's source
- `package:NAME/GLOB`: the directory of an installed package (found without importing it)
- `site-packages:GLOB`: the directories that hold installed distributions (their `*.dist-info`)
"""

from __future__ import annotations

import difflib
import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError
from yaml import YAMLError

from ddk_ds.config import Positive, Section
from ddk_ds.errors import ConfigError, DataError

Format = Literal["text", "jsonl", "json_strings", "parquet"]
DomainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _path_to_source(value: Any) -> Any:
    """A bare string in a list of sources is a source that has nothing but a path."""
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """Where some of a domain's text is, and how it is read."""

    path: str
    """File or glob below the recipe's root, absolute path, or locator (see the module's docstring)."""
    exclude: list[str] = Field(default_factory=list)
    """Shell patterns of names, relative to the base, that are left out; `*` crosses directories."""
    format: Format | None = None
    """How the files are read (documents.py); null: by the suffix."""
    text_field: str = "text"
    """Field (jsonl), column (parquet) or key at any depth (json_strings) that holds the text."""
    strip_html: bool = False
    """Take HTML tags and entities out of the text."""


class Domain(Section):
    """One domain: its sources and limits."""

    sources: Annotated[list[Annotated[Source, BeforeValidator(_path_to_source)]], Field(min_length=1)]
    """Files of the domain; no file may be in two domains."""
    max_bytes: Positive | None = None
    """Stop once this much UTF-8 text is read (bytes); null: no limit."""
    min_chars: Positive = 1
    """Shorter documents are dropped (characters)."""
    max_chars: Positive | None = None
    """Longer documents are cut (characters); null: no limit."""


class Recipe(Section):
    """All domains, in the order in which they are prepared."""

    root: str = "."
    """Base of relative paths, itself relative to the recipe's file."""
    domains: Annotated[dict[DomainName, Domain], Field(min_length=1)]
    """Domains by name; the name is a directory of the prepared data."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a domain. `name` is relative to the source's base: the same on every machine."""

    path: Path
    name: str
    source: Source


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; its `root` comes back absolute.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, has an unknown key or a wrong value.
    """
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; configs/data/demo.yaml is one to start from")
    try:
        recipe = Recipe.model_validate(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: " + "; ".join(map(_explain, error.errors()))) from error
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ConfigError(f"recipe {path}: cannot be read as YAML: {error}") from error
    return recipe.model_copy(update={"root": str((path.parent / recipe.root).resolve())})


def _explain(item: Any) -> str:
    where = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']}, got {item['input']!r}"
    known = [name for section in (Recipe, Domain, Source) for name in section.model_fields]
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
    return f"{where}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def list_files(recipe: Recipe) -> dict[str, list[SourceFile]]:
    """The files of every domain, in the order in which they are read: sorted by name within each source.

    A domain with `max_bytes` has its files in the order of a hash of their names instead, so that the cap
    takes a sample of the whole tree and not the head of the alphabet.

    Raises:
        DataError: a source matches no file, or one file is in two domains.
    """
    owner: dict[Path, str] = {}
    files = {}
    for name, domain in recipe.domains.items():
        found = {
            file.path.resolve(): file
            for source in domain.sources
            for file in _source_files(name, source, Path(recipe.root))
        }
        for path in found:
            if owner.setdefault(path, name) != name:
                raise DataError(f"{path} is in two domains, {owner[path]!r} and {name!r}; exclude it from one of them")
        files[name] = list(found.values())
        if domain.max_bytes is not None:
            files[name].sort(key=lambda file: (_name_hash(file.name), file.name))
    return files


def _name_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _source_files(domain: str, source: Source, root: Path) -> list[SourceFile]:
    bases, pattern = _locate(domain, source.path, root)
    try:
        found = {
            (path.relative_to(base).as_posix(), path) for base in bases for path in base.glob(pattern) if path.is_file()
        }
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"domain {domain!r}: source {source.path!r} is no valid glob: {error}") from None
    kept = [
        SourceFile(path, name, source)
        for name, path in sorted(found)
        if not any(fnmatchcase(name, excluded) for excluded in source.exclude)
    ]
    if not kept:
        raise DataError(
            f"domain {domain!r}: source {source.path!r} matches no file below "
            f"{', '.join(map(str, bases))} ({len(found)} excluded); for a directory write DIR/**/*.txt"
        )
    return kept


def _locate(domain: str, path: str, root: Path) -> tuple[Sequence[Path], str]:
    """The directories below which a source is searched, and the glob to search for."""
    scheme, colon, rest = path.partition(":")
    if colon and scheme == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))], rest
    if colon and scheme == "site-packages":
        return sorted({Path(str(found.locate_file(""))) for found in distributions()}), rest
    if colon and scheme == "package":
        package, _, pattern = rest.partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"domain {domain!r}: package {package!r} of source {path!r} is not installed")
        return [Path(base) for base in spec.submodule_search_locations], pattern
    if Path(path).is_absolute():
        anchor = Path(path).anchor
        return [Path(anchor)], str(Path(path).relative_to(anchor))
    return [root], path
