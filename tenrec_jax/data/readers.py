"""Text files read strictly: every value is checked, and what is wrong is named by file, line, column and value."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from tqdm import tqdm

from tenrec_jax.data.schema import NULL, Column, Kind, kinds_with_header
from tenrec_jax.errors import UserError

BLOCK_BYTES = 4 << 20
HEADER_BYTES = 1 << 16
SHOWN, SHOWN_CHARACTERS = 10, 60
NUMBER = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
BOM = b"\xef\xbb\xbf"


class BadRows:
    """Counts the bad rows of a file and keeps the first ones.

    Args:
        path: the file's name in messages.
    """

    def __init__(self, path: str) -> None:
        self._path, self._total = path, 0
        self._first: list[tuple[int, str]] = []

    def add(self, lines: Sequence[int], problems: Sequence[str], total: int) -> None:
        """Add `total` bad rows, of which `problems` describes the first ones, at `lines`."""
        self._total += total
        self._first = sorted([*self._first, *zip(lines, problems, strict=True)])[:SHOWN]

    def raise_if_any(self) -> None:
        """Raise the error that lists the first bad rows, if there are any."""
        if self._total:
            lines, problems = [line for line, _ in self._first], [problem for _, problem in self._first]
            raise bad_rows(self._path, lines, problems, self._total)


def bad_rows(path: str, lines: Sequence[int], problems: Sequence[str], total: int) -> UserError:
    """The error of a file with `total` bad rows, the first of them described."""
    listing = "\n".join(f"  {path}:{line}: {problem}" for line, problem in zip(lines, problems, strict=True))
    count = "1 bad row" if total == 1 else f"{total:,} bad rows"
    count += f"; the first {len(lines)}" if total > len(lines) else ""
    return UserError(f"{path} holds {count}:\n{listing}\nNothing was written. Correct the file or fetch it again.")


def open_source(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        UserError: it is missing, a folder or empty, or cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file inside it.")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not path.stat().st_size:
        file.close()
        raise UserError(f"{path} is empty.")
    return file


def read_csv(path: Path, kind: Kind, *, progress: bool) -> Iterator[pa.RecordBatch]:
    """Read a comma-separated file with one header line, block by block.

    A UTF-8 byte order mark and CRLF line ends are accepted; quotes, blank lines and surrounding spaces are not.

    Args:
        path: the file.
        kind: its columns.
        progress: whether to show a bar on standard error.

    Yields:
        Batches whose columns are the kind's, in its types, null where the file has an allowed `\\N`.

    Raises:
        UserError: the file, its header or any row is not as it should be. Rows before a bad one are yielded first.
    """
    with open_source(path) as file:
        _check_header(path, file, kind)
        file.seek(0)
        bar = tqdm.wrapattr(
            file, "read", total=path.stat().st_size, desc=path.name, disable=not progress, leave=False, bytes=True
        )
        with bar as metered:
            yield from read_delimited(metered, str(path), kind.columns, separator=",", has_header=True)


def read_delimited(
    file: BinaryIO, path: str, columns: Sequence[Column], *, separator: str, has_header: bool
) -> Iterator[pa.RecordBatch]:
    """Read delimited text block by block; arguments, result and errors as in `read_csv`. The header is not looked at."""
    bad, wrong_counts = BadRows(path), list[int]()

    def on_wrong_count(row: pa.csv.InvalidRow) -> str:
        wrong_counts.append(row.number)
        problem = f"{row.actual_columns} fields instead of {row.expected_columns}: {_shown(_bytes_of(row.text))}"
        bad.add([row.number], [problem], 1)
        return "skip"

    first_line, rows = 1 + has_header, 0
    try:
        reader = pa.csv.open_csv(
            file,
            # One thread, because rows have no numbers with several.
            read_options=pa.csv.ReadOptions(
                use_threads=False,
                block_size=BLOCK_BYTES,
                # Any bytes are valid Latin-1; as UTF-8, a bad row that is not would reach no handler.
                encoding="latin-1",
                skip_rows=int(has_header),
                column_names=[column.name for column in columns],
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=separator,
                quote_char=False,
                double_quote=False,
                ignore_empty_lines=False,
                invalid_row_handler=on_wrong_count,
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types={column.name: pa.string() for column in columns},
                null_values=[],
                strings_can_be_null=False,
            ),
        )
        for block in reader:
            parsed = [_parse(column, strings) for column, strings in zip(columns, block.columns, strict=True)]
            if any(values is None for values in parsed):
                _describe(block, columns, parsed, bad, partial(_line, rows + first_line, wrong_counts))
            else:
                yield pa.RecordBatch.from_arrays(parsed, names=block.schema.names)
            rows += block.num_rows
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as text separated by {separator!r}: {error}") from error
    bad.raise_if_any()


def _line(first_line: int, wrong_counts: Sequence[int], row: int) -> int:
    """Line of a row, both counted among rows with the right number of fields, if `wrong_counts` are the other lines."""
    line = first_line + row
    for skipped in sorted(wrong_counts):
        if skipped > line:
            break
        line += 1
    return line


def _parse(column: Column, strings: pa.StringArray) -> pa.Array | None:
    """The column's values, or None if any of them is not allowed."""
    if column.nullable:
        strings = pc.if_else(pc.equal(strings, NULL), None, strings)
    is_integer = column.dtype.startswith("int")
    try:
        values = strings.cast(pa.int64() if is_integer else pa.float64())
    except pa.ArrowInvalid:
        return None
    # The cast takes more than numbers as people write them: 007, 0x1F, nan. An integer written back must be what was read.
    plain = pc.equal(values.cast(pa.string()), strings) if is_integer else pc.match_substring_regex(strings, NUMBER)
    extremes = pc.min_max(values)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    in_range = low is None or column.low <= low <= high <= column.high
    return values.cast(column.dtype) if in_range and pc.all(plain, min_count=0).as_py() else None


