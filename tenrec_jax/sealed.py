"""Folders that tell damage: a manifest lists the SHA-256 of every file, and its own.

Nothing below notices a flipped bit: neither Orbax nor safetensors nor, by default, Parquet. So every folder that is kept (tables, indexes,
checkpoints, recommenders, exports) is sealed when it is complete, and checked when it is read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text, read_json, sha256_of, write_json

FILES, OWN = "files", "manifest_sha256"


class DamagedError(UserError):
    """Files of a sealed folder are missing, or have other bytes than they had when it was sealed."""


def seal(folder: Path, facts: Mapping[str, Any], *, name: str) -> None:
    """Write the manifest of a folder that is otherwise complete: `facts`, the hashes of all files there, and its own.

    Args:
        folder: hidden files in it are not sealed.
        facts: what the manifest says beside the hashes; JSON.
        name: of the manifest's file.
    """
    hashes = {file: sha256_of(folder / file) for file in files_in(folder) if file != name}
    write_stamped(folder / name, {**facts, FILES: hashes})


def read_manifest(folder: Path, *, name: str, remedy: str) -> dict[str, Any]:
    """The manifest of a sealed folder, whose own hash was compared; `check_files` compares the others.

    Args:
        folder, name: as for `seal`.
        remedy: what to do about damage, a sentence.

    Raises:
        DamagedError: it cannot be read, is not as it was written, or names a file outside the folder.
        FileNotFoundError: there is none.
    """
    manifest = read_stamped(folder / name, remedy=remedy)
    hashes = manifest.get(FILES)
    if not isinstance(hashes, dict) or not all(_is_inside(file) for file in hashes):
        raise DamagedError(f"{folder / name} is no manifest: it lists no files, or files outside its folder. {remedy}")
    return manifest


def write_stamped(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own SHA-256 in it."""
    # As JSON gives it back: the hash is of what will be read, not of tuples.
    plain = json.loads(json_text(value))
    write_json(path, plain | {OWN: _own(plain)})


def read_stamped(path: Path, *, remedy: str) -> dict[str, Any]:
    """A JSON object that `write_stamped` wrote, without its hash.

    Raises:
        DamagedError: it cannot be read, or is not as it was written.
        FileNotFoundError: there is none.
    """
    try:
        value = read_json(path)
    except UserError as error:
        raise DamagedError(f"{path} is damaged: {error} {remedy}") from error
    if not isinstance(value, dict) or value.pop(OWN, None) != _own(value):
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one it states. {remedy}")
    return value


def damaged_files(folder: Path, hashes: Mapping[str, str]) -> list[tuple[str, str]]:
    """The files that are missing or have other bytes, each with "PATH is missing" or "PATH is damaged"."""
    problems = []
    for file, expected in hashes.items():
        path = folder / file
        if not path.is_file():
            problems.append((file, f"{path} is missing"))
        elif sha256_of(path) != expected:
            problems.append((file, f"{path} is damaged: its SHA-256 is not the one that was written down"))
    return problems


def check_files(folder: Path, manifest: Mapping[str, Any], *, remedy: str) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: names all files that are missing or damaged.
    """
    problems = damaged_files(folder, manifest[FILES])
    if problems:
        raise DamagedError("\n".join([*(f"{problem}." for _, problem in problems), remedy]))


def open_sealed(folder: Path, *, name: str, remedy: str) -> dict[str, Any]:
    """`read_manifest` and `check_files`."""
    manifest = read_manifest(folder, name=name, remedy=remedy)
    check_files(folder, manifest, remedy=remedy)
    return manifest


def files_in(folder: Path) -> Iterable[str]:
    """The files of a folder, relative to it and in order; what is hidden is left out."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _own(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts
