"""The keys of a configuration's sections, by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
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
