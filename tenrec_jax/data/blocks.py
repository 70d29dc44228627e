"""A block of lines to typed columns and bad rows: a pure function, the same in every process and on every engine.

A clean block costs one pass of Arrow's CSV reader straight into the columns' types, and a check that nothing was read leniently:
written plainly, the values, separators and line ends must take exactly as many bytes as the block has, since every other way to
write an integer (007, +7, blanks) is longer, and the one that need not be (0x..) shows by its letter. A block that fails this is
read again as text, column by column, and if that finds something wrong, line by line and value by value, which tells each bad row
and its reason.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from tenrec_jax.data.arrow import as_arrow, as_numpy
from tenrec_jax.data.quarantine import BadRow
from tenrec_jax.data.schema import Column
from tenrec_jax.data.sources import TextBlock
from tenrec_jax.data.values import parse, problem_of, text_of

_POWERS = 10 ** np.arange(1, 19, dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """How lines are made.

    Attributes:
        fields: names of a line's fields, in order.
        columns: those that are read, in the order of the result.
        separator: one character.
        quoted: whether a field may stand in double quotes (on one line).
    """

    fields: tuple[str, ...]
    columns: tuple[Column, ...]
    separator: str = ","
    quoted: bool = False


class ParsedBlock(NamedTuple):
    """The good rows of a block with the layout's columns, and its bad rows. `lines` counts both."""

    rows: pa.RecordBatch
    bad: list[BadRow]
    lines: int


# A part of a log that is yet to be parsed. It can be pickled, and any process that calls it gets the same result.
Piece = Callable[[], ParsedBlock]


def parse_block(block: TextBlock, layout: Layout) -> ParsedBlock:
    """Read a block of lines.

    Args:
        block: whole lines. CRLF line ends are accepted; blank lines and lone carriage returns make a row bad.
        layout: of its lines.
    """
    data = block.data
    if b"\r" in data and data.count(b"\r") == data.count(b"\r\n") == data.count(b"\n"):
        data = data.replace(b"\r\n", b"\n")
    rows = _read_plain(data, layout)
    if rows is None:
        rows = _read_as_text(data, layout)
    return _read_strictly(block, layout) if rows is None else ParsedBlock(rows, [], rows.num_rows)


