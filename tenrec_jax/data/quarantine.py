"""Rows that are not as they should be: all counted and written down, the first ones named."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from tenrec_jax.errors import UserError

FILE = "quarantine.csv"
HEADER = ("file", "line", "column", "value", "reason")
SHOWN, SHOWN_CHARACTERS = 10, 60


class BadRow(NamedTuple):
    """A row that was refused. `value` is what stands in the file, as text; `column` is empty where the whole line is meant."""

    file: str
    line: int
    column: str
    value: str
    reason: str

    def __str__(self) -> str:
        column = f"column {self.column}: " if self.column else ""
        value = f"{shown(self.value)} " if self.value or self.column else ""
        return f"{self.file}:{self.line}: {column}{value}{self.reason}"


class Quarantine:
    """Writes bad rows to a CSV file, which exists only if there are any, and keeps the first ones for messages."""

    def __init__(self, path: Path) -> None:
        self._path, self.total = path, 0
        self._first: list[BadRow] = []
        self._file: TextIO | None = None

    def add(self, rows: Iterable[BadRow]) -> None:
        """Add bad rows, in the order of their lines."""
        for row in rows:
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8", newline="")
                csv.writer(self._file, lineterminator="\n").writerow(HEADER)
            csv.writer(self._file, lineterminator="\n").writerow(row)
            self.total += 1
            if len(self._first) < SHOWN:
                self._first.append(row)

    def close(self) -> None:
        """Flush the file to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def error(self, rows: int, max_bad_fraction: float, kept_at: Path) -> UserError:
        """The error of a log of which too many of `rows` rows are bad; they are listed in the file `kept_at`."""
        limit = f", more than max_bad_fraction {max_bad_fraction:g} allows" if max_bad_fraction else ""
        return bad_rows(self._first, self.total, f" of {rows:,}{limit}", f" All are listed in {kept_at}.")


def bad_rows(first: Iterable[BadRow], total: int, extent: str = "", where: str = "") -> UserError:
    """The error that names the first of `total` bad rows."""
    first = list(first)
    count = ("1 bad row" if total == 1 else f"{total:,} bad rows") + extent
    count += f"; the first {len(first)}" if total > len(first) else ""
    listing = "\n".join(f"  {row}" for row in first)
    return UserError(
        f"{first[0].file} holds {count}:\n{listing}\nNo table was written.{where} Correct the file or fetch it again."
    )


def shown(value: str) -> str:
    """A value for a message: quoted, escaped, and cut where it is long."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "...")
