"""Delimited text with a header line: Tenrec's files, whose columns are fixed, and a user's own, whose columns are mapped by name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tenrec_jax.data.blocks import Layout, Piece, parse_block, split_quoted
from tenrec_jax.data.id_types import AUTO, LOOKED_AT, typed_id
from tenrec_jax.data.schema import Column, Kind, Role, kinds_with_header
from tenrec_jax.data.sources import first_line_of, open_text, text_blocks
from tenrec_jax.errors import UserError

SEPARATORS = ",;\t|"


class CsvLog:
    """Files with a header line each, which are one log together.

    Args:
        paths: the files, in order.
        kind: their columns.
        ids: what the ids of a mapped kind are, one of `id_types.ID_TYPES`.

    Attributes:
        kind: the columns as they are, with the types of ids.

    Raises:
        UserError: a file cannot be read, its header is not as it should be, it holds no rows, or the types of ids cannot be told.
    """

    def __init__(self, paths: Sequence[Path], kind: Kind, ids: str = AUTO) -> None:
        self._paths, self.kind = paths, kind
        self.categories: tuple[str, ...] = ()
        if kind.mapped:
            self.kind = _with_id_types(paths[0], kind, ids)
        self._layouts = [_layout(path, self.kind) for path in paths]

    def pieces(self, *, progress: bool) -> Iterator[Piece]:
        """The blocks of all files, in order."""
        for path, layout in zip(self._paths, self._layouts, strict=True):
            with open_text(path, progress=progress) as file:
                _, rest = first_line_of(file, str(path))
                for block in text_blocks(file, str(path), first_line=2, start=rest):
                    yield partial(parse_block, block, layout)


def _layout(path: Path, kind: Kind) -> Layout:
    line, has_rows = _header(path)
    layout = _mapped_layout(path, line, kind) if kind.mapped else _fixed_layout(path, line, kind)
    if not has_rows:
        raise UserError(f"{path} holds a header line and no rows.")
    return layout


def _fixed_layout(path: Path, line: str, kind: Kind) -> Layout:
    found = tuple(line.split(","))
    if found != kind.header:
        raise UserError(
            f"{path}:1: not the header of {kind.name}: {_header_problem(found, kind)}.\n"
            f"  expected: {','.join(kind.header)}\n  found:    {line[:1000]}"
        )
    return Layout(kind.header, kind.columns)


def _header(path: Path) -> tuple[str, bool]:
    """The first line of a file, and whether anything follows it."""
    with open_text(path) as file:
        line, rest = first_line_of(file, str(path))
        has_rows = bool(rest or file.read(1))
    if b"\0" in line:
        raise UserError(
            f"{path}:1 holds a NUL byte: this is not a text file in UTF-8. Convert it, or unpack it if it is an archive."
        )
    if b"\r" in line:
        raise UserError(
            f"{path}:1 holds a carriage return inside the line. Lines must end with \\n or \\r\\n; convert the file."
        )
    if not line.strip():
        raise UserError(f"{path}:1 is blank. Put the header line first.")
    try:
        return line.decode(), has_rows
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:1 is not UTF-8 ({error}). Convert the file to UTF-8.") from None


def header_of(path: Path) -> tuple[str, ...]:
    """The fields of a comma-separated file's header."""
    return tuple(_header(path)[0].split(","))


def _mapped_layout(path: Path, line: str, kind: Kind) -> Layout:
    """The layout of a file whose columns are found by name; the separator is the one with which they are."""
    wanted = set(kind.header)
    if line.count('"') % 2:
        raise UserError(f"{path}:1 holds an unbalanced quote. Close it; a name may not go on over several lines.")
    separator = max(SEPARATORS, key=lambda s: (len(wanted & set(_fields(line, s))), -SEPARATORS.index(s)))
    fields = _fields(line, separator)
    missing = [name for name in kind.header if name not in fields]
    if missing:
        raise UserError(
            f"{path}:1: there is no column {', '.join(map(repr, missing))}. The columns are {', '.join(fields)[:1000]}. "
            "Correct the mapping of columns."
        )
    twice = [name for name in kind.header if fields.count(name) > 1]
    if twice:
        raise UserError(f"{path}:1: column {twice[0]} stands {fields.count(twice[0])} times. Name the columns apart.")
    # Columns that are not read may share names; the reader needs distinct ones.
    distinct = tuple(name if name in wanted else f"{place}: {name}" for place, name in enumerate(fields))
    return Layout(distinct, kind.columns, separator, quoted=True)


def _fields(line: str, separator: str) -> list[str]:
    """The fields of a line; none if its quotes are not as they should be."""
    return split_quoted(line, separator) or []


def _with_id_types(path: Path, kind: Kind, ids: str) -> Kind:
    """The kind with integer ids where those of the file's first rows are integers."""
    layout = _layout(path, kind)
    with open_text(path) as file:
        _, rest = first_line_of(file, str(path))
        lines = next(text_blocks(file, str(path), first_line=2, start=rest)).data.split(b"\n", LOOKED_AT)[:LOOKED_AT]
    rows = [_fields(line.decode("latin-1").removesuffix("\r"), layout.separator) for line in lines]
    whole = [row for row in rows if len(row) == len(layout.fields)]
    place = f"{path}:{2 + rows.index(whole[0])}" if whole else str(path)

    def typed(column: Column) -> Column:
        if column.role not in (Role.USER, Role.ITEM):
            return column
        at = layout.fields.index(column.name)
        return typed_id(column, ids, [row[at].encode("latin-1") for row in whole], place)

    return replace(kind, columns=tuple(map(typed, kind.columns)))


def _header_problem(found: tuple[str, ...], kind: Kind) -> str:
    expected, others = kind.header, kinds_with_header(found)
    if others:
        return f"these are the {len(found)} columns of {' and '.join(others)}; use --kind {' or '.join(others)}"
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?|\\N|True|False", name) for name in found):
        return "the first line holds values; put the header line in front of it"
    separators = [separator for separator in SEPARATORS[1:] if len(found) == 1 and separator in found[0]]
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
