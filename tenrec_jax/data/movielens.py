"""MovieLens-100K as a log: click = rating of 4 or more, like = rating of 5. Its terms forbid passing it on: name your copy.

The files are found anywhere in a folder or zip archive (a wheel is one), in GroupLens' own or RecBole's edition.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.data.blocks import Layout, ParsedBlock, Piece, parse_block
from tenrec_jax.data.quarantine import SHOWN, BadRow, bad_rows
from tenrec_jax.data.schema import GENDERS, MOVIELENS_LAYOUTS, Column, Kind, MovieLensLayout, Role
from tenrec_jax.data.sources import TextBlock
from tenrec_jax.data.values import problem_of, text_of
from tenrec_jax.errors import UserError

CLICK_RATING, LIKE_RATING = 4, 5
OLDEST = 150


class Member(NamedTuple):
    """A file of the data set: its path for messages and its bytes."""

    path: str
    data: bytes


def movielens_files(source: Path) -> list[Path]:
    """The files on disk that determine the log: the archive, or the three files of the folder.

    Raises:
        UserError: the source is missing, neither folder nor zip archive, or lacks a file.
    """
    if not source.is_dir():
        _names(source)
        return [source]
    _, names = _find(source)
    return [source / name for name in names]


class MovieLensLog:
    """The data set. Gender is M = 1, F = 2; age is 1 + years // 10; the category is the item's first genre, numbered from 1 in the
    sorted order of genre names.

    Raises:
        UserError: as `movielens_files`, or a row of users or items is not as it should be.
    """

    def __init__(self, source: Path, kind: Kind) -> None:
        self.kind = kind
        self._layout, names = _find(source)
        self._ratings, users, items = (_member(source, name) for name in names)
        self._paths = self._ratings.path, users.path, items.path
        self._users = _users(users, kind, self._layout)
        *self._items, self.categories = _items(items, kind, self._layout)

    def pieces(self, *, progress: bool) -> Iterator[Piece]:
        """All ratings, in the order of the file, parsed already: they are few."""
        parsed, lines = _parse_ratings(self._ratings, self.kind, self._layout)
        kind, rows = self.kind, parsed.rows
        user, item, rating = (
            as_numpy(rows[kind.with_role(role)[0].name]) for role in (Role.USER, Role.ITEM, Role.POST_EXPOSURE)
        )
        (user_id, gender, age), (item_id, category) = self._users, self._items
        ratings, users, items = self._paths
        bad = list(parsed.bad)
        user_at = _places(user, user_id, lines, BadRow(ratings, 0, "user_id", "", f"is not in {users}"), bad)
        item_at = _places(item, item_id, lines, BadRow(ratings, 0, "item_id", "", f"is not in {items}"), bad)
        known = np.flatnonzero((user_at >= 0) & (item_at >= 0))
        user_at, item_at, rating = user_at[known], item_at[known], rating[known]
        click, like = kind.actions
        derived = {
            click: pa.array(rating >= CLICK_RATING).cast("int8"),
            like: pa.array(rating == LIKE_RATING).cast("int8"),
            "gender": pa.array(gender[user_at]),
            "age": pa.array(age[user_at]),
            "category": pa.array(category[item_at], mask=category[item_at] < 0),
        }
        rows = rows.take(pa.array(known))
        columns = {c.name: rows[c.name] if c.name in rows.schema.names else derived[c.feature] for c in kind.columns}
        rows = pa.RecordBatch.from_pydict(columns)
        yield partial(ParsedBlock, rows, sorted(bad, key=lambda row: row.line), parsed.lines)


def _find(source: Path) -> tuple[MovieLensLayout, list[str]]:
    """The edition that the source holds, and its ratings, users and items files."""
    names = _names(source)
    for layout in MOVIELENS_LAYOUTS:
        found = [name for name in names if PurePosixPath(name).name == layout.ratings]
        if len(found) > 1:
            raise UserError(f"{source} holds {layout.ratings} {len(found)} times: {', '.join(found)}. Name one folder.")
        if found:
            wanted = [
                str(PurePosixPath(found[0]).with_name(name)) for name in (layout.ratings, layout.users, layout.items)
            ]
            missing = [name for name in wanted if name not in names]
            if missing:
                raise UserError(f"{source} holds {found[0]} but not {' and '.join(missing)}.")
            return layout, wanted
    raise UserError(
        f"{source} holds no MovieLens-100K: neither {' nor '.join(layout.ratings for layout in MOVIELENS_LAYOUTS)}. "
        "Name the folder or zip archive of ml-100k (https://grouplens.org/datasets/movielens/100k/)."
    )


def _names(source: Path) -> list[str]:
    if source.is_dir():
        wanted = {name for layout in MOVIELENS_LAYOUTS for name in (layout.ratings, layout.users, layout.items)}
        return sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.name in wanted)
    if not source.exists():
        raise UserError(f"There is no file or folder {source}.")
    try:
        with zipfile.ZipFile(source) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        raise UserError(
            f"{source} is not a zip archive. Name the archive, or the folder that holds the files."
        ) from None


def _member(source: Path, name: str) -> Member:
    path = str(source / name)
    if source.is_dir():
        data = (source / name).read_bytes()
    else:
        try:
            with zipfile.ZipFile(source) as archive:
                data = archive.read(name)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}. Fetch the archive again.") from error
    if not data.strip():
        raise UserError(f"{path} is empty.")
    return Member(path, data)


def _parse_ratings(member: Member, kind: Kind, layout: MovieLensLayout) -> tuple[ParsedBlock, np.ndarray]:
    """The ratings, and the line of each good row."""
    roles = (Role.USER, Role.ITEM, Role.POST_EXPOSURE, Role.TIME)
    columns = tuple(kind.with_role(role)[0] for role in roles)
    data = member.data
    if layout.has_header:
        _check_header(member, layout.ratings_fields, "\t")
        data = data.partition(b"\n")[2]
    if not data.strip():
        raise UserError(f"{member.path} holds a header line and no rows.")
    first_line = 1 + layout.has_header
    block = TextBlock(member.path, first_line, data if data.endswith(b"\n") else data + b"\n")
    parsed = parse_block(block, Layout(tuple(column.name for column in columns), columns, separator="\t"))
    bad = [row.line for row in parsed.bad]
    return parsed, np.setdiff1d(np.arange(first_line, first_line + parsed.lines), bad)


def _users(member: Member, kind: Kind, layout: MovieLensLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, genders and ages, by ascending id."""
    (id_column,) = kind.with_role(Role.USER)
    years = Column("age", Role.USER_FEATURE, "int32", 0, OLDEST)
    bad: list[BadRow] = []
    rows, ids = {}, set[bytes]()
    for line, fields in _rows(member, layout.user_fields, layout, bad):
        identity, age, gender = fields[:3]
        problems = [
            (id_column.name, identity, problem_of(id_column, identity)),
            (years.name, age, problem_of(years, age) if age else ""),
            ("gender", gender, "" if gender.decode(layout.encoding) in GENDERS else "is neither M nor F"),
        ]
        problems.append((id_column.name, identity, "stands on an earlier line" if identity in ids else ""))
        found = [
            BadRow(member.path, line, name, text_of(value), problem) for name, value, problem in problems if problem
        ]
        bad += found[:1]
        ids.add(identity)
        if not found:
            rows[int(identity)] = (GENDERS[gender.decode(layout.encoding)], 1 + int(age) // 10 if age else 0)
    _refuse(bad)
    user_id = np.asarray(sorted(rows), np.int64)
    gender_age = np.asarray([rows[user] for user in user_id.tolist()], np.int8)
    return user_id, gender_age[:, 0], gender_age[:, 1]


def _items(member: Member, kind: Kind, layout: MovieLensLayout) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Ids and the places of first genres (-1: none), by ascending id; the genres, sorted."""
    (id_column,) = kind.with_role(Role.ITEM)
    bad: list[BadRow] = []
    rows, ids = {}, set[bytes]()
    for line, fields in _rows(member, layout.item_fields, layout, bad):
        problem = problem_of(id_column, fields[0])
        if not problem and fields[0] in ids:
            problem = "stands on an earlier line"
        ids.add(fields[0])
        if layout.genre_flags and not set(fields[layout.genres_from :]) <= {b"0", b"1"}:
            problem = problem or "has a genre flag that is neither 0 nor 1"
        if problem:
            bad.append(BadRow(member.path, line, id_column.name, text_of(fields[0]), problem))
        else:
            rows[int(fields[0])] = _genres(fields, layout)
    _refuse(bad)
    genres = sorted({genre for row in rows.values() for genre in row})
    item_id = np.asarray(sorted(rows), np.int64)
    first = [genres.index(rows[item][0]) if rows[item] else -1 for item in item_id.tolist()]
    return item_id, np.asarray(first, np.int8), tuple(genres)


def _genres(fields: Sequence[bytes], layout: MovieLensLayout) -> list[str]:
    values = fields[layout.genres_from :]
    if layout.genre_flags:
        return [name for name, flag in zip(layout.genre_flags, values, strict=True) if flag == b"1"]
    return values[0].decode(layout.encoding).split()


def _rows(
    member: Member, names: Sequence[str], layout: MovieLensLayout, bad: list[BadRow]
) -> list[tuple[int, list[bytes]]]:
    """Line numbers and fields of the rows with the right number of fields."""
    if layout.has_header:
        _check_header(member, names, layout.separator)
    try:
        member.data.decode(layout.encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{member.path} is not {layout.encoding.upper()}: {error}.") from None
    # Not splitlines: in latin-1 some letters would end a line.
    lines = member.data.rstrip(b"\r\n").split(b"\n")
    rows = []
    for number, line in enumerate(lines[layout.has_header :], 1 + layout.has_header):
        fields = line.rstrip(b"\r").split(layout.separator.encode())
        if len(fields) == len(names):
            rows.append((number, fields))
        else:
            bad.append(
                BadRow(member.path, number, "", text_of(line), f"has {len(fields)} fields instead of {len(names)}")
            )
    return rows


def _check_header(member: Member, names: Sequence[str], separator: str) -> None:
    found = member.data.split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", "backslashreplace")
    if found != separator.join(names):
        raise UserError(
            f"{member.path}:1: not the expected header.\n  expected: {separator.join(names)}\n  found:    {found[:1000]}"
        )


def _places(ids: np.ndarray, known: np.ndarray, lines: np.ndarray, pattern: BadRow, bad: list[BadRow]) -> np.ndarray:
    """Where each id stands among the known ones, -1 where it does not; those rows are added to the bad ones."""
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    unknown = np.flatnonzero(known[place] != ids)
    bad += [pattern._replace(line=int(lines[row]), value=str(ids[row])) for row in unknown.tolist()]
    place[unknown] = -1
    return place


def _refuse(bad: list[BadRow]) -> None:
    """Users and items are few and all needed: any bad row of theirs is an error."""
    if bad:
        bad = sorted(bad, key=lambda row: row.line)
        raise bad_rows(bad[:SHOWN], len(bad))
