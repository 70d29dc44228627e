"""Click sequences in text: one user a line (`user item item ...`, oldest first), or one event a line (`user item`)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tenrec_jax.data.readers import BOM, SHOWN, bad_rows, open_source, problem_of
from tenrec_jax.data.schema import Kind, Role
from tenrec_jax.errors import UserError

# bytes.split would separate fields at these too, unseen.
FOREIGN_SPACE = (b"\r", b"\v", b"\f")


class Lines(NamedTuple):
    """A file's fields. value: int64, all fields in order. fields: how many stand on each line, int64 [lines]."""

    path: Path
    value: np.ndarray
    fields: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """Place of each line's first field in `value`."""
        return np.cumsum(self.fields) - self.fields


def read_sequences(paths: Sequence[Path], kind: Kind, *, progress: bool) -> pa.Table:
    """Read sequences from one or more files, which are one log together.

    If every line has exactly two fields, a line is an event and a user's lines may stand anywhere; otherwise a line is a
    user. Fields are separated by spaces or tabs. Every event is a click.

    Returns:
        A table with the kind's columns, one row an event, in the order of the files.

    Raises:
        UserError: a field is not an integer of 64 bits, a line is blank or has no item, or a user stands on two lines.
    """
    files = [_read(path, kind, progress=progress) for path in paths]
    if not all((lines.fields == 2).all() for lines in files):
        _refuse_repeated_users(files)
    users, items = [], []
    for lines in files:
        is_item = np.ones(len(lines.value), bool)
        is_item[lines.first] = False
        users.append(np.repeat(lines.value[lines.first], lines.fields - 1))
        items.append(lines.value[is_item])
    user, item = np.concatenate(users), np.concatenate(items)
    columns = {Role.USER: user, Role.ITEM: item, Role.ACTION: np.ones(len(user), np.int8)}
    return pa.table({column.name: columns[column.role] for column in kind.columns})


def _read(path: Path, kind: Kind, *, progress: bool) -> Lines:
    with (
        open_source(path) as file,
        tqdm.wrapattr(
            file, "read", total=path.stat().st_size, desc=path.name, disable=not progress, leave=False, bytes=True
        ) as metered,
    ):
        data = metered.read().removeprefix(BOM).replace(b"\r\n", b"\n")
    if not data:
        raise UserError(f"{path} is empty.")
    for space in FOREIGN_SPACE:
        if space in data:
            line = data[: data.index(space)].count(b"\n") + 1
            raise UserError(f"{path}:{line} holds the byte {space!r}. Separate fields by spaces or tabs, lines by \\n.")
    tokens, fields = data.split(), _fields_per_line(data)
    value = _integers(tokens)
    if value is None or (fields < 2).any():
        _refuse(str(path), tokens, fields, kind)
    return Lines(path, value, fields)


def _fields_per_line(data: bytes) -> np.ndarray:
    character = np.frombuffer(data, np.uint8)
    is_space = (character == ord(" ")) | (character == ord("\t")) | (character == ord("\n"))
    starts = ~is_space & np.concatenate([[True], is_space[:-1]])
    ends = np.flatnonzero(character == ord("\n"))
    if data[-1:] != b"\n":
        ends = np.append(ends, len(data) - 1)
    return np.diff(np.cumsum(starts)[ends], prepend=0)


def _integers(tokens: Sequence[bytes]) -> np.ndarray | None:
    """The tokens as int64, or None if any of them is not a plain integer."""
    strings = pa.array(tokens, pa.binary())
    try:
        value = strings.cast(pa.string()).cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return value.to_numpy() if value.cast(pa.string()).cast(pa.binary()).equals(strings) else None


def _refuse(path: str, tokens: Sequence[bytes], fields: np.ndarray, kind: Kind) -> NoReturn:
    """Raise the error of a file with lines that are too short or fields that are not ids; a line counts once."""
    (user,), (item,) = kind.with_role(Role.USER), kind.with_role(Role.ITEM)
    problem_at: dict[int, str] = {}
    first = np.cumsum(fields) - fields
    for place, line in enumerate(np.repeat(np.arange(len(fields)), fields).tolist()):
        k = place - int(first[line])
        column = user if k == 0 else dataclasses.replace(item, name=f"{item.name} {k}")
        problem = problem_of(column, tokens[place])
        if problem:
            problem_at.setdefault(line, problem)
    for line in np.flatnonzero(fields < 2).tolist():
        problem_at.setdefault(line, "a user without an item" if fields[line] else "blank line")
    lines = sorted(problem_at)[:SHOWN]
    raise bad_rows(path, [line + 1 for line in lines], [problem_at[line] for line in lines], len(problem_at))


def _refuse_repeated_users(files: Sequence[Lines]) -> None:
    user = np.concatenate([lines.value[lines.first] for lines in files])
    order = np.argsort(user, kind="stable")
    again = np.flatnonzero(user[order[1:]] == user[order[:-1]])
    if not len(again):
        return
    earliest = again[np.argmin(order[again + 1])]
    places = [f"{lines.path}:{number}" for lines in files for number in range(1, len(lines.fields) + 1)]
    first, second = (places[line] for line in order[earliest : earliest + 2])
    raise UserError(
        f"{second}: user {user[order[earliest]]} stands on {first} already. With one user a line, each user has one line; "
        "with one event a line, every line holds a user and one item."
    )
