"""The keys of a configuration's sections, by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that is the value of a key, or None if the value is no section."""
    options = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and the field of each key that is no section, in a section and those inside it."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from all_keys(inner, f"{prefix}{name}.")


def value_at(values: Any, key: str) -> Any:
    """Return the value at a dotted key of nested mappings, or None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def put_at(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested mappings, whose sections exist."""
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    values[name] = value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping by dotted keys; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def changed_keys(then: dict[str, Any], now: dict[str, Any], section: type[BaseModel]) -> list[str]:
    """Return, sorted, the keys whose values differ between two flat mappings of a section's keys (`flatten`).

    A key that only `now` has, with its default, is no change: `then` is of a version without this option, whose
    default stands for what was done before there was the option.
    """
    return sorted(
        key
        for key in {**then, **now}
        if then.get(key) != now.get(key) and not (key not in then and _is_default(section, key, now[key]))
    )


def _is_default(section: type[BaseModel] | None, key: str, value: Any) -> bool:
    """Return True if a value, as JSON has it, is what a configuration has that leaves its dotted key out."""
    name, _, inner = key.partition(".")
    field = None if section is None else section.model_fields.get(name)
    if field is None or field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    if inner:  # without its section, a key has no default
        return default is not None and _is_default(section_of(field), inner, value)
    return bool(TypeAdapter(Any).dump_python(default, mode="json") == value)
