"""A teacher's measured perplexities on held-out samples: one file for each domain and set of conditions."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddk_ds.data.teacher_place import Place
from ddk_ds.errors import DataError
from ddk_ds.files import sealed, unsealed


class PerplexityCache:
    """Perplexities of a frozen model under one set of conditions (`key`)."""

    def __init__(self, place: Place, key: dict[str, Any]) -> None:
        self._place = place
        self._key = key

    def read(self, domain_key: str) -> float | None:
        """Return the perplexity of a domain; None where it is missing or damaged: it is measured again."""
        with suppress(DataError):
            content = self._place.read(self._name(domain_key))
            record = None if content is None else _record(content)
            return None if record is None else record["perplexity"]
        return None

    def write(self, domain_key: str, value: float) -> None:
        """Write the perplexity of a domain to its file, together with the conditions."""
        record = sealed({**self._key, "validation": domain_key, "perplexity": value})
        self._place.write(self._name(domain_key), json.dumps(record, indent=2))

    def _name(self, domain_key: str) -> str:
        text = json.dumps({**self._key, "validation": domain_key}, sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def measured_in(directory: Path) -> list[dict[str, Any]]:
    """Return what is written in a directory, under all conditions, without files that are damaged.

    Each has the conditions, and "validation" and "perplexity" of a domain. Raises OSError if a file cannot be read.
    """
    records = (_record(file.read_bytes()) for file in sorted(directory.glob("*.json")))
    return [record for record in records if record is not None]


def _record(content: bytes) -> dict[str, Any] | None:
    """Return what a file holds; None if it is not as it was written."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        record = unsealed(content, "")
        return {**record, "perplexity": float(record["perplexity"])}
    return None
