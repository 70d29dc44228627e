"""Click sequences in text: one user a line (`user item item ...`, oldest first), or one event a line (`user item`).

If every line of the log has exactly two fields, a line is an event and a user's lines may stand anywhere; otherwise a line is a user.
Fields are separated by spaces or tabs. Every event is a click. Whether ids are integers or text, `id_types` says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tenrec_jax.data.blocks import ParsedBlock, Piece
from tenrec_jax.data.dictionaries import TextIds
from tenrec_jax.data.id_types import AUTO, LOOKED_AT, typed_id
from tenrec_jax.data.quarantine import BadRow
from tenrec_jax.data.schema import Column, Kind, Role
from tenrec_jax.data.sources import BOM, TextBlock, open_text, text_blocks
from tenrec_jax.data.values import parse, problem_of, text_of
from tenrec_jax.errors import UserError

# bytes.split would separate fields at these too, unseen.
FOREIGN_SPACE = (b"\r", b"\v", b"\f")
USER_AGAIN = (
    "stands on an earlier line already. With one user a line, each user has one line; with one event a line, every line holds a user "
    "and one item"
)


class Lines(NamedTuple):
    """A block's fields, in order, and how many stand on each line, int64 [lines]."""

    fields: list[bytes]
    number: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """Place of each line's first field in `fields`."""
        return np.cumsum(self.number) - self.number


class SequenceLog:
    """Files of sequences, which are one log together.

    Args:
        paths: the files, in order.
        kind: user, item and click.
        ids: what ids are, one of `id_types.ID_TYPES`.

    Raises:
        UserError: a file is empty or is not text with fields between spaces and tabs, or the types of ids cannot be told.
    """

    def __init__(self, paths: Sequence[Path], kind: Kind, ids: str = AUTO) -> None:
        self._paths = paths
        self.categories: tuple[str, ...] = ()
        self._is_pairs = True
        first: tuple[list[bytes], list[bytes]] | None = None
        for block in self._blocks(progress=False):
            lines = _split(block)
            self._is_pairs &= bool((lines.number == 2).all())
            first = first or _first_ids(lines)
        user, item, *others = kind.columns
        typed = [
            typed_id(c, ids, found, f"{paths[0]}:1") for c, found in zip((user, item), first or ([], []), strict=True)
        ]
        self.kind = replace(kind, columns=(*typed, *others))

    def pieces(self, *, progress: bool) -> Iterator[Piece]:
        """The blocks of all files, in order, parsed already: whether a line is good depends on those before it.

        A line counts once, however many of its fields are bad.
        """
        (user_column,), (item_column,) = self.kind.with_role(Role.USER), self.kind.with_role(Role.ITEM)
        earlier = TextIds()
        for block in self._blocks(progress=progress):
            lines = _split(block)
            bad = _bad_lines(block, lines, user_column, item_column)
            if not self._is_pairs:
                bad |= _users_again(block, lines, earlier, bad)
            rows = self._rows(lines, block, bad)
            yield partial(ParsedBlock, rows, [bad[line] for line in sorted(bad)], len(lines.number))

    def _blocks(self, *, progress: bool) -> Iterator[TextBlock]:
        for path in self._paths:
            with open_text(path, progress=progress) as file:
                start = file.read(len(BOM)).removeprefix(BOM)
                empty = True
                for block in text_blocks(file, str(path), start=start):
                    yield block._replace(data=_with_line_ends(block))
                    empty = False
                if empty:
                    raise UserError(f"{path} is empty.")

    def _rows(self, lines: Lines, block: TextBlock, bad: dict[int, BadRow]) -> pa.RecordBatch:
        good = np.ones(len(lines.number), bool)
        good[[line - block.first_line for line in bad]] = False
        user = np.repeat(np.arange(len(lines.number)), np.maximum(lines.number - 1, 0) * good)
        is_item = np.repeat(good, lines.number)
        is_item[lines.first[lines.number > 0]] = False
        item = np.flatnonzero(is_item)
        columns = {
            Role.USER: _typed(self.kind, Role.USER, [lines.fields[place] for place in lines.first[user].tolist()]),
            Role.ITEM: _typed(self.kind, Role.ITEM, [lines.fields[place] for place in item.tolist()]),
            Role.ACTION: pa.array(np.ones(len(item), np.int8)),
        }
        arrays = [columns[column.role] for column in self.kind.columns]
        return pa.RecordBatch.from_arrays(arrays, names=list(self.kind.header))


