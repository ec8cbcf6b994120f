"""A run's ledger as tables of numpy arrays, for notebooks: a row for each step, measurement or continued prompt."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ddk_ds.run_files import read_ledger

Column = npt.NDArray[Any]
_SHOWN_ROWS = 10
_SHOWN_COLUMNS = 9


class Table:
    """Named columns of equal length, as in pandas: `table["loss"]` is an array, `table[3]` a row, `table[:3]` a table.

    A slash groups columns: `table["ratio"]` is the table of the columns `ratio/code`, `ratio/books`, under the names
    code and books.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = dict(columns)
        self._length = len(next(iter(self._columns.values()))) if self._columns else 0

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns, in the order of the records' keys."""
        return list(self._columns)

    def keys(self) -> list[str]:
        """Return the names of the columns, so that `dict(table)` works."""
        return self.columns

    def __len__(self) -> int:
        return self._length

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice | Column | list[int]) -> Table: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...

    def __getitem__(self, key: str | int | slice | Column | list[int]) -> Any:
        """Return a column or group by its name, a row by its number, or the rows of a slice, mask or list of numbers.

        Raises KeyError, with the names that there are, and IndexError.
        """
        if isinstance(key, str):
            return self._named(key)
        if isinstance(key, int | np.integer):
            return {name: _plain(column[key]) for name, column in self._columns.items()}
        return Table({name: column[key] for name, column in self._columns.items()})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each row as a dictionary of plain Python values."""
        return (self[number] for number in range(len(self)))

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame of the same columns. Raises ImportError without pandas."""
        import pandas  # type: ignore[import-untyped,unused-ignore]

        return pandas.DataFrame(self._columns)

    def _named(self, name: str) -> Any:
        if name in self._columns:
            return self._columns[name]
        group = {
            key.removeprefix(f"{name}/"): column for key, column in self._columns.items() if key.startswith(f"{name}/")
        }
        if not group:
            raise KeyError(f"{name!r}: no such column; there are {', '.join(self._columns)}")
        return Table(group)

    def __repr__(self) -> str:
        heads, cells = self._shown()
        widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
        lines = [
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in [heads, *cells]
        ]
        return "\n".join([*lines, self._size()])

    def _repr_html_(self) -> str:
        heads, cells = self._shown()
        top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in cells)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table><p>{self._size()}</p>"

    def _size(self) -> str:
        return f"{len(self)} rows x {len(self._columns)} columns"

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        """Return the names of the first columns, and the cells of the first and last rows."""
        names = self.columns[:_SHOWN_COLUMNS]
        half = _SHOWN_ROWS // 2
        numbers = (
            [*range(len(self))] if len(self) <= _SHOWN_ROWS else [*range(half), -1, *range(len(self) - half, len(self))]
        )
        gap = ["..."] * (len(names) + 1)
        cells = [gap if at == -1 else [str(at), *(_text(self._columns[name][at]) for name in names)] for at in numbers]
        heads = ["", *names]
        if len(names) < len(self._columns):
            heads, cells = [*heads, "..."], [[*line, "..."] for line in cells]
        return heads, cells


class LedgerTable(Table):
    """The steps of a run as a table, with its measurements and the continuations of its prompts as further tables."""

    measurements: Table
    """A row for each beginning of an interval, and for the run's end: student_ppl, ratio, proportions by domain, ..."""
    samples: Table
    """A row for each continued prompt: step, name, prompt, student, teacher (docs/monitoring.md)."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Make the tables of a ledger's lines."""
        measured = [record for record in records if record["kind"] in ("interval", "end")]
        names = list(measured[0]["student_ppl"]) if measured else []
        steps = [record for record in records if record["kind"] == "step"]
        columns = table_of([_flat(record, names) for record in steps])._columns
        super().__init__({name: column for name, column in columns.items() if name != "kind"})
        self.measurements = table_of([_flat(record, names) for record in measured])
        sampled = [record for record in records if record["kind"] == "samples"]
        rows = [{"step": record["step"], **sample} for record in sampled for sample in record["samples"]]
        self.samples = table_of(rows)


def load_ledger(run: str | Path) -> LedgerTable:
    """Return the ledger of a run, finished or not, as tables; `run` is its directory.

    Names are the ledger's keys, joined by slashes: `loss`, `clock/step_s`, `domain_tokens/code`. Raises CheckpointError
    if the ledger is missing or damaged.
    """
    return LedgerTable(read_ledger(Path(run)))


def _flat(values: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Return the values under names joined by slashes; a list with a number for each domain gets the domains' names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        by_domain = isinstance(value, list) and 0 < len(value) == len(names) and not isinstance(value[0], str)
        inner = dict(zip(names, value, strict=True)) if by_domain else value
        if isinstance(inner, Mapping):
            flat |= _flat(inner, names, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with these rows; a value that a row lacks is nan or None."""
    names = dict.fromkeys(name for row in rows for name in row)
    groups = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"}
    names = {name: None for name in names if name not in groups}  # null in one row, by domain in the others
    return Table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> Column:
    """Return int64 or float64 where all values are numbers, with nan for those that are missing; else objects."""
    numbers = [value for value in values if value is not None]
    if all(isinstance(value, int | float) for value in numbers) and numbers:
        whole = len(numbers) == len(values) and all(isinstance(value, int) for value in numbers)
        return np.array([np.nan if value is None else value for value in values], np.int64 if whole else np.float64)
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
