"""Logs -> a validated table on disk, in bounded memory.

    events/part-*.parquet   every column of the source, user and item as dense ids; one block of rows a user, row groups of whole users
    columns/*.npy           user, item, labels and the blocks' offsets, to be memory-mapped
    users.parquet           raw id and features of dense users 1..U        items.parquet   likewise of dense items 1..N
    quarantine.csv          the rows that were refused; only where there are any
    manifest.json           sources, hashes and counts; written last, and the folder is renamed into place after it

Dense ids follow the order of first appearance in the source; 0 is kept for padding and the unknown. Two passes: the first parses,
checks and encodes blocks of lines and spills them in buckets of users; the second brings each bucket into order and writes it.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tenrec_jax.data.dictionaries import Feature, make_ids
from tenrec_jax.data.interactions import (
    EVENTS_FOLDER,
    ITEM_COLUMN,
    ITEMS_FILE,
    LABELS_COLUMN,
    OFFSETS,
    USER_COLUMN,
    USERS_FILE,
    Items,
    Users,
    array_sha256,
    dictionary_arrays,
    sha256_of_arrays,
    with_neutral,
)
from tenrec_jax.data.logs import Log, open_log, source_files
from tenrec_jax.data.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Manifest,
    Source,
    check_files,
    note_verified,
    read_manifest,
)
from tenrec_jax.data.quarantine import FILE as QUARANTINE_FILE
from tenrec_jax.data.quarantine import Quarantine
from tenrec_jax.data.schema import ITEM, USER, Kind, Role
from tenrec_jax.data.shards import Bucket, ColumnFile, Repeats, RowOrder, Spill, flush, in_order, write_shard
from tenrec_jax.data.workspace import workspace
from tenrec_jax.errors import UserError
from tenrec_jax.files import sha256_of, write_json

logger = logging.getLogger(__name__)

DUPLICATES = ("keep", "drop_exact")
WRITERS = 2


@dataclass(frozen=True)
class IngestOptions:
    """How a log is taken in.

    Attributes:
        columns: for the kind "custom": which column stands for what; see `schema.custom_kind`.
        duplicates: rows that equal an earlier row of the user in every column: "keep" or "drop_exact".
        max_bad_fraction: share of bad rows above which nothing is written; the bad rows below it are left out.
    """

    columns: Mapping[str, str] | None = None
    duplicates: str = "keep"
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates is {self.duplicates!r}; it must be one of {', '.join(DUPLICATES)}.")
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(f"max_bad_fraction is {self.max_bad_fraction}; it must be at least 0 and less than 1.")


def ingest(
    sources: Sequence[Path | str],
    kind: str,
    out: Path | str,
    options: IngestOptions | None = None,
    *,
    progress: bool = True,
) -> Manifest:
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
        UserError: a source is missing or is not of its kind, too many rows are bad (they are listed in `out/quarantine.csv`), or `out`
            holds something else. No table is written then.
    """
    options, out = options or IngestOptions(), Path(out)
    paths = source_files([Path(source) for source in sources], kind)
    origin = tuple(Source(file.name, sha256_of(file), file.stat().st_size) for file in paths.content)
    if out.exists() and (out.is_file() or any(entry.name != QUARANTINE_FILE for entry in out.iterdir())):
        return _existing(out, kind, origin, options)
    log = open_log(paths, kind, options.columns)
    with workspace(out) as folder:
        encoded = _encode(log, folder, out, options, progress=progress)
        written = _write_events(encoded, log.kind, folder, options, progress=progress)
        changed = [file for file, source in zip(paths.content, origin, strict=True) if _has_changed(file, source)]
        if changed:
            raise UserError(f"{changed[0]} changed while it was read. Run the command again when it is complete.")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind=kind,
            columns=dict(options.columns or {}),
            duplicates=options.duplicates,
            sources=origin,
            files={},
            counts=written.counts | encoded.counts,
            actions=log.kind.actions,
            has_exposures=log.kind.has_exposures,
            categories=log.categories or encoded.categories,
            notes=paths.notes(),
            sha256=written.sha256,
        )
        return _complete(folder, out, manifest)


def _has_changed(file: Path, source: Source) -> bool:
    return file.stat().st_size != source.bytes


