"""The recipe, a YAML file that names each domain's text sources, and the files that the sources match.

A source's `path` is a file or a glob below the recipe's `root`; `**` is any number of directories, also those that a
symbolic link leads to. A file that a domain reaches on two ways is read once. Root or path can be an address that
mosaicml-streaming downloads from (s3://, gs://, az://, hf://datasets/..., ...) or http(s)://. Globs work on s3:// only;
other stores need addresses or a list of addresses. `hf://datasets/OWNER/NAME[@REVISION]`, without a file, is a data set
that the library datasets reads, at one commit. A directory that its `save_to_disk` wrote is one too. Or `path` is a
locator:

- `list:FILE`: a file below the root with one path or address in each line
- `stdlib:GLOB`: the standard library's source
- `package:NAME/GLOB`: the directory of an installed package (found without importing it)
- `site-packages:GLOB`: the directories that hold installed distributions (their `*.dist-info`)
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from yaml import YAMLError

from ddk_ds.config import Positive, Section
from ddk_ds.config.paths import absolute_path, is_address, named_by_shell
from ddk_ds.config.sections import FILE_NAME_RULE, FileName, Natural
from ddk_ds.data.file_globs import find_files
from ddk_ds.data.hf_datasets import HubShard, commit_of, hub_shards, is_hub_dataset, is_saved, saved_files
from ddk_ds.data.remote import list_remote
from ddk_ds.errors import ConfigError, DataError, UserError

_INSTALLED = ("stdlib:", "site-packages:", "package:")
Format = Literal["text", "jsonl", "json_strings", "parquet", "arrow", "webdataset"]


def _path_to_source(value: Any) -> Any:
    """Return {"path": value} for a string, the short form of a source; return any other value unchanged."""
    return {"path": value} if isinstance(value, str) else value


def _to_date(value: Any) -> Any:
    """Return the date of a text like 2026-12-01; return what is no text unchanged. Raises ValueError for others."""
    return date.fromisoformat(value) if isinstance(value, str) else value


class Source(Section):
    """Files with some of a domain's text, and how they are read."""

    path: str
    """File or glob below the recipe's root, absolute path, address, or locator (see the module's docstring)."""
    exclude: list[str] = Field(default_factory=list)
    """Shell patterns of names, relative to the base, that are left out; `*` crosses directories."""
    min_files: Positive = 1
    """Least number of files that the source must match; fewer are an error."""
    format: Format | None = None
    """Format of the files (documents.py); null: chosen by the suffix."""
    text_field: str = "text"
    """Field (jsonl), column (parquet, arrow), key at any depth (json_strings), or member of a sample (webdataset:
    txt, or json.FIELD) that holds the text."""
    subset: str | None = None
    """Subset of a hub's data set, its `config_name`; null: the only one, or the one named default."""
    split: str | None = None
    """Split of a hub's data set or a saved DatasetDict; null: train."""
    strip_html: bool = False
    """Remove HTML tags and resolve HTML entities."""


