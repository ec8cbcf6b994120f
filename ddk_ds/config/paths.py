"""Paths in a configuration: a relative one begins at the directory of the file that names it.

The shell names the paths among the overrides and in environment variables, and the default of `output_dir` is named by
no file: these begin at the working directory. `load_config` makes all of them absolute, so that a run's record, a Slurm
job and another working directory mean the same files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from omegaconf import OmegaConf
from pydantic import BaseModel, Field

from ddk_ds.config.keys import all_keys, put_at, value_at

# huggingface_hub's form of a model's name; "./name" is never one.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class PathKind:
    """Mark of a key whose text is a path or an address."""

    advice: str = ""
    """The fix if nothing has this path, for a path that a run reads; "" if a run can do without it."""
    hub: bool = False
    """True if the text can be the hub's name of a model, where no file or directory has that path."""


LocalPath = Annotated[str, Field(min_length=1), PathKind()]
ModelPath = Annotated[
    str, Field(min_length=1), PathKind("give a model's directory, or the hub's name of a model", hub=True)
]
DataPath = Annotated[str, Field(min_length=1), PathKind("make it with `ddk prepare`, or give its place")]
FiltersPath = Annotated[str, Field(min_length=1), PathKind("a run with method: ted_filters exports it")]
PromptsPath = Annotated[str, Field(min_length=1), PathKind("write a prompt on each line of it, or give its place")]
SchedulePath = Annotated[str, Field(min_length=1), PathKind("write it, or give its place (docs/methods.md)")]


@dataclass(frozen=True)
class Named:
    """A path as the user wrote it."""

    text: str
    kind: PathKind
    base: Path
    """Absolute directory at which it begins if it is relative."""
    other: Path
    """Absolute directory at which it does not begin, but at which the user may have meant it."""
    source: str
    """What names it: a file, or the command line."""
    in_file: bool
    """True if a file names it, False if the shell or a program does."""

    @property
    def absolute(self) -> str:
        """Return the absolute path that the rule gives."""
        return absolute_path(self.base, self.text)

    @property
    def may_be_hub_name(self) -> bool:
        """Return True if the text is no path that exists, and has the form of the hub's names."""
        return self.kind.hub and is_hub_name(self.text) and not os.path.exists(self.absolute)

    @property
    def value(self) -> str:
        """Return the value for the configuration: the absolute path, or the hub's name as it is."""
        return self.text if self.may_be_hub_name else self.absolute

    @property
    def meant(self) -> str | None:
        """Return the existing path that the user may have meant, which begins at `other`; None if there is none."""
        meant = absolute_path(self.other, self.text)
        return meant if meant != self.absolute and os.path.exists(meant) else None

    def note(self) -> str:
        """Return the words "; ..." that say where this path begins; "" for an absolute one."""
        if os.path.isabs(os.path.expanduser(self.text)):
            return ""
        rule = "at the directory of the file that names it" if self.in_file else "where the command is started"
        said = f"; {self.source} names it {self.text!r}, and a relative path begins {rule}"
        if self.meant is None:
            return said
        return f"{said}; for {self.meant} write {os.path.relpath(self.meant, self.base)}"


@dataclass(eq=False)
class NamedPaths:
    """Every path key as the user wrote it. It serves messages alone: configurations are compared without it."""

    by_key: dict[str, Named] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedPaths)

    __hash__ = None  # type: ignore[assignment]

    def note(self, key: str) -> str:
        """Return the words about where the path at `key` begins, for the end of a message; "" if there are none."""
        return self.by_key[key].note() if key in self.by_key else ""

    def missing(self, keys: Sequence[str] = ()) -> str | None:
        """Return the message about the first path that a run reads and that is not there; None if all are.

        `keys` limits it to the paths at them. A text that can be the hub's name of a model counts as there, unless the
        user seems to have meant a directory.
        """
        for key, named in self.by_key.items():
            there = os.path.exists(named.absolute) or (named.may_be_hub_name and named.meant is None)
            if named.kind.advice and not there and (not keys or key in keys):
                return f"{key}: there is no {named.absolute}: {named.kind.advice}{named.note()}"
        return None