def _existing(out: Path, kind: str, origin: tuple[Source, ...], options: IngestOptions) -> Manifest:
    """The manifest of the table in `out`, if it is what these sources and options give."""
    remedy = "Name another folder, or delete this one first."
    if out.is_file() or not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} exists and is not a table. {remedy}")
    manifest = read_manifest(out)
    if manifest.kind != kind:
        raise UserError(f"{out} holds a table of kind {manifest.kind}, not {kind}. {remedy}")
    if [source.sha256 for source in manifest.sources] != [source.sha256 for source in origin]:
        listing = "".join(
            f"\n  {place}: {', '.join(f'{source.name} (SHA-256 {source.sha256[:12]})' for source in sources)}"
            for place, sources in (("there", manifest.sources), ("named", origin))
        )
        raise UserError(f"{out} holds a table of other sources:{listing}\n{remedy}")
    for name, there, here in (
        ("columns", manifest.columns, dict(options.columns or {})),
        ("duplicates", manifest.duplicates, options.duplicates),
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
    return manifest


class Encoded(NamedTuple):
    """A log after the first pass: its rows with dense ids, on their way to the shards, and its dictionaries."""

    spill: Spill
    users: Users
    items: Items
    categories: tuple[str, ...]
    counts: dict[str, int]


def _encode(log: Log, folder: Path, out: Path, options: IngestOptions, *, progress: bool) -> Encoded:
    """Parse, check and encode all rows."""
    quarantine, encoder = Quarantine(folder / QUARANTINE_FILE), Encoder(log.kind)
    scratch = folder / "spill"
    scratch.mkdir()
    spill, lines = Spill(scratch), 0
    for block in log.read(progress=progress):
        lines += block.lines
        quarantine.add(block.bad)
        if block.rows.num_rows:
            spill.add(encoder(block.rows))
    quarantine.close()
    if quarantine.total > options.max_bad_fraction * lines or quarantine.total == lines:
        kept_at = out / QUARANTINE_FILE
        kept_at.parent.mkdir(parents=True, exist_ok=True)
        (folder / QUARANTINE_FILE).replace(kept_at)
        raise quarantine.error(lines, options.max_bad_fraction, kept_at)
    counts = {
        "bad_rows": quarantine.total,
        "user_feature_conflicts": encoder.conflicts[Role.USER_FEATURE],
        "item_feature_conflicts": encoder.conflicts[Role.ITEM_FEATURE],
    }
    return Encoded(spill, encoder.users(), encoder.items(), encoder.categories(), counts)


class Encoder:
    """Gives rows their dense ids and collects the dictionaries and features of users and items."""

    def __init__(self, kind: Kind) -> None:
        (user,), (item,) = kind.with_role(Role.USER), kind.with_role(Role.ITEM)
        self._kind, self._columns = kind, {USER: user, ITEM: item}
        self._ids = {name: make_ids(pa.type_for_alias(column.dtype)) for name, column in self._columns.items()}
        self._features = {
            role: {c.feature: (c, Feature(c)) for c in kind.with_role(role) if c.feature}
            for role in (Role.USER_FEATURE, Role.ITEM_FEATURE)
        }
        self.conflicts = dict.fromkeys(self._features, 0)

    def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of the kind's columns to rows with `user`, `item` (dense, int32), and the others as they are."""
        dense = {name: ids.encode(rows[self._columns[name].name]) for name, ids in self._ids.items()}
        for role, key in ((Role.USER_FEATURE, USER), (Role.ITEM_FEATURE, ITEM)):
            contradicted = [
                feature.update(dense[key], rows[column.name], self._ids[key].count)
                for column, feature in self._features[role].values()
            ]
            self.conflicts[role] += int(np.count_nonzero(np.logical_or.reduce(contradicted))) if contradicted else 0
        ids = [column.name for column in self._columns.values()]
        others = [column.name for column in self._kind.columns if column.name not in ids]
        columns = {name: pa.array(values) for name, values in dense.items()} | {name: rows[name] for name in others}
        if not self._kind.with_role(Role.ACTION):
            (click,) = self._kind.labels
            columns[click] = pa.array(np.ones(rows.num_rows, np.int8))
        return pa.RecordBatch.from_pydict(columns)

    def users(self) -> Users:
        """The users so far."""
        return Users(*self._dictionary(USER, Role.USER_FEATURE, Users))

    def items(self) -> Items:
        """The items so far."""
        return Items(*self._dictionary(ITEM, Role.ITEM_FEATURE, Items))

    def categories(self) -> tuple[str, ...]:
        """Names of the categories 1, 2, ... where they are text."""
        _, feature = self._features[Role.ITEM_FEATURE].get("category", (None, None))
        return feature.names if feature else ()

    def _dictionary(self, key: str, role: Role, record: type) -> list[np.ndarray]:
        """The fields of `Users` or `Items`; a feature that no column fills is missing throughout."""
        ids, found = self._ids[key], self._features[role]
        columns = [with_neutral(ids.raw(), is_id=True)]
        for field in fields(record)[1:]:
            code = found[field.name][1].codes(ids.count) if field.name in found else np.zeros(ids.count, np.int32)
            columns.append(np.concatenate([[np.int32(0)], code]))
        return columns


class Written(NamedTuple):
    """What the second pass found: counts, and the hash of the table's content."""

    counts: dict[str, int]
    sha256: str


def _write_events(encoded: Encoded, kind: Kind, folder: Path, options: IngestOptions, *, progress: bool) -> Written:
    """Bring the spilled rows into order and write shards and columns."""
    time = "".join(column.name for column in kind.with_role(Role.TIME))
    order, labels = RowOrder(time, options.duplicates == "drop_exact"), kind.labels
    for name in (EVENTS_FOLDER, "columns"):
        (folder / name).mkdir()
    columns = EventColumns(folder, kind.actions, len(encoded.users.raw_id) - 1)
    repeats = Repeats()

    def write(part: int, rows: pa.Table) -> Bucket:
        bucket = in_order(rows, order, labels)
        write_shard(bucket.rows, folder / EVENTS_FOLDER / f"part-{part:05d}.parquet")
        return bucket

    bar = tqdm(total=encoded.spill.rows, desc="write", unit="row", unit_scale=True, disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(WRITERS) as pool:
        pending = []
        for part, rows in enumerate(encoded.spill.buckets()):
            pending.append(pool.submit(write, part, rows))
            if len(pending) == WRITERS:
                repeats = columns.take(pending.pop(0).result(), labels, repeats, bar)
        for future in pending:
            repeats = columns.take(future.result(), labels, repeats, bar)
    encoded.spill.remove()
    counts = columns.close() | {"items": len(encoded.items.raw_id) - 1} | repeats._asdict()
    arrays = [*dictionary_arrays(encoded.users), *dictionary_arrays(encoded.items)]
    described = [(name, array.dtype.str, array.shape, array_sha256(array).hexdigest()) for name, array in arrays]
    for record, name in ((encoded.users, USERS_FILE), (encoded.items, ITEMS_FILE)):
        content = pa.table({field.name: getattr(record, field.name)[1:] for field in fields(record)})
        pq.write_table(content, folder / name, compression="zstd", write_page_checksum=True)
        flush(folder / name)
    return Written(counts, sha256_of_arrays([*columns.described(), *described]))


class EventColumns:
    """The memory-mapped columns of a table, written as buckets come in order."""

    def __init__(self, folder: Path, actions: tuple[str, ...], users: int) -> None:
        self._actions, self._folder, self._rows = actions, folder, 0
        self._files = {
            "user": ColumnFile(folder / USER_COLUMN, "<i4"),
            "item": ColumnFile(folder / ITEM_COLUMN, "<i4"),
            f"labels {','.join(actions)}": ColumnFile(folder / LABELS_COLUMN, "|i1", len(actions)),
        }
        self._length_U = np.zeros(users + 1, np.int64)
        self._positive_A = np.zeros(len(actions), np.int64)

    def take(self, bucket: Bucket, labels: Sequence[str], repeats: Repeats, bar: tqdm) -> Repeats:
        """Append a bucket's rows; returns `repeats` with the bucket's added."""
        rows = bucket.rows
        user_R, item_R = rows[USER].to_numpy(), rows[ITEM].to_numpy()
        labels_RA = np.stack([rows[name].to_numpy() for name in labels], axis=1)
        for file, values in zip(self._files.values(), (user_R, item_R, labels_RA), strict=True):
            file.append(values)
        lowest = int(user_R[0])
        lengths = np.bincount(user_R - lowest)
        self._length_U[lowest : lowest + len(lengths)] += lengths
        self._positive_A += labels_RA.sum(axis=0, dtype=np.int64)
        self._rows += len(user_R)
        bar.update(len(user_R))
        return Repeats(*(sum(pair) for pair in zip(repeats, bucket.repeats, strict=True)))

    def close(self) -> dict[str, int]:
        """Complete the files; returns the counts of rows, users and actions."""
        for file in self._files.values():
            file.close()
        offsets = ColumnFile(self._folder / OFFSETS, "<i8")
        offsets.append(np.concatenate([[0], np.cumsum(self._length_U)]))
        offsets.close()
        counts = {"rows": self._rows, "users": len(self._length_U) - 1}
        return counts | dict(zip(self._actions, self._positive_A.tolist(), strict=True))

    def described(self) -> list[tuple[str, str, tuple[int, ...], str]]:
        """Name, type, shape and hash of each column."""
        return [(name, *file.described()) for name, file in self._files.items()]


def _complete(folder: Path, out: Path, manifest: Manifest) -> Manifest:
    """Write the manifest and rename the folder into place."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = replace(manifest, files={name: sha256_of(folder / name) for name in files})
    write_json(folder / MANIFEST_FILE, manifest.to_json())
    flush(folder)
    (out / QUARANTINE_FILE).unlink(missing_ok=True)
    folder.rename(out)
    flush(out.parent)
    note_verified(out, manifest)
    return manifest
