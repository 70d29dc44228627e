"""Text logs -> a validated table on disk.

    events.parquet   user, item (dense ids), the actions, and every other column of the source; one block of rows a user
    users.parquet    raw id and features of dense users 1..U        items.parquet   likewise of dense items 1..N
    manifest.json    sources, hashes and counts; written last, and the folder is renamed into place after it

Dense ids follow the order of first appearance in the source; 0 is kept for padding and the unknown.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tenrec_jax.data.interactions import (
    EVENTS_FILE,
    ITEMS_FILE,
    USERS_FILE,
    Interactions,
    Items,
    Users,
    logical_sha256,
    offsets_of,
)
from tenrec_jax.data.manifest import MANIFEST_FILE, SCHEMA_VERSION, Manifest, Source, check_files, read_manifest
from tenrec_jax.data.movielens import movielens_files, read_movielens
from tenrec_jax.data.readers import open_source, read_csv
from tenrec_jax.data.schema import ITEM, KINDS, TWIN_KINDS, USER, Column, Kind, Role, kind_named
from tenrec_jax.data.sequences import read_sequences
from tenrec_jax.errors import UserError
from tenrec_jax.files import sha256_of, write_json

logger = logging.getLogger(__name__)

PUBLISHED_AT = "the Tenrec project's page on GitHub (search for 2022-NIPS-Tenrec)"


class Feature(NamedTuple):
    """A feature by dense id, int32 [U + 1] or [N + 1], and a mask of the rows that contradict it, bool [R]."""

    value: np.ndarray
    contradicted_R: np.ndarray


def ingest(sources: Sequence[Path | str], kind: str, out: Path | str, *, progress: bool = True) -> Manifest:
    """Validate a log and write it as a table; a table of the same sources that stands there already is left as it is.

    Args:
        sources: the log's files, in order; for movielens one folder or zip archive.
        kind: format of the log, a key of `schema.KINDS`.
        out: folder to make.
        progress: whether to show bars on standard error.

    Returns:
        The table's manifest; `is_new` tells whether it was written now.

    Raises:
        UserError: a source is missing or holds a bad row, or `out` holds something else. Nothing is written then.
    """
    layout, paths, out = kind_named(kind), [Path(source) for source in sources], Path(out)
    files = _source_files(paths, layout)
    origin = tuple(Source(file.name, sha256_of(file), file.stat().st_size) for file in files)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        return _existing(out, layout, origin)
    events, categories = _read(paths, layout, progress=progress)
    changed = [file for file, source in zip(files, origin, strict=True) if file.stat().st_size != source.bytes]
    if changed:
        raise UserError(f"{changed[0]} changed while it was read. Run the command again when it is complete.")
    table, events, oddities = _build(events, layout)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        kind=kind,
        sources=origin,
        files={},
        counts=_counts(table) | oddities,
        actions=table.actions,
        has_exposures=table.has_exposures,
        categories=categories,
        sha256=table.sha256,
    )
    return _write(table, events, manifest, out)


def _source_files(paths: Sequence[Path], kind: Kind) -> list[Path]:
    """The files whose content is the log."""
    if not paths:
        raise UserError("Name at least one source file.")
    if kind.name == "movielens":
        if len(paths) > 1:
            raise UserError(f"--kind movielens reads one folder or zip archive, not {len(paths)}.")
        return movielens_files(paths[0])
    repeated = [path for place, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:place]}]
    if repeated:
        raise UserError(f"{repeated[0]} is named twice; its rows would count twice.")
    for path in paths:
        if kind.file and not path.exists():
            raise _missing(path, kind)
        open_source(path).close()
    return list(paths)


def _missing(path: Path, kind: Kind) -> UserError:
    twins = [name for name in TWIN_KINDS if KINDS[name].header == kind.header]
    synth = "".join(
        f" Or write a synthetic file of the same format: `tenrec-jax synth --kind {twin}`." for twin in twins[:1]
    )
    return UserError(
        f"There is no {path} (looked for at {path.absolute()}). {kind.file} is one of Tenrec's files: get it from "
        f"{PUBLISHED_AT} after accepting its terms; its licence is CC BY-NC 4.0.{synth}"
    )


def _existing(out: Path, kind: Kind, origin: tuple[Source, ...]) -> Manifest:
    """The manifest of the table in `out`, if it is of the same kind and sources."""
    remedy = "Name another folder, or delete this one first."
    if out.is_file() or not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} exists and is not a table. {remedy}")
    manifest = read_manifest(out)
    if manifest.kind != kind.name:
        raise UserError(f"{out} holds a table of kind {manifest.kind}, not {kind.name}. {remedy}")
    there, here = manifest.sources, origin
    if [source.sha256 for source in there] != [source.sha256 for source in here]:
        listing = "".join(
            f"\n  {place}: {', '.join(f'{source.name} (SHA-256 {source.sha256[:12]})' for source in sources)}"
            for place, sources in (("there", there), ("named", here))
        )
        raise UserError(f"{out} holds a table of other sources:{listing}\n{remedy}")
    check_files(out, manifest)
    logger.info("%s holds the table of these sources already; nothing to do", out)
    return manifest


def _read(paths: Sequence[Path], kind: Kind, *, progress: bool) -> tuple[pa.Table, tuple[str, ...]]:
    """All rows in source order, with the kind's columns, and the names of the item categories."""
    if kind.name == "movielens":
        return read_movielens(paths[0], kind)
    if kind.name == "sequences":
        return read_sequences(paths, kind, progress=progress), ()
    batches = [batch for path in paths for batch in read_csv(path, kind, progress=progress)]
    return pa.Table.from_batches(batches), ()


