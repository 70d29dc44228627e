"""Which files a log is made of, and the reader for its kind."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tenrec_jax.data.blocks import Piece
from tenrec_jax.data.csv_log import CsvLog, header_of
from tenrec_jax.data.id_types import AUTO
from tenrec_jax.data.movielens import MovieLensLog, movielens_files
from tenrec_jax.data.parquet_log import ParquetLog
from tenrec_jax.data.schema import CUSTOM, KINDS, TWIN_KINDS, Kind, custom_kind, kind_named, kinds_with_header
from tenrec_jax.data.sequences import SequenceLog
from tenrec_jax.data.sources import COMPRESSIONS, open_source
from tenrec_jax.errors import UserError
from tenrec_jax.files import parsed_json

PUBLISHED_AT = "the Tenrec project's page on GitHub (search for 2022-NIPS-Tenrec)"
TASK, SEQUENCES = "task", "sequences"
KIND_NAMES = (*KINDS, TASK, CUSTOM)


class Log(Protocol):
    """A reader of one log.

    Attributes:
        kind: its columns as they are.
        categories: names of the item categories 1, 2, ... where the log names them all beforehand.
    """

    kind: Kind
    categories: tuple[str, ...]

    def pieces(self, *, progress: bool) -> Iterator[Piece]:
        """All rows in the order of the source, good and bad, in pieces to be parsed."""


@dataclass(frozen=True)
class SourceFiles:
    """named: what the user named. content: the files whose bytes are the log, in order."""

    named: tuple[Path, ...]
    content: tuple[Path, ...]

    @property
    def are_parquet(self) -> bool:
        """Whether the log is in Parquet files."""
        return self.content[0].suffix == ".parquet"

    def notes(self) -> tuple[str, ...]:
        """What a person should know about the files."""
        cut = [path for path in self.content if not self.are_parquet and path.suffix != ".zip" and _has_open_end(path)]
        return tuple(f"{path.name} does not end with a line end: it may have been cut short" for path in cut)


def source_files(paths: Sequence[Path], kind: str) -> SourceFiles:
    """Find the files of a log.

    Raises:
        UserError: a path is missing, named twice, or of a form that the kind does not have.
    """
    if not paths:
        raise UserError("Name at least one source file.")
    if kind not in (TASK, CUSTOM):
        kind_named(kind)
    if kind == "movielens":
        if len(paths) > 1:
            raise UserError(f"--kind movielens reads one folder or zip archive, not {len(paths)}.")
        return SourceFiles(tuple(paths), tuple(movielens_files(paths[0])))
    content: list[Path] = []
    for path in paths:
        if kind in KINDS and KINDS[kind].file and not path.exists():
            raise _missing(path, KINDS[kind])
        shards = _shards(path) if path.is_dir() else []
        if not shards:
            open_source(path).close()
        content += shards or [path]
    repeated = [p for place, p in enumerate(content) if p.resolve() in {other.resolve() for other in content[:place]}]
    if repeated:
        raise UserError(f"{repeated[0]} is named twice; its rows would count twice.")
    if len({path.suffix == ".parquet" for path in content}) > 1:
        raise UserError("Some sources are Parquet and others are text. Name files of one form.")
    return SourceFiles(tuple(paths), tuple(content))


def _shards(folder: Path) -> list[Path]:
    """The Parquet files of a folder."""
    below = next(folder.glob("*/**/*.parquet"), None)
    if below:
        raise UserError(
            f"{below} lies in a folder of {folder}. Shards lie side by side in one folder: write them unpartitioned, "
            "and wait for the job's end."
        )
    return sorted(folder.glob("*.parquet"))


def open_log(files: SourceFiles, kind: str, columns: Mapping[str, str] | None, ids: str = AUTO) -> Log:
    """The reader of a log.

    Args:
        files: of the log.
        kind: as for `ingest`.
        columns: the mapping of a log of kind "custom".
        ids: for the kinds "custom" and "sequences", what ids are: one of `id_types.ID_TYPES`.

    Raises:
        UserError: the first look at the files shows that they are not of that kind, columns are given for another kind or not at all, or
            the kind says itself what ids are.
    """
    if (kind == CUSTOM) != bool(columns):
        raise UserError(
            'A log of kind custom needs columns, for example {"user": "uid", "item": "vid", "click": "watched"}.'
            if kind == CUSTOM
            else f"columns are for the kind custom alone; the columns of {kind} are fixed."
        )
    if ids != AUTO and kind not in (CUSTOM, SEQUENCES):
        raise UserError(f"ids is for the kinds {CUSTOM} and {SEQUENCES} alone; those of {kind} are integers.")
    if kind == "movielens":
        return MovieLensLog(files.named[0], kind_named(kind))
    if kind == SEQUENCES:
        return SequenceLog(files.content, kind_named(kind), ids)
    layout = custom_kind(columns) if columns else _task_kind(files.content[0]) if kind == TASK else kind_named(kind)
    return (ParquetLog if files.are_parquet else CsvLog)(files.content, layout, ids)


def parse_columns(text: str, name: str) -> dict[str, str]:
    """The mapping of a log of kind "custom" from JSON; `name` is what the text is called in messages.

    Raises:
        UserError: it is no JSON object, or spells half a character, which no log can hold.
    """
    columns = parsed_json(text, name)
    if not isinstance(columns, dict):
        raise UserError(f'{name} must be a JSON object such as {{"user": "uid", "item": "vid"}}.')
    if re.search("[\ud800-\udfff]", "".join(map(str, (*columns, *columns.values())))):
        raise UserError(f"{name} holds a lone surrogate, which is no character.")
    return columns


def _task_kind(path: Path) -> Kind:
    """The kind of task_0 to task_3 that has a file's header."""
    header = header_of(path)
    found = [name for name in kinds_with_header(header) if name.startswith(TASK)]
    if not found:
        raise UserError(f"{path}:1: this is the header of no task file: {','.join(header)[:1000]}")
    return kind_named(found[0])


def _missing(path: Path, kind: Kind) -> UserError:
    twins = [name for name in TWIN_KINDS if KINDS[name].header == kind.header]
    synth = "".join(
        f" Or write a synthetic file of the same format: `tenrec-jax synth --kind {twin}`." for twin in twins[:1]
    )
    return UserError(
        f"There is no {path} (looked for at {path.absolute()}). {kind.file} is one of Tenrec's files: get it from "
        f"{PUBLISHED_AT} after accepting its terms; its licence is CC BY-NC 4.0.{synth}"
    )


def _has_open_end(path: Path) -> bool:
    with path.open("rb") as file:
        is_compressed = file.read(4).startswith(tuple(COMPRESSIONS))
        file.seek(-1, 2)
        return not is_compressed and file.read(1) != b"\n"