def path_keys(section: type[BaseModel]) -> dict[str, PathKind]:
    """Return the dotted keys of a section, and of those inside it, whose values are paths; with their marks."""
    marks = {}
    for key, key_field in all_keys(section):
        inner = _metadata(key_field.annotation)
        marks[key] = next((item for item in (*key_field.metadata, *inner) if isinstance(item, PathKind)), None)
    return {key: mark for key, mark in marks.items() if mark is not None}


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield the marks of a type and of those inside it: of a path that may be null, and of a mapping's paths."""
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from _metadata(part)


def _texts(values: Any, key: str) -> dict[str, str]:
    """Return the path at a key, or those of the mapping there, by their dotted names."""
    found = value_at(values, key)
    items = {f"{key}.{name}": value for name, value in found.items()} if isinstance(found, dict) else {key: found}
    return {name: text for name, value in items.items() if (text := _path_text(value)) is not None}


def _put(values: Any, key: str, name: str, text: str) -> None:
    """Set the path that `_texts` has found with this name at a key."""
    if name == key:
        put_at(values, key, text)
    else:
        value_at(values, key)[name.removeprefix(f"{key}.")] = text


def is_hub_name(text: str) -> bool:
    """Return True if the text has the form of a model's name on the hub, which a path can have too."""
    return _HUB_NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    """Return True if the text is an address such as s3://bucket/data, and no path of this machine."""
    return "://" in text


def resolve_overrides(section: type[BaseModel], given: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return nested overrides with their paths made absolute from `base`, for keys of `section`.

    It is done before they are merged, so that an interpolation of the file takes over the absolute path.
    """
    for key, kind in path_keys(section).items():
        for name, text in _texts(given, key).items():
            if "${" not in text:
                _put(given, key, name, _value(text, kind, base))
    return given


def absolute_items(section: type[BaseModel], items: Sequence[str], base: Path) -> list[str]:
    """Return key=value items that a file in `base` holds, with their paths absolute as a command line can take them."""
    kinds = path_keys(section)
    resolved = []
    for item in items:
        key = item.partition("=")[0]
        kind = kinds.get(key) or kinds.get(key.rpartition(".")[0])
        values = {} if kind is None else OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        text = _path_text(value_at(values, key))
        resolved.append(item if text is None or kind is None else f"{key}={json.dumps(_value(text, kind, base))}")
    return resolved


def resolve_paths(
    section: type[BaseModel], values: dict[str, Any], raw: Any, given: Any, base: Path | None, source: str
) -> NamedPaths:
    """Make the paths in `values` absolute, in place, and return them as the user wrote them.

    Args:
        section: the class of the configuration, whose keys are marked.
        values: nested values of the file with the overrides, without interpolations.
        raw: nested values of the file, with its interpolations as they are written.
        given: nested values of the overrides, as they are written.
        base: absolute directory of the file; None: the values are no file's, and begin at the working directory.
        source: the file's name, for messages.
    """
    named, here = NamedPaths(), Path.cwd()
    for key, kind in path_keys(section).items():
        for name, text in _texts(values, key).items():
            overridden = _texts(given, key).get(name)
            if named_by_shell(raw, given, name):
                written = text if overridden is None or "${" in overridden else overridden
                named.by_key[name] = Named(written, kind, here, base or here, "the command line", in_file=False)
            else:
                named.by_key[name] = Named(text, kind, base or here, here, source, in_file=base is not None)
            _put(values, key, name, named.by_key[name].value)
    return named


def named_by_shell(raw: Any, given: Any, key: str) -> bool:
    """Return True if a value comes from an override (`given`) or from an environment variable that the file names.

    `raw` and `given` are the nested values of the file, with its interpolations as they are written, and of the
    overrides. The relative path that the shell names begins at the working directory.
    """
    return value_at(given, key) is not None or str(value_at(raw, key)).startswith("${oc.env:")


def _value(text: str, kind: PathKind, base: Path) -> str:
    return Named(text, kind, base, base, "", in_file=False).value


def _path_text(value: Any) -> str | None:
    """Return the text of a value that is a path of this machine; None for an address, and for what is no text."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    return text if text and not is_address(text) else None


def absolute_path(base: Path, text: str) -> str:
    """Return the absolute path of `text`, which begins at `base` or at "~", without "..".

    A link's own path is kept unless ".." goes through it.
    """
    joined = os.path.join(base, os.path.expanduser(text))
    tidy = os.path.abspath(joined)
    return tidy if os.path.realpath(tidy) == os.path.realpath(joined) else os.path.realpath(joined)
