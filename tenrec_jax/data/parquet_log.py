"""Parquet as a source: files or folders of shards that hold a kind's columns with raw ids, or a user's own columns by name.

Any engine can write them: one column for each column of the kind, under the same name, in any numeric or text type that holds its values
exactly; nulls where the kind allows a missing value. Rows stand in the user's own time order, files in the order of their names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from tenrec_jax.data.blocks import ParsedBlock, Piece
from tenrec_jax.data.id_types import AUTO, INTEGER, TEXT, typed_id
from tenrec_jax.data.quarantine import BadRow
from tenrec_jax.data.schema import Column, Kind, Role
from tenrec_jax.data.values import in_range, parse, problem_of
from tenrec_jax.errors import UserError

BATCH_ROWS = 1 << 17
# Where floating-point types begin to round integers, by their width in bits.
_EXACT = {16: 2**11, 32: 2**24, 64: 2**53}


class ParquetLog:
    """Parquet files that are one log together.

    Args:
        paths: the files, in order.
        kind: their columns.
        ids: what the ids of a mapped kind are, one of `id_types.ID_TYPES`; "auto" takes the first file's types.

    Raises:
        UserError: a file is no Parquet, holds no rows, or lacks a column.
    """

    def __init__(self, paths: Sequence[Path], kind: Kind, ids: str = AUTO) -> None:
        self._files = [_open(path, kind) for path in paths]
        self._paths, self.kind = paths, kind
        self.categories: tuple[str, ...] = ()
        if kind.mapped:
            schema = self._files[0].schema_arrow
            columns = (_with_id_type(column, ids, schema.field(column.name).type) for column in kind.columns)
            self.kind = replace(kind, columns=tuple(columns))

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.metadata.num_rows for file in self._files)

    def pieces(self, *, progress: bool) -> Iterator[Piece]:
        """The rows of all files, in order. The "line" of a bad row is its number in its file, from 1."""
        with tqdm(total=self.rows, unit="row", unit_scale=True, disable=not progress, leave=False) as bar:
            for path, file in zip(self._paths, self._files, strict=True):
                first = 1
                try:
                    for rows in file.iter_batches(BATCH_ROWS, columns=list(self.kind.header)):
                        yield partial(check_rows, rows.select(list(self.kind.header)), self.kind, str(path), first)
                        first += rows.num_rows
                        bar.update(rows.num_rows)
                except OSError as error:
                    raise UserError(f"{path} is damaged: {error}. Write or fetch it again.") from error


def check_rows(rows: pa.RecordBatch, kind: Kind, path: str, first: int) -> ParsedBlock:
    """Typed rows to the kind's types, with the bad ones set aside.

    Args:
        rows: the kind's columns, in order. path: the file's name. first: number of the first row.
    """
    is_bad = np.zeros(rows.num_rows, bool)
    bad: list[BadRow] = []
    for column, values in zip(kind.columns, rows.columns, strict=True):
        if _typed(column, values) is None:
            for row in range(rows.num_rows):
                problem = "" if is_bad[row] else _problem(column, values.slice(row, 1))
                if problem:
                    bad.append(BadRow(path, first + row, column.name, str(values[row].as_py()), problem))
                    is_bad[row] = True
    if bad:
        good = pa.array(~is_bad)
        rows = rows.filter(good)
    typed = [_typed(column, values) for column, values in zip(kind.columns, rows.columns, strict=True)]
    return ParsedBlock(
        pa.RecordBatch.from_arrays(typed, names=list(kind.header)),
        sorted(bad, key=lambda row: row.line),
        rows.num_rows + len(bad),
    )


def _typed(column: Column, values: pa.Array) -> pa.Array | None:
    """The values in the column's type; None if any of them is not allowed."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count and not column.nulls:
        return None
    if pa.types.is_null(values.type):
        return values.cast(column.dtype)
    if pa.types.is_large_string(values.type):
        values = values.cast(pa.string())
    if pa.types.is_string(values.type):
        return parse(column, values)
    if column.form == "text":
        return values.cast(pa.string()) if pa.types.is_integer(values.type) else None
    if pa.types.is_timestamp(values.type) and column.form == "time":
        return pc.divide(values.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return None
    return None if column.is_integer and _may_be_rounded(values) else in_range(column, values)


def _may_be_rounded(values: pa.Array) -> bool:
    """Whether any value is a floating-point number at which integers are no longer apart."""
    if not pa.types.is_floating(values.type):
        return False
    limit = _EXACT[values.type.bit_width]
    return bool(pc.any(pc.greater_equal(pc.abs(values), limit), min_count=0).as_py())


def _problem(column: Column, value: pa.Array) -> str:
    if _typed(column, value) is not None:
        return ""
    if value.null_count:
        return "is null"
    problem = problem_of(column, str(value[0].as_py()).encode())
    return f"is a {value.type}, which rounds integers of this size" if _may_be_rounded(value) else problem


def _open(path: Path, kind: Kind) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    names = file.schema_arrow.names
    missing = [name for name in kind.header if name not in names]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; its columns are {', '.join(names)[:1000]}. "
            f"A shard of {kind.name} holds the columns {', '.join(kind.header)}, with raw ids."
        )
    for column in kind.columns:
        dtype = file.schema_arrow.field(column.name).type
        if not _is_readable(column, dtype):
            wanted = {"text": "integers or text", "time": "a timestamp, numbers or text"}.get(
                column.form, "numbers or text"
            )
            raise UserError(f"{path}: column {column.name} is of type {dtype}; write it as {wanted}.")
    if not file.metadata.num_rows:
        raise UserError(f"{path} holds no rows.")
    return file


def _is_readable(column: Column, dtype: pa.DataType) -> bool:
    """Whether a type can hold a column's values; text can hold any."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_null(dtype):
        return True
    if column.form == "text" or pa.types.is_integer(dtype):
        return pa.types.is_integer(dtype)
    is_time = column.form == "time" and pa.types.is_timestamp(dtype)
    return pa.types.is_boolean(dtype) or pa.types.is_floating(dtype) or is_time


def _with_id_type(column: Column, ids: str, dtype: pa.DataType) -> Column:
    if column.role not in (Role.USER, Role.ITEM):
        return column
    of_file = INTEGER if pa.types.is_integer(dtype) else TEXT
    return typed_id(column, of_file if ids == AUTO else ids, [], "")
