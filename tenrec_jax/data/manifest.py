"""What a table's folder says about itself: where it came from, what it counts and the hash of each file."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json, sha256_of

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"


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
        files: SHA-256 of each other file of the folder, by name.
        counts: rows, users, items, rows of each action, and what is odd about the log.
        categories: names of the item categories 1, 2, ...; empty where the source has none.
        is_new: False if the table stood there already. Not part of the file.
    """

    schema_version: int
    kind: str
    sources: tuple[Source, ...]
    files: dict[str, str]
    counts: dict[str, int]
    actions: tuple[str, ...]
    has_exposures: bool
    categories: tuple[str, ...]
    sha256: str
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
        value["actions"], value["categories"] = tuple(value["actions"]), tuple(value["categories"])
        return Manifest(**value, is_new=False)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a manifest ({error}). {remedy}") from error


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare the files with the manifest's hashes.

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
