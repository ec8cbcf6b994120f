"""Columns of text in tables, as the bytes of their values."""

from __future__ import annotations

from collections.abc import Iterator
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
        batch_rows = max(1, min(BATCH_ROWS, _PARQUET_BYTES // _mean_row_bytes(table, column)))
        for batch in table.iter_batches(batch_size=batch_rows, columns=[column]):
            rows += batch.num_rows
            yield rows / table.metadata.num_rows, values_of(batch.column(0))


def _mean_row_bytes(table: parquet.ParquetFile, column: str) -> int:
    """Return the mean bytes of a column's values in the row group where they are largest, at least 1."""
    content = table.metadata
    number = next(leaf for leaf in range(content.num_columns) if content.schema.column(leaf).path == column)
    groups = [content.row_group(group) for group in range(content.num_row_groups)]
    return max(1, *(group.column(number).total_uncompressed_size // max(group.num_rows, 1) for group in groups), 1)
