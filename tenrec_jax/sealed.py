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
    # As JSON gives it back: the hash is of what will be read, not of tuples.
    manifest = json.loads(json_text({**facts, FILES: hashes}))
    write_json(folder / name, manifest | {OWN: _own(manifest)})


def read_manifest(folder: Path, *, name: str, remedy: str) -> dict[str, Any]:
    """The manifest of a sealed folder, whose own hash was compared; `check_files` compares the others.

    Args:
        folder, name: as for `seal`.
        remedy: what to do about damage, a sentence.

    Raises:
        DamagedError: it cannot be read, is not as it was written, or names a file outside the folder.
        FileNotFoundError: there is none.
    """
    path = folder / name
    try:
        manifest = read_json(path)
        stated, hashes = manifest.pop(OWN), manifest[FILES]
        outside = [file for file in hashes if not _is_inside(file)]
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise DamagedError(
            f"{path} is damaged: it is no manifest ({type(error).__name__}: {error}). {remedy}"
        ) from error
    if stated != _own(manifest) or outside:
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one it states. {remedy}")
    return manifest


def damaged_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files that are missing or have other bytes, each as "PATH is missing" or "PATH is damaged"."""
    problems = {}
    for file, expected in hashes.items():
        path = folder / file
        if not path.is_file():
            problems[path] = "is missing"
        elif sha256_of(path) != expected:
            problems[path] = "is damaged: its SHA-256 is not the manifest's"
    return [f"{path} {problem}" for path, problem in problems.items()]


def check_files(folder: Path, manifest: Mapping[str, Any], *, remedy: str) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: names all files that are missing or damaged.
    """
    problems = damaged_files(folder, manifest[FILES])
    if problems:
        raise DamagedError("\n".join([*(f"{problem}." for problem in problems), remedy]))


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
