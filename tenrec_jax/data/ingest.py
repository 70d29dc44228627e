"""Logs -> a validated table on disk, in bounded memory.

    events/part-*.parquet   every column of the source, user and item as dense ids; one block of rows a user, row groups of whole users
    columns/*.npy           user, item, labels and the blocks' offsets, to be memory-mapped
    users.arrow             raw id and features of dense users, to be memory-mapped        items.arrow   likewise of dense items
    quarantine.csv          the rows that were refused; only where there are any
    manifest.json           sources, hashes and counts; written last, and the folder is renamed into place after it

Dense ids follow the order of first appearance in the source; 0 is kept for padding and the unknown. Two passes: the first parses,
checks and encodes blocks of lines; the second brings the rows of each bucket of users into order and writes them. An engine does the
work, this process or Ray, and this module alone writes the table.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tenrec_jax.data.encoder import Encoder
from tenrec_jax.data.engines import ENGINES, LOCAL, Engine, open_engine
from tenrec_jax.data.event_columns import EventColumns
from tenrec_jax.data.id_types import AUTO, ID_TYPES
from tenrec_jax.data.interactions import (
    EVENTS_FOLDER,
    ITEMS_FILE,
    USERS_FILE,
    array_sha256,
    dictionary_arrays,
    sha256_of_arrays,
    write_dictionary,
)
from tenrec_jax.data.logs import Log, open_log, source_files
from tenrec_jax.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    Source,
    check_files,
    note_verified,
    read_manifest,
    seal,
)
from tenrec_jax.data.quarantine import FILE as QUARANTINE_FILE
from tenrec_jax.data.quarantine import Quarantine
from tenrec_jax.data.schema import Kind, Role, check_features
from tenrec_jax.data.shards import Oddities, RowOrder
from tenrec_jax.errors import UserError
from tenrec_jax.files import flush, sha256_of
from tenrec_jax.workspace import workspace

logger = logging.getLogger(__name__)

DUPLICATES = ("keep", "drop_exact")


@dataclass(frozen=True)
class IngestOptions:
    """How a log is taken in.

    Attributes:
        columns: for the kind "custom": which column stands for what; see `schema.custom_kind`.
        duplicates: rows that equal an earlier row of the user in every column: "keep" or "drop_exact".
        max_bad_fraction: share of bad rows above which nothing is written; the bad rows below it are left out.
        engine: what does the work, "local" (this process) or "ray"; the table is the same, row for row.
        ids: for the kinds "custom" and "sequences": whether ids are "integer" or "text"; "auto" takes them to be what the first is.
        allow_post_event_features: let `columns` make a feature of what is known only after the exposure, such as `watching_times`.
    """

    columns: Mapping[str, str] | None = None
    duplicates: str = "keep"
    max_bad_fraction: float = 0.0
    engine: str = LOCAL
    ids: str = AUTO
    allow_post_event_features: bool = False

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates is {self.duplicates!r}; it must be one of {', '.join(DUPLICATES)}.")
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(f"max_bad_fraction is {self.max_bad_fraction}; it must be at least 0 and less than 1.")
        if self.engine not in ENGINES:
            raise UserError(f"engine is {self.engine!r}; it must be one of {', '.join(ENGINES)}.")
        if self.ids not in ID_TYPES:
            raise UserError(f"ids is {self.ids!r}; it must be one of {', '.join(ID_TYPES)}.")
        if self.columns and not self.allow_post_event_features:
            check_features(self.columns)


@dataclass(frozen=True)
class Ingested(Manifest):
    """A table's manifest, and whether the table was written now or stood there already."""

    is_new: bool = field(default=True, compare=False)


def ingest(
    sources: Sequence[Path | str],
    kind: str,
    out: Path | str,
    options: IngestOptions | None = None,
    *,
    progress: bool = True,
) -> Ingested:
    """Validate a log and write it as a table; a table of the same sources that stands there already is left as it is.

    Args:
        sources: the log's files, in order: text, plain or compressed (gzip, zstd), or Parquet files or folders of them; for movielens
            one folder or zip archive.
        kind: format of the log: a key of `schema.KINDS`, "custom", or "task" (any of task_0 to task_3, told by the header).
        out: folder to make.
        options: see there.
        progress: whether to show bars on standard error.

    Returns:
        The table's manifest; `is_new` tells whether it was written now.

    Raises:
        UserError: a source is missing or is not of its kind, too many rows are bad (they are listed in `out/quarantine.csv`), `out`
            holds something else, or the engine is not installed. No table is written then.
    """
    options, out = options or IngestOptions(), Path(out)
    paths = source_files([Path(source) for source in sources], kind)
    origin = tuple(Source(file.name, sha256_of(file), file.stat().st_size) for file in paths.content)
    if out.exists() and (out.is_file() or any(entry.name != QUARANTINE_FILE for entry in out.iterdir())):
        return _existing(out, kind, origin, options)
    log = open_log(paths, kind, options.columns, options.ids)
    with workspace(out) as folder:
        scratch = folder / "spill"
        scratch.mkdir()
        with open_engine(options.engine, scratch) as engine:
            encoded = _encode(engine, log, folder, out, options, progress=progress)
            written = _write_events(engine, encoded, log.kind, folder, options, progress=progress)
        shutil.rmtree(scratch)
        changed = [file for file, source in zip(paths.content, origin, strict=True) if _has_changed(file, source)]
        if changed:
            raise UserError(f"{changed[0]} changed while it was read. Run the command again when it is complete.")
        manifest = Manifest(
            log_kind=kind,
            columns=dict(options.columns or {}),
            duplicates=options.duplicates,
            sources=origin,
            counts=written.counts,
            actions=log.kind.actions,
            has_exposures=log.kind.has_exposures,
            categories=log.categories or encoded.encoder.categories(),
            notes=paths.notes(),
            sha256=written.sha256,
            ids=options.ids,
        )
        seal(folder, manifest)
        (out / QUARANTINE_FILE).unlink(missing_ok=True)
    manifest = read_manifest(out)
    note_verified(out, manifest)
    return Ingested(**vars(manifest), is_new=True)