class Chat(Section):
    """Conversations in place of text: each line of a jsonl file, or row of a parquet file, is one.

    It is rendered by a chat template, and is one document. A field `tools` (a list, or its JSON) goes to the template.
    """

    form: Literal["messages", "prompt_completion"] = "messages"
    """messages: a list of {role, content, ...}. prompt_completion: the fields `prompt` and `completion`, two such
    lists, or two texts, which are one message of the user and one of the assistant."""
    messages_field: str = "messages"
    """Field or column of the list of `form: messages`."""
    targets: Literal["assistant", "all"] = "assistant"
    """Tokens that the student is to predict. assistant: those of the assistant's turns, of the completion alone if
    there is one; all: every token."""
    template: str | None = None
    """File with a chat template (Jinja), relative to the recipe's; null: the tokenizer's own."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """More variables for the template, for example {enable_thinking: false}."""
    day: Annotated[date, BeforeValidator(_to_date)] | None = None
    """The day of `strftime_now` in a template; null: it has none, since data must not depend on the day they are made.
    """
    split_tokens: bool = False
    """Allow that the template writes <|names|> that the tokenizer cuts into pieces, as some models were trained."""
    too_long: Literal["cut", "drop"] = "cut"
    """Conversations longer than a sample: cut into several samples, or dropped; both are counted."""


class Domain(Section):
    """One domain: its sources and limits."""

    sources: Annotated[list[Annotated[Source, BeforeValidator(_path_to_source)]], Field(min_length=1)]
    """Sources of the domain; no file can be in two domains."""
    max_bytes: Positive | None = None
    """Reading stops after this much UTF-8 text (bytes); null: no limit."""
    min_chars: Positive = 1
    """Shorter documents are dropped (characters)."""
    max_chars: Positive | None = None
    """Longer documents are cut (characters); null: no limit."""
    skip_bad_lines: Natural = 0
    """Number of lines of jsonl files that may hold no text (broken JSON, no such field): they are skipped and counted.
    One more is an error."""
    chat: Chat | None = None
    """The domain holds conversations; null: text. `chat: {}` takes the defaults."""

    @model_validator(mode="after")
    def _check_chat(self) -> Domain:
        """Raise ValueError for an option that cuts or changes text, which would break conversations."""
        of_text = {
            "min_chars": self.min_chars != 1,
            "max_chars": self.max_chars is not None,
            "strip_html of a source": any(source.strip_html for source in self.sources),
            "a hub's data set (name its parquet files)": any(is_hub_dataset(source.path) for source in self.sources),
            "format of a source": any(source.format not in (None, "jsonl", "parquet") for source in self.sources),
        }
        if self.chat is not None and (given := ", ".join(name for name, there in of_text.items() if there)):
            raise ValueError(f"a domain with `chat` reads jsonl or parquet, whole: leave out {given}")
        return self


class TokenizerOptions(Section):
    """Use of the tokenizer."""

    add_bos: Literal["auto"] | bool = "auto"
    """Begin each document with the BOS token. auto: with what the tokenizer itself puts before a text in transformers,
    as the model was trained: Llama's and Gemma's put one, Qwen's and GPT-2's none. A conversation begins as its
    template has it, and only `true` puts a BOS before one that has none."""


class MinHashOptions(Section):
    """Nearness of documents for `dedup: minhash` (near_duplicates.py).

    Texts whose sets of n-grams have the Jaccard similarity s are found with probability 1 - (1 - s^hashes)^buckets: by
    default 5 % at 0.5, 56 % at 0.7, 92 % at 0.8, 99.96 % at 0.9.
    """

    ngram_words: Positive = 5
    """Words of an n-gram; shorter texts are near no other."""
    buckets: Positive = 14
    """Number of keys of a text; more find more."""
    hashes: Positive = 8
    """Number of hashes that two texts must share in one bucket; more find fewer."""


class Recipe(Section):
    """All domains, in the order in which they are prepared."""

    root: str = "."
    """Base of relative paths, itself relative to the recipe's file; a directory or an address."""
    tokenizer: TokenizerOptions = Field(default_factory=TokenizerOptions)
    """Use of the tokenizer."""
    dedup: Literal["exact", "minhash"] = "exact"
    """Documents that are dropped as duplicates. exact: copies, character by character; minhash: also those that are
    near an earlier document that is kept, of any domain."""
    minhash: MinHashOptions = Field(default_factory=MinHashOptions)
    """Options of `dedup: minhash`."""
    decontaminate: str | None = None
    """Suite of benchmarks whose texts are kept out (ddk evaluate --suite): a document that has an n-gram of one is
    dropped (contamination.py); null: none."""
    benchmarks: str | None = None
    """Directory with the benchmarks' files, relative to the recipe's file, as ddk evaluate --data wants them."""
    domains: Annotated[dict[FileName, Domain], Field(min_length=1)]
    """Domains by name; the name is a directory of the prepared data."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a domain. `name` is relative to the source's base and so the same on every machine.

    `remote` is the address of a file that is not on this machine, or the name of a hub's `shard`; `path` is then not
    used. `num_bytes` is the stored size, 0 where the store does not report it; `stamp` changes with the content.
    `skip_bad_lines` and `chat` are the domain's.
    """

    path: Path
    name: str
    source: Source
    remote: str | None = None
    num_bytes: int = 0
    stamp: str = ""
    skip_bad_lines: int = 0
    shard: HubShard | None = None
    chat: Chat | None = None

    @property
    def where(self) -> str:
        """Return the file's path or address, for messages."""
        return self.remote or str(self.path)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides and check it.

    The returned `root`, `benchmarks` and templates are absolute.

    A path among the overrides or in an environment variable is relative to the working directory, where the shell is.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, has an unknown key or a wrong value.
    """
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; configs/data/demo.yaml is one to start from")
    for item in overrides:
        if not re.match(r"^[A-Za-z_][^=]*=", item):
            raise ConfigError(f"override {item!r}: write it as key.path=value, for example root=/data/text")
    try:
        written, given = OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(written, given)
        trees = OmegaConf.to_container(written), OmegaConf.to_container(given)
        by_shell = {key: named_by_shell(*trees, key) for key in ("root", "benchmarks")}
        recipe = Recipe.model_validate(OmegaConf.to_container(merged, resolve=True))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item, path, overrides) for item in error.errors())) from error
    except InterpolationResolutionError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"recipe {path}: {reason}; set the variable, or give the key as key=value") from error
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"recipe {path}: cannot be read as YAML: {error}") from error
    paths = {
        key: absolute_path(Path.cwd() if by_shell[key] else path.parent, value)
        for key, value in (("root", recipe.root), ("benchmarks", recipe.benchmarks))
        if value is not None and not is_address(value)
    }
    domains = {name: _placed(domain, path) for name, domain in recipe.domains.items()}
    return recipe.model_copy(update={**paths, "domains": domains})


def _placed(domain: Domain, recipe: Path) -> Domain:
    """Return a domain whose template, if it names one, is an absolute path."""
    if domain.chat is None or domain.chat.template is None:
        return domain
    template = absolute_path(recipe.parent.absolute(), domain.chat.template)
    return domain.model_copy(update={"chat": domain.chat.model_copy(update={"template": template})})


def _explain(item: Any, path: Path, overrides: Sequence[str]) -> str:
    key = ".".join(map(str, item["loc"]))
    named = next((given for given in overrides if f"{key}.".startswith(f"{given.partition('=')[0]}.")), None)
    where = f"recipe {path}: {key}" if named is None else f"override {named}: {key}"
    if item["type"] == "string_pattern_mismatch":
        return f"recipe {path}: domains: {item['input']!r}: {FILE_NAME_RULE}"
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']}, got {item['input']!r}"
    sections = (Recipe, TokenizerOptions, MinHashOptions, Domain, Chat, Source)
    known = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
    return f"{where}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def list_files(recipe: Recipe, commits: MutableMapping[str, str] | None = None) -> dict[str, list[SourceFile]]:
    """Return the files of every domain in the order in which they are read: sorted by name within each source.

    `commits` are those at which data sets of a hub are read, by their addresses in the recipe. The hub is asked for
    those that it lacks, which are added.

    The files of a domain with `max_bytes` are sorted by a hash of their names instead, so that the cap takes a sample
    of the entire tree and not the first names of the alphabet.

    Raises:
        DataError: a source matches no file, one file is in two domains, or a hub's data set cannot be read.
    """
    commits = {} if commits is None else commits
    owner: dict[str, str] = {}
    files = {}
    for name, domain in recipe.domains.items():
        matched = {
            file.remote or str(file.path.resolve()): file
            for source in domain.sources
            for file in _source_files(name, source, recipe.root, commits)
        }
        for path in matched:
            if owner.setdefault(path, name) != name:
                raise DataError(f"{path} is in two domains, {owner[path]!r} and {name!r}; exclude it from one of them")
        files[name] = [
            replace(file, skip_bad_lines=domain.skip_bad_lines, chat=domain.chat) for file in matched.values()
        ]
        if domain.max_bytes is not None:
            files[name].sort(key=lambda file: (_name_hash(file.name), file.name))
    return files


def _name_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _source_files(domain: str, source: Source, root: str, commits: MutableMapping[str, str]) -> list[SourceFile]:
    try:
        matched = list(_find(domain, source, source.path, root, commits))
    except (ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"domain {domain!r}: source {source.path!r} is no valid glob: {error}") from None
    kept = [file for file in matched if not _excluded(source, file.name)]
    _check_keys(domain, source, kept)
    if kept and len(kept) < source.min_files:
        raise DataError(
            f"domain {domain!r}: source {source.path!r} matches {len(kept):,} files ({len(matched) - len(kept):,} more "
            f"are excluded), min_files is {source.min_files:,}: add what is missing, or lower min_files"
        )
    if not kept:
        raise DataError(
            f"domain {domain!r}: source {source.path!r} matches no file below {_below(domain, source, root)} "
            f"({len(matched)} excluded); for a directory write DIR/**/*.txt"
        )
    return kept


def _check_keys(domain: str, source: Source, files: Sequence[SourceFile]) -> None:
    """Raise ConfigError if a key would have no effect on one of a source's files."""
    fits: dict[str, Callable[[SourceFile], bool]] = {
        "subset": lambda file: file.shard is not None,
        "split": lambda file: file.shard is not None or is_saved(file.path.parent),
        "format": lambda file: file.shard is None,
    }
    given = {key: getattr(source, key) for key in fits if getattr(source, key) is not None}
    for key, value in given.items():
        for file in files:
            if not fits[key](file):
                raise ConfigError(
                    f"domain {domain!r}: source {source.path!r}: {key} {value!r} has no meaning for {file.where}: "
                    "leave it out (subset is for hf:// data sets, split for these and for those of save_to_disk)"
                )