def _build(events: pa.Table, kind: Kind) -> tuple[Interactions, pa.Table, dict[str, int]]:
    """Dense ids, features and blocks: the table, its rows on disk, and how often features contradict themselves."""
    user_R, user_id = _dense(events, kind.with_role(Role.USER)[0])
    item_R, item_id = _dense(events, kind.with_role(Role.ITEM)[0])
    user_features, user_conflicts = _features(Users, user_R, len(user_id), events, kind.with_role(Role.USER_FEATURE))
    item_features, item_conflicts = _features(Items, item_R, len(item_id), events, kind.with_role(Role.ITEM_FEATURE))
    kept = [c.name for c in kind.columns if c.role not in (Role.USER, Role.ITEM)]
    events = pa.table({USER: user_R, ITEM: item_R, **{name: events[name] for name in kept}})
    order = _order(user_R, events, kind)
    if order is not None:
        events = events.take(pa.array(order))
    user_R, item_R = events[USER].to_numpy(), events[ITEM].to_numpy()
    table = Interactions(
        kind=kind.name,
        actions=kind.actions,
        has_exposures=kind.has_exposures,
        user_R=user_R,
        item_R=item_R,
        labels_RA=np.stack([events[action].to_numpy() for action in kind.actions], axis=1),
        offsets=offsets_of(user_R, len(user_id) - 1),
        users=Users(user_id, *user_features),
        items=Items(item_id, *item_features),
        sha256="",
    )
    oddities = {
        **_repeats(events),
        "user_feature_conflicts": user_conflicts,
        "item_feature_conflicts": item_conflicts,
    }
    return replace(table, sha256=logical_sha256(table)), events, oddities


def _dense(events: pa.Table, column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Dense ids of the rows, int32 [R], and the raw ids, int64 [size + 1]."""
    encoded = pa.array(events[column.name].to_numpy()).dictionary_encode()
    return encoded.indices.to_numpy() + np.int32(1), np.concatenate([[-1], encoded.dictionary.to_numpy()])


def _features(
    record: type, id_R: np.ndarray, size: int, events: pa.Table, columns: Sequence[Column]
) -> tuple[list[np.ndarray], int]:
    """The fields of `Users` or `Items` after the raw ids, and the number of rows that contradict them.

    A field that no column fills is missing throughout.
    """
    found = {column.feature: _feature(column, events[column.name], id_R, size) for column in columns}
    missing = Feature(np.zeros(size, np.int32), np.zeros(len(id_R), bool))
    features = [found.get(field.name, missing) for field in fields(record)[1:]]
    contradicted_R = np.logical_or.reduce([feature.contradicted_R for feature in features])
    return [feature.value for feature in features], int(contradicted_R.sum())


def _feature(column: Column, values: pa.ChunkedArray, id_R: np.ndarray, size: int) -> Feature:
    """The first value of each id that is not missing."""
    encoded = pc.fill_null(pc.add(values.cast(pa.int32()), 1), 0) if column.nullable else values.cast(pa.int32())
    value_R = encoded.to_numpy()
    feature = np.zeros(size, np.int32)
    given = np.flatnonzero(value_R)[::-1]
    feature[id_R[given]] = value_R[given]  # assigned from the last row to the first, which stays
    return Feature(feature, (value_R != 0) & (value_R != feature[id_R]))


def _order(user_R: np.ndarray, events: pa.Table, kind: Kind) -> np.ndarray | None:
    """The order that makes users contiguous and, if rows have times, sorts each user's by time; None if it is so already."""
    times = [events[column.name].to_numpy() for column in kind.with_role(Role.TIME)]
    if not times and (user_R[1:] >= user_R[:-1]).all():
        return None
    return np.lexsort((*times, user_R))


def _repeats(events: pa.Table) -> dict[str, int]:
    """Rows whose (user, item) stood on an earlier row, and rows that equal an earlier row in every column."""
    pair = events[USER].to_numpy().astype(np.int64) << 32 | events[ITEM].to_numpy()
    order = np.argsort(pair, kind="stable")
    again = np.flatnonzero(pair[order[1:]] == pair[order[:-1]])
    suspects = events.take(pa.array(np.union1d(order[again], order[again + 1])))
    distinct = suspects.group_by(suspects.column_names).aggregate([]).num_rows
    return {"repeated_pairs": len(again), "duplicate_rows": suspects.num_rows - distinct}


def _counts(table: Interactions) -> dict[str, int]:
    actions = table.labels_RA.sum(axis=0, dtype=np.int64).tolist()
    sizes = {"rows": table.num_rows, "users": table.num_users, "items": table.num_items}
    return sizes | dict(zip(table.actions, actions, strict=True))


def _write(table: Interactions, events: pa.Table, manifest: Manifest, out: Path) -> Manifest:
    """Write a folder beside `out` and rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        contents = {EVENTS_FILE: events, USERS_FILE: _dictionary(table.users), ITEMS_FILE: _dictionary(table.items)}
        for name, content in contents.items():
            pq.write_table(content, folder / name, compression="zstd", write_page_checksum=True)
            _flush(folder / name)
        manifest = replace(manifest, files={name: sha256_of(folder / name) for name in contents})
        write_json(folder / MANIFEST_FILE, manifest.to_json())
        _flush(folder)
        folder.rename(out)
        _flush(out.parent)
    return manifest


def _dictionary(record: Users | Items) -> pa.Table:
    return pa.table({field.name: getattr(record, field.name)[1:] for field in fields(record)})


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
