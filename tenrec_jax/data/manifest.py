"""What a table's folder says about itself: where it came from, what it counts and the hash of each file."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenrec_jax.data.id_types import AUTO
from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json, sha256_of, write_text

SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"
VERIFIED_FILE = "verified.json"


@dataclass(frozen=True)
class Source:
    """A file that a table was made from: its name without folders, SHA-256 and size."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a table's folder holds and where it came from; `manifest.json` in that folder.

    Attributes:
        kind: format of the sources. columns: role and name of each column of a log of kind "custom", otherwise empty.
        duplicates: what was done with rows that equal an earlier one: "keep" or "drop_exact".
        ids: what the ids of a kind that leaves it open were said to be, "integer" or "text"; "auto" where the log told.
        files: SHA-256 of each other file of the folder, by its path in it.
        counts: rows, users, items, rows of each action, and what is odd about the log.
        categories: names of the item categories 1, 2, ...; empty where the source has none.
        notes: what a person should know about the sources.
        is_new: False if the table stood there already. Not part of the file.
    """

    schema_version: int
    kind: str
    columns: dict[str, str]
    duplicates: str
    sources: tuple[Source, ...]
    files: dict[str, str]
    counts: dict[str, int]
    actions: tuple[str, ...]
    has_exposures: bool
    categories: tuple[str, ...]
    notes: tuple[str, ...]
    sha256: str
    ids: str = AUTO
    is_new: bool = dataclasses.field(default=True, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The value written to `manifest.json`."""
        value = dataclasses.asdict(self)
        del value["is_new"]
        return value


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a table's folder.

    Raises:
        UserError: it is missing, cannot be read or has another schema version.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not a table: it has no {MANIFEST_FILE}. Make one with tenrec-jax ingest.")
    remedy = "Delete the folder and run tenrec-jax ingest again."
    try:
        value = read_json(path)
        if value["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema_version is {value['schema_version']}, this version reads {SCHEMA_VERSION}. {remedy}"
            )
        value["sources"] = tuple(Source(**source) for source in value["sources"])
        for name in ("actions", "categories", "notes"):
            value[name] = tuple(value[name])
        return Manifest(**value, is_new=False)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a manifest ({error}). {remedy}") from error


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare the files' bytes with the manifest's hashes, and note their times and sizes for `check_files_once`.

    Raises:
        UserError: a file is missing or has other bytes.
    """
    for name, expected in manifest.files.items():
        path = directory / name
        problem = "is missing" if not path.is_file() else "is damaged" if sha256_of(path) != expected else ""
        if problem:
            raise UserError(
                f"{path} {problem} (its SHA-256 is not the manifest's). Delete the folder and ingest again."
            )
    note_verified(directory, manifest)


def check_files_once(directory: Path, manifest: Manifest) -> None:
    """`check_files`, unless no file has changed its size or time since that was last done here: hashing a large log takes a while.

    Raises:
        UserError: as `check_files`.
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
        stamps[name] = [sha256, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    return (json.dumps(stamps, indent=1) + "\n").encode()