def _excluded(source: Source, name: str) -> bool:
    return any(fnmatchcase(name, excluded) for excluded in source.exclude)


def _find(domain: str, source: Source, path: str, root: str, commits: MutableMapping[str, str]) -> Iterator[SourceFile]:
    """Yield the files that a path matches, sorted by name; those of a list in the order of the list."""
    if path.startswith("list:"):
        yield from _listed(domain, source, path.removeprefix("list:"), root, commits)
    elif is_hub_dataset(path):
        commit = commits.get(path) or commits.setdefault(path, commit_of(path))
        for shard in hub_shards(path, commit, source.subset, source.split, source.text_field):
            yield SourceFile(Path(shard.name), shard.name, source, shard.where, stamp=commit, shard=shard)
    elif is_address(path) or (is_address(root) and not _is_locator(path)):
        url = path if is_address(path) else f"{root.rstrip('/')}/{path}"
        base = url.removesuffix(path) if path != url else "/".join(url.split("/", 3)[:3]) + "/"
        for remote in sorted(list_remote(url), key=lambda file: file.url):
            name = remote.url.removeprefix(base)
            yield SourceFile(Path(name), name, source, remote.url, remote.num_bytes, remote.stamp)
    else:
        bases, pattern = _locate(domain, path, Path(root))
        named = {(file.relative_to(base).as_posix(), file) for base in bases for file in find_files(base, pattern)}
        for name, file in sorted(named):
            if file.is_file():
                yield _local(file, name, source)
            elif file.is_dir():
                for saved in saved_files(file, source.split):
                    yield _local(saved, f"{name}/{saved.relative_to(file).as_posix()}", source)
            elif file.is_symlink() and not path.startswith(_INSTALLED) and not _excluded(source, name):
                raise DataError(f"domain {domain!r}: {file} is a link to nothing: restore its file, or exclude it")


