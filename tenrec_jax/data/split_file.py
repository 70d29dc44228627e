"""Splits that somebody else made: a file that names the part of every row."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.errors import UserError

COLUMNS = pa.schema([("row", pa.int64()), ("part", pa.string())])
_UNSET = -1


def read_parts(path: Path, num_rows: int, codes: Mapping[str, int]) -> np.ndarray:
    """The part of every row of a table.

    The file has the columns `row`, a row number of the table from 0 on (not a line of the source: a table has each user's rows in one
    block), and `part`, one of the names. It names every row once, in any order. Row numbers, since a pair of user and item may stand in
    several rows.

    Args:
        path: a file .parquet, or .csv with a header.
        num_rows: rows of the table.
        codes: the value of each part's name.

    Returns:
        int8 [R].

    Raises:
        UserError: the file cannot be read, or a row is unknown, stands there twice or is missing, or a part's name is unknown; with the
            line (CSV) or the record (Parquet, from 0) and the row.
    """
    part_R, seen = np.full(num_rows, _UNSET, np.int8), 0
    value, names = np.asarray(list(codes.values()), np.int8), pa.array(codes)
    first, unit = (0, "record") if path.suffix == ".parquet" else (2, "line")  # line 1 is the header
    for batch in _batches(path):
        where = _Where(f"{path}: {unit}", first + seen, batch)
        where.refuse(as_numpy(batch["row"].is_null()), "the row is missing.")
        row, code = as_numpy(batch["row"]), pc.index_in(batch["part"], value_set=names)
        unknown = (row < 0) | (row >= num_rows)
        where.refuse(unknown, f"row {{row}} is unknown; the table has the rows 0..{num_rows - 1}.")
        unnamed = as_numpy(code.is_null())
        where.refuse(unnamed, f"row {{row}} has the part {{part}}; it must be one of {', '.join(codes)}.")
        # Of equal numbers all but the first are doubles; a stable sort keeps them in the file's order.
        order = np.argsort(row, kind="stable")
        repeated = np.zeros(len(row), bool)
        repeated[order[1:]] = row[order[1:]] == row[order[:-1]]
        where.refuse(repeated | (part_R[row] != _UNSET), "row {row} stands here for the second time.")
        part_R[row] = value[as_numpy(code)]
        seen += len(row)
    missing = part_R == _UNSET
    if missing.any():
        raise UserError(
            f"{path} does not say where row {int(missing.argmax())} goes, nor {int(missing.sum()) - 1} others. "
            f"Name every row of the table; rows that are not used have the part {next(iter(codes))}."
        )
    return part_R


class _Where(NamedTuple):
    """Where a batch stands in the file, for messages."""

    name: str
    first: int
    batch: pa.RecordBatch

    def refuse(self, wrong: np.ndarray, problem: str) -> None:
        """Raise for the first wrong record, if there is one; `problem` may name its {row} and {part}."""
        if wrong.any():
            place = int(wrong.argmax())
            described = problem.format(row=self.batch["row"][place], part=self.batch["part"][place])
            raise UserError(f"{self.name} {self.first + place}: {described}")


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a file with the columns row and part.")
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                _check_names(path, file.schema_arrow.names)
                for batch in file.iter_batches(columns=COLUMNS.names):
                    yield batch.cast(COLUMNS)
        elif path.suffix == ".csv":
            with csv.open_csv(
                path,
                read_options=csv.ReadOptions(use_threads=False),  # threads lose the line numbers of errors
                parse_options=csv.ParseOptions(ignore_empty_lines=False),
                convert_options=csv.ConvertOptions(column_types=COLUMNS),
            ) as reader:
                _check_names(path, reader.schema.names)
                yield from reader
        else:
            raise UserError(f"{path}: a split is a .csv or a .parquet file.")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _check_names(path: Path, names: list[str]) -> None:
    if sorted(names) != sorted(COLUMNS.names):
        raise UserError(f"{path} has the columns {', '.join(names)}; a split has {', '.join(COLUMNS.names)}.")