def _has_changed(file: Path, source: Source) -> bool:
    return file.stat().st_size != source.bytes


class Encoded(NamedTuple):
    """A log after the first pass: what was learned from it, and its numbers of rows that are kept and of bad ones."""

    encoder: Encoder
    rows: int
    bad_rows: int


class Written(NamedTuple):
    """A log after the second pass: its counts, and the hash of the table's content."""

    counts: dict[str, int]
    sha256: str


def _existing(out: Path, kind: str, origin: tuple[Source, ...], options: IngestOptions) -> Ingested:
    """The manifest of the table in `out`, if it is what these sources and options give."""
    remedy = "Name another folder, or delete this one first."
    if out.is_file() or not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} exists and is not a table. {remedy}")
    manifest = read_manifest(out)
    if manifest.log_kind != kind:
        raise UserError(f"{out} holds a table of kind {manifest.log_kind}, not {kind}. {remedy}")
    if [source.sha256 for source in manifest.sources] != [source.sha256 for source in origin]:
        listing = "".join(
            f"\n  {place}: {', '.join(f'{source.name} (SHA-256 {source.sha256[:12]})' for source in sources)}"
            for place, sources in (("there", manifest.sources), ("named", origin))
        )
        raise UserError(f"{out} holds a table of other sources:{listing}\n{remedy}")
    for name, there, here in (
        ("columns", manifest.columns, dict(options.columns or {})),
        ("duplicates", manifest.duplicates, options.duplicates),
        ("ids", manifest.ids, options.ids),
    ):
        if there != here:
            raise UserError(f"{out} holds a table made with {name} {there}, not {here}. {remedy}")
    bad = manifest.counts["bad_rows"]
    if bad > options.max_bad_fraction * (manifest.counts["rows"] + bad):
        raise UserError(
            f"{out} holds a table that left out {bad:,} bad rows, more than max_bad_fraction {options.max_bad_fraction:g} allows. {remedy}"
        )
    check_files(out, manifest)
    logger.info("%s holds the table of these sources already; nothing to do", out)
    return Ingested(**vars(manifest), is_new=False)


def _encode(engine: Engine, log: Log, folder: Path, out: Path, options: IngestOptions, *, progress: bool) -> Encoded:
    """The first pass: parse and check all rows, and learn the users and items."""
    quarantine, encoder, lines = Quarantine(folder / QUARANTINE_FILE), Encoder(log.kind), 0
    for block in engine.read(log.pieces(progress=progress), encoder):
        lines += block.lines
        quarantine.add(block.bad)
    quarantine.close()
    if quarantine.total > options.max_bad_fraction * lines or quarantine.total == lines:
        kept_at = out / QUARANTINE_FILE
        kept_at.parent.mkdir(parents=True, exist_ok=True)
        (folder / QUARANTINE_FILE).replace(kept_at)
        raise quarantine.error(lines, options.max_bad_fraction, kept_at)
    return Encoded(encoder, lines - quarantine.total, quarantine.total)


def _write_events(
    engine: Engine, encoded: Encoded, kind: Kind, folder: Path, options: IngestOptions, *, progress: bool
) -> Written:
    """The second pass: bring the rows into order and write shards and columns."""
    time = "".join(column.name for column in kind.with_role(Role.TIME))
    order = RowOrder(time, options.duplicates == "drop_exact")
    users, items = encoded.encoder.users(), encoded.encoder.items()
    (folder / EVENTS_FOLDER).mkdir()
    oddities = Oddities()
    shards = engine.shards(encoded.encoder, order, kind.labels)
    bar = tqdm(total=encoded.rows, desc="write", unit="row", unit_scale=True, disable=not progress, leave=False)
    with bar, EventColumns(folder, kind.actions, kind.labels, len(users.raw_id) - 1) as columns:
        for part, shard in enumerate(shards):
            path = folder / EVENTS_FOLDER / f"part-{part:05d}.parquet"
            path.write_bytes(shard.data)
            flush(path)
            columns.append(shard.rows)
            oddities = oddities.plus(shard.oddities)
            bar.update(shard.rows.num_rows)
        counts = columns.close()
    counts |= {"items": len(items.raw_id) - 1} | oddities._asdict() | {"bad_rows": encoded.bad_rows}
    for record, name in ((users, USERS_FILE), (items, ITEMS_FILE)):
        write_dictionary(record, folder / name)
        flush(folder / name)
    arrays = [*dictionary_arrays(users), *dictionary_arrays(items)]
    described = [(name, array.dtype.str, array.shape, array_sha256(array).hexdigest()) for name, array in arrays]
    return Written(counts, sha256_of_arrays([*columns.described(), *described]))