def _read_plain(data: bytes, layout: Layout) -> pa.RecordBatch | None:
    """The rows of a block in which nothing is wrong; None where something is, or where only a closer look can tell."""
    fixed = layout.fields == tuple(column.name for column in layout.columns) and not layout.quoted
    if not fixed or not all(column.is_integer and column.form == "plain" for column in layout.columns):
        return None
    if b"x" in data or b"X" in data or b"\r" in data or b"\0" in data:
        return None
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=_read_options(layout.fields, len(data)),
            parse_options=_parse_options(layout),
            convert_options=pa.csv.ConvertOptions(
                column_types={column.name: column.dtype for column in layout.columns},
                null_values=sorted({null for column in layout.columns for null in column.nulls}),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        return None
    rows = table.combine_chunks().to_batches()[0] if table.num_rows else None
    if rows is None or rows.num_rows != data.count(b"\n"):
        return None
    size = rows.num_rows * len(layout.columns)  # separators and line ends
    for column, values in zip(layout.columns, rows.columns, strict=True):
        if values.null_count and not column.nulls:
            return None
        length = _written_length(column, values)
        if length is None:
            return None
        size += length
    return rows if size == len(data) else None


def _written_length(column: Column, values: pa.Array) -> int | None:
    """Bytes that the values take when integers are written plainly; None if one is out of the column's range."""
    extremes = pc.min_max(values)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    nulls = values.null_count * len(column.nulls[0]) if values.null_count else 0
    if low is None:
        return nulls
    if not (column.low <= low and high <= column.high):
        return None
    digits = len(values) - values.null_count
    if high > 9 or low < 0:
        number = as_numpy(values.drop_null()) if values.null_count else as_numpy(values)
        if low < 0:
            return None
        digits += sum(int(np.count_nonzero(number >= power)) for power in _POWERS if power <= high)
    return digits + nulls


def _read_as_text(data: bytes, layout: Layout) -> pa.RecordBatch | None:
    """As `_read_plain`, for columns that must be looked at as they are written."""
    if b"\r" in data or b"\n\n" in data or data.startswith(b"\n") or (layout.quoted and b'"' in data):
        return None
    try:
        texts = _texts(data, layout)
        columns = [
            parse(column, text_R.cast(pa.string())) for column, text_R in zip(layout.columns, texts, strict=True)
        ]
    except pa.ArrowInvalid:
        return None
    if any(values is None for values in columns) or len(texts[0]) != data.count(b"\n"):
        return None
    return pa.RecordBatch.from_arrays(columns, names=[column.name for column in layout.columns])


def _read_strictly(block: TextBlock, layout: Layout) -> ParsedBlock:
    """Line by line: which rows are bad and why, and the others."""
    lines = block.data.split(b"\n")[:-1]
    bad: list[BadRow] = []
    numbers, kept = [], []
    for number, line in enumerate(lines, block.first_line):
        line = line.removesuffix(b"\r")
        problem = _line_problem(line, layout)
        if problem:
            bad.append(BadRow(block.path, number, "", text_of(line), problem))
        else:
            numbers.append(number)
            kept.append(line)
    texts = _texts(b"".join(line + b"\n" for line in kept), layout)
    if len(texts[0]) != len(kept):
        raise RuntimeError(f"{block.path}: {len(kept)} lines were read as {len(texts[0])} rows")
    is_bad = np.zeros(len(kept), bool)
    for column, text_R in zip(layout.columns, texts, strict=True):
        if not _is_clean(column, text_R):
            _find_bad(block.path, column, text_R, numbers, is_bad, bad)
    good = as_arrow(~is_bad)
    columns = [_parsed(column, text_R.filter(good)) for column, text_R in zip(layout.columns, texts, strict=True)]
    rows = pa.RecordBatch.from_arrays(columns, names=[column.name for column in layout.columns])
    return ParsedBlock(rows, sorted(bad, key=lambda row: row.line), len(lines))


def _line_problem(line: bytes, layout: Layout) -> str:
    """What is wrong with a line as a whole; empty if nothing is."""
    if not line:
        return "blank line"
    if b"\r" in line:
        return "holds a carriage return inside the line"
    if layout.quoted and b'"' in line:
        if line.count(b'"') % 2:
            return "holds an unbalanced quote"
        found = split_quoted(line.decode("latin-1"), layout.separator)
        if found is None:
            return "holds a field that goes on behind its closing quote"
        fields = len(found)
    else:
        fields = line.count(layout.separator.encode()) + 1
    return "" if fields == len(layout.fields) else f"has {fields} fields instead of {len(layout.fields)}"


def split_quoted(line: str, separator: str) -> list[str] | None:
    """The fields of a line, each of which may stand in double quotes; None if quotes are not as they should be.

    Python's csv module is not asked: it has a longest field, and takes what follows a closing quote for a part of the field.
    """
    plain = f"[^{re.escape(separator)}]"
    field = re.compile(f'"((?:[^"]|"")*+)"|((?!"){plain}*+)')
    fields, at = [], 0
    while match := field.match(line, at):
        quoted, bare = match.groups()
        fields.append(bare if quoted is None else quoted.replace('""', '"'))
        at = match.end() + 1
        if at > len(line):
            return fields
        if line[match.end()] != separator:
            return None
    return None


def _texts(data: bytes, layout: Layout) -> list[pa.BinaryArray]:
    """The fields of lines, for the layout's columns, as bytes."""
    if not data:
        return [pa.array([], pa.binary()) for _ in layout.columns]
    table = pa.csv.read_csv(
        pa.BufferReader(data),
        read_options=_read_options(layout.fields, len(data)),
        parse_options=_parse_options(layout),
        convert_options=pa.csv.ConvertOptions(
            include_columns=[column.name for column in layout.columns],
            column_types={column.name: pa.binary() for column in layout.columns},
            null_values=[],
            strings_can_be_null=False,
        ),
    )
    return [table[column.name].combine_chunks() for column in layout.columns]


def _find_bad(
    path: str, column: Column, text_R: pa.BinaryArray, numbers: list[int], is_bad: np.ndarray, bad: list[BadRow]
) -> None:
    """Add the rows that this column makes bad and no column before it."""
    encoded = text_R.dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    problems = [problem_of(column, value) for value in distinct]
    index_R = as_numpy(encoded.indices)
    wrong_R = np.asarray([bool(problem) for problem in problems], bool)[index_R]
    for row in np.flatnonzero(wrong_R & ~is_bad).tolist():
        value = distinct[index_R[row]]
        bad.append(BadRow(path, numbers[row], column.name, text_of(value), problems[index_R[row]]))
    is_bad |= wrong_R


def _parsed(column: Column, text_R: pa.BinaryArray) -> pa.Array:
    values = parse(column, text_R.cast(pa.string()))
    if values is None:
        raise RuntimeError(f"column {column.name} could not be parsed although each of its values is allowed")
    return values


def _is_clean(column: Column, text_R: pa.BinaryArray) -> bool:
    try:
        return parse(column, text_R.cast(pa.string())) is not None
    except pa.ArrowInvalid:  # not UTF-8
        return False


def _read_options(fields: tuple[str, ...], size: int) -> pa.csv.ReadOptions:
    return pa.csv.ReadOptions(use_threads=False, block_size=size + 1, column_names=list(fields))


def _parse_options(layout: Layout) -> pa.csv.ParseOptions:
    quote = '"' if layout.quoted else False
    return pa.csv.ParseOptions(
        delimiter=layout.separator, quote_char=quote, double_quote=layout.quoted, ignore_empty_lines=False
    )
