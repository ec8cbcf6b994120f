"""Columns of text in tables, as the bytes of their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from ddk_ds.errors import DataError

BATCH_ROWS = 128
_PARQUET_BYTES = 1 << 24
Values = tuple[float, list[bytes | None]]
"""Values of some rows in order, after the share (0 to 1) of the file that is read with them."""


def check_text(schema: pyarrow.Schema, column: str, where: str) -> None:
    """Raise DataError if a table has no such column, or holds no text in it; `where` names the table."""
    if column not in schema.names:
        raise DataError(f"{where} has no column {column!r}; set text_field to one of {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{where}: column {column!r} holds {kind}, no text; set text_field to another")


def values_of(array: pyarrow.Array | pyarrow.ChunkedArray) -> list[bytes | None]:
    """Return the bytes of strings: pyarrow does not check that a writer's strings are UTF-8."""
    return list(array.cast(pyarrow.large_binary()).to_pylist())


def parquet_values(path: Path, column: str, where: str) -> Iterator[Values]:
    """Yield the values of a parquet file's column in order.

    Raises:
        DataError: the column is missing or holds no text.
        ArrowException, OSError: the file is damaged.
    """
    rows = 0
    with parquet.ParquetFile(path) as table:
        check_text(table.schema_arrow, column, where)
        for batch in parquet_batches(table, [column]):
            rows += batch.num_rows
            yield rows / table.metadata.num_rows, values_of(batch.column(0))


def parquet_batches(table: parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Yield columns that the file has, in batches of rows that are not large."""
    batch_rows = max(1, min(BATCH_ROWS, _PARQUET_BYTES // _mean_row_bytes(table, columns)))
    yield from table.iter_batches(batch_size=batch_rows, columns=list(columns))


def _mean_row_bytes(table: parquet.ParquetFile, columns: Sequence[str]) -> int:
    """Return the mean bytes of the columns' values in a row of the row group where they are largest, at least 1."""
    content = table.metadata
    names = [content.schema.column(leaf).path for leaf in range(content.num_columns)]
    # The values of a list of objects are several columns: messages.list.element.role.
    leaves = [leaf for leaf, path in enumerate(names) if any(f"{path}.".startswith(f"{name}.") for name in columns)]
    groups = [content.row_group(group) for group in range(content.num_row_groups)]
    sizes = [(sum(group.column(leaf).total_uncompressed_size for leaf in leaves), group.num_rows) for group in groups]
    return max(1, 1, *(size // max(rows, 1) for size, rows in sizes))