def _with_line_ends(block: TextBlock) -> bytes:
    data = block.data.replace(b"\r\n", b"\n")
    for space in FOREIGN_SPACE:
        if space in data:
            line = data[: data.index(space)].count(b"\n") + block.first_line
            raise UserError(
                f"{block.path}:{line} holds the byte {space!r}. Separate fields by spaces or tabs, lines by \\n."
            )
    return data


def _split(block: TextBlock) -> Lines:
    character = np.frombuffer(block.data, np.uint8)
    is_space = (character == ord(" ")) | (character == ord("\t")) | (character == ord("\n"))
    starts = ~is_space & np.concatenate([[True], is_space[:-1]])
    ends = np.flatnonzero(character == ord("\n"))
    return Lines(block.data.split(), np.diff(np.cumsum(starts)[ends], prepend=0))


def _first_ids(lines: Lines) -> tuple[list[bytes], list[bytes]]:
    """Users and items of the first `LOOKED_AT` lines."""
    number = lines.number[:LOOKED_AT]
    users = lines.first[:LOOKED_AT][number > 0].tolist()
    is_item = np.ones(int(number.sum()), bool)
    is_item[users] = False
    return [lines.fields[place] for place in users], [lines.fields[place] for place in np.flatnonzero(is_item).tolist()]


def _typed(kind: Kind, role: Role, values: list[bytes]) -> pa.Array:
    (column,) = kind.with_role(role)
    texts = pa.array(values, pa.binary()).cast(pa.string())
    return texts if column.form == "text" else texts.cast(column.dtype)


def _bad_lines(block: TextBlock, lines: Lines, user: Column, item: Column) -> dict[int, BadRow]:
    """The first problem of each line that has one, by line number."""
    bad: dict[int, BadRow] = {}
    if not all(_parses(column, lines.fields) for column in (user, item)):
        problems = {
            column: {value: problem_of(column, value) for value in set(lines.fields)} for column in (user, item)
        }
        line_of_field = np.repeat(np.arange(len(lines.number)), lines.number)
        first = lines.first
        for place, (line, field) in enumerate(zip(line_of_field.tolist(), lines.fields, strict=True)):
            k = place - int(first[line])
            column = user if k == 0 else item
            reason, number = problems[column][field], line + block.first_line
            if reason and number not in bad:
                name = column.name if k == 0 else f"{column.name} {k}"
                bad[number] = BadRow(block.path, number, name, text_of(field), reason)
    for line in np.flatnonzero(lines.number < 2).tolist():
        number = line + block.first_line
        reason = "is a user without an item" if lines.number[line] else "blank line"
        value = text_of(lines.fields[lines.first[line]]) if lines.number[line] else ""
        bad.setdefault(number, BadRow(block.path, number, "", value, reason))
    return bad


def _parses(column: Column, values: list[bytes]) -> bool:
    try:
        return parse(column, pa.array(values, pa.binary()).cast(pa.string())) is not None
    except pa.ArrowInvalid:  # not UTF-8
        return False


def _users_again(block: TextBlock, lines: Lines, earlier: TextIds, bad: dict[int, BadRow]) -> dict[int, BadRow]:
    """Lines of users that stand on an earlier line already."""
    again: dict[int, BadRow] = {}
    good = [line for line in range(len(lines.number)) if line + block.first_line not in bad]
    users = [text_of(lines.fields[lines.first[line]]) for line in good]
    before = earlier.count
    dense = earlier.encode(pa.array(users, pa.string())).tolist()
    for line, user, place in zip(good, users, dense, strict=True):
        if place == before + 1:
            before += 1
        else:
            number = line + block.first_line
            again[number] = BadRow(block.path, number, "user", user, USER_AGAIN)
    return again