def _local(file: Path, name: str, source: Source) -> SourceFile:
    status = file.stat()
    return SourceFile(file, name, source, None, status.st_size, str(status.st_mtime_ns))


def _listed(
    domain: str, source: Source, path: str, root: str, commits: MutableMapping[str, str]
) -> Iterator[SourceFile]:
    if is_address(root) and not Path(path).is_absolute():
        raise DataError(f"domain {domain!r}: list {path!r} lies on this machine; give its absolute path")
    try:
        lines = (Path(root) / path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"domain {domain!r}: the list {Path(root) / path} cannot be read: {error}") from None
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            matched = list(_find(domain, source, line, root, commits))
            if not matched:
                raise DataError(f"domain {domain!r}: {line!r} in the list {Path(root) / path} matches no file")
            yield from matched


def _below(domain: str, source: Source, root: str) -> str:
    if is_address(root) or is_address(source.path) or source.path.startswith("list:"):
        return root
    return ", ".join(map(str, _locate(domain, source.path, Path(root))[0]))


def _is_locator(path: str) -> bool:
    return path.startswith((*_INSTALLED, "/"))


def _locate(domain: str, path: str, root: Path) -> tuple[Sequence[Path], str]:
    """Return the directories that a source is searched in, and the glob to search for."""
    scheme, colon, rest = path.partition(":")
    if colon and scheme == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))], rest
    if colon and scheme == "site-packages":
        return sorted({Path(str(installed.locate_file(""))) for installed in distributions()}), rest
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
