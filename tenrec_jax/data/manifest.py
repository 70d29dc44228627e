"""What a table's folder says about itself: where it came from, what it counts and the hash of each file."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenrec_jax import sealed
from tenrec_jax.data.id_types import AUTO
from tenrec_jax.errors import UserError
from tenrec_jax.files import write_text
from tenrec_jax.sealed import FILES, KIND, VERSION, Kind

SCHEMA_VERSION = 4
MANIFEST_FILE = "manifest.json"
VERIFIED_FILE = "verified.json"
REMEDY = "Delete the folder and run tenrec-jax ingest again."


@dataclass(frozen=True)
class Source:
    """A file that a table was made from: its name without folders, SHA-256 and size."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a table's folder holds and where it came from; `manifest.json` in that folder, sealed.

    Attributes:
        log_kind: format of the sources. columns: role and name of each column of a log of kind "custom", otherwise empty.
        duplicates: what was done with rows that equal an earlier one: "keep" or "drop_exact".
        counts: rows, users, items, rows of each action, and what is odd about the log.
        categories: names of the item categories 1, 2, ...; empty where the source has none.
        notes: what a person should know about the sources.
        sha256: hash of the content, whatever the encoding of the files.
        ids: what the ids of a kind that leaves it open were said to be, "integer" or "text"; "auto" where the log told.
        files: SHA-256 of each other file of the folder, by its path in it.
    """

    log_kind: str
    columns: dict[str, str]
    duplicates: str
    sources: tuple[Source, ...]
    counts: dict[str, int]
    actions: tuple[str, ...]
    has_exposures: bool
    categories: tuple[str, ...]
    notes: tuple[str, ...]
    sha256: str
    ids: str = AUTO
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def seal(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into a table that is otherwise complete; the hashes are taken from the files there."""
    kind: dict[str, Any] = {KIND: Kind.TABLE, VERSION: SCHEMA_VERSION}
    sealed.seal(directory, kind | dataclasses.asdict(manifest), name=MANIFEST_FILE)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a table's folder.

    Raises:
        UserError: it is missing, damaged, of another format version or another kind of folder.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not a table: it has no {MANIFEST_FILE}. Make one with tenrec-jax ingest.")
    value = sealed.read_manifest_of(directory, Kind.TABLE, version=SCHEMA_VERSION, name=MANIFEST_FILE, remedy=REMEDY)
    sealed.require_types(value, Manifest, path)
    value["sources"] = tuple(Source(**source) for source in value["sources"])
    for name in ("actions", "categories", "notes"):
        value[name] = tuple(value[name])
    return Manifest(**{field.name: value[field.name] for field in dataclasses.fields(Manifest)})


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare the files' bytes with the manifest's hashes, and note their times and sizes for `check_files_once`.

    Raises:
        DamagedError: names all files that are missing or have other bytes.
    """
    sealed.check_files(directory, {FILES: manifest.files}, remedy=REMEDY)
    note_verified(directory, manifest)


def check_files_once(directory: Path, manifest: Manifest) -> None:
    """`check_files`, unless no file has changed its size or times since that was last done here: hashing a large log takes a while.

    What a disk changes by itself, without a write, is told by `tenrec-jax verify`, which always reads every byte.

    Raises:
        DamagedError: as `check_files`.
    """
    path = directory / VERIFIED_FILE
    if path.is_file() and path.read_bytes() == _stamps(directory, manifest):
        return
    check_files(directory, manifest)


def note_verified(directory: Path, manifest: Manifest) -> None:
    """Note the sizes and times of files whose hashes are known to be right. A folder that cannot be written to goes without."""
    path, stamps = directory / VERIFIED_FILE, _stamps(directory, manifest)
    if os.access(directory, os.W_OK) and not (path.is_file() and path.read_bytes() == stamps):
        write_text(path, stamps.decode())


def _stamps(directory: Path, manifest: Manifest) -> bytes:
    stamps = {}
    for name, sha256 in manifest.files.items():
        path = directory / name
        facts = path.stat() if os.path.isfile(path) else None
        # The time of the last change of the inode too: two files of one size, written in one tick, may have changed names.
        stamps[name] = facts and [sha256, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    return (json.dumps(stamps, indent=1) + "\n").encode()