def _describe(
    block: pa.RecordBatch,
    columns: Sequence[Column],
    parsed: Sequence[pa.Array | None],
    bad: BadRows,
    line_of: Callable[[int], int],
) -> None:
    """Find the bad rows of a block of which some column could not be parsed."""
    problem_at: dict[int, str] = {}
    is_bad = np.zeros(block.num_rows, bool)
    for column, strings, values in zip(columns, block.columns, parsed, strict=True):
        if values is not None:
            continue
        texts = strings.dictionary_encode()
        problems = [problem_of(column, _bytes_of(text)) for text in texts.dictionary.to_pylist()]
        wrong = np.asarray([bool(problem) for problem in problems])[texts.indices.to_numpy()]
        for row in np.flatnonzero(wrong)[:SHOWN]:
            problem_at.setdefault(int(row), problems[texts.indices[int(row)].as_py()])
        is_bad |= wrong
    for row in problem_at:
        if all(not strings[row].as_buffer().size for strings in block.columns):
            problem_at[row] = "blank line"
    rows = sorted(problem_at)[:SHOWN]
    if not rows:
        raise RuntimeError("a block could not be parsed although each of its values is allowed")
    bad.add([line_of(row) for row in rows], [problem_at[row] for row in rows], int(is_bad.sum()))


def problem_of(column: Column, value: bytes) -> str:
    """What is wrong with a value, naming the column and the value; empty if nothing is."""
    text = value.decode("ascii", "replace")
    if column.nullable and text == NULL:
        return ""
    if not value:
        return f"column {column.name} is empty"
    noun = "an integer" if column.dtype.startswith("int") else "a number"
    if b"\0" in value:
        reason = "holds a NUL byte"
    elif not value.isascii():
        reason = f"is not {noun} in ASCII digits"
    elif noun == "an integer" and not re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text):
        reason = "is not a plain integer of at most 19 digits"
    elif noun == "a number" and not re.match(NUMBER, text):
        reason = "is not a plain number"
    elif not column.low <= (int(text) if noun == "an integer" else float(text)) <= column.high:
        reason = f"is not between {column.low} and {column.high}"
    else:
        return ""
    return f"column {column.name}: {_shown(value)} {reason}" + (f", nor {NULL}" if column.nullable else "")


def _bytes_of(text: str) -> bytes:
    """The bytes in the file of text that was read as Latin-1."""
    return text.encode("latin-1")


def _shown(value: bytes) -> str:
    text = value.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _check_header(path: Path, file: BinaryIO, kind: Kind) -> None:
    """Raises:
    UserError: the first line is not the kind's header, or nothing follows it.
    """
    line = file.readline(HEADER_BYTES).removeprefix(BOM).split(b"\r")[0].rstrip(b"\n")
    if b"\0" in line:
        raise UserError(f"{path}:1 holds a NUL byte: this is not a text file in UTF-8.")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:1 is not UTF-8 ({error}). Convert the file to UTF-8.") from None
    found = tuple(text.split(","))
    if found != kind.header:
        raise UserError(
            f"{path}:1: not the header of {kind.name}: {_header_problem(found, kind)}.\n"
            f"  expected: {','.join(kind.header)}\n  found:    {text[:1000]}"
        )
    file.seek(0)
    rest = file.read(len(BOM) + len(line) + 3).removeprefix(BOM)[len(line) :]
    if rest in (b"", b"\n", b"\r", b"\r\n"):
        raise UserError(f"{path} holds a header line and no rows.")


def _header_problem(found: tuple[str, ...], kind: Kind) -> str:
    expected, others = kind.header, kinds_with_header(found)
    if others:
        return f"these are the {len(found)} columns of {' and '.join(others)}; use --kind {' or '.join(others)}"
    if all(re.fullmatch(r"-?[0-9]+|\\N", name) for name in found):
        return "the first line holds values; put the header line in front of it"
    separators = [separator for separator in ";\t|" if len(found) == 1 and separator in found[0]]
    if separators:
        return f"the fields are separated by {separators[0]!r}; they must be separated by commas"
    problems = [f"column {name} is missing" for name in expected if name not in found]
    problems += [f"column {name!r} is unknown" for name in dict.fromkeys(found) if name not in expected]
    problems += [f"column {name} stands {found.count(name)} times" for name in expected if found.count(name) > 1]
    if not problems:
        problems = [
            f"column {place} should be {wanted} and is {name}"
            for place, (wanted, name) in enumerate(zip(expected, found, strict=True), 1)
            if wanted != name
        ]
    return "; ".join(problems)
