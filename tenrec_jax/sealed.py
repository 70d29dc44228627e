"""Folders that tell damage: a manifest lists the SHA-256 of every file, and its own.

Nothing below notices a flipped bit: neither Orbax nor safetensors nor, by default, Parquet. So every folder that is kept (tables, indexes,
checkpoints, recommenders, exports) is sealed when it is complete, and checked when it is read. A manifest says under "kind" what its
folder is, and under "format_version" how it is written.
"""

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any

from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text, read_json, sha256_of, write_json

FILES, OWN = "files", "manifest_sha256"
KIND, VERSION = "kind", "format_version"


class Kind(StrEnum):
    """What a sealed folder is."""

    TABLE = "table"
    INDEX = "index"
    CHECKPOINT = "checkpoint"
    RECOMMENDER = "recommender"
    EXPORTED_RECOMMENDER = "exported_recommender"
    RECOMMENDATIONS = "recommendations"
    ORIGINAL_RANKER = "original_ranker"
    ORIGINAL_TWO_TOWER = "original_two_tower"

    @property
    def manifest(self) -> str:
        """The name of its manifest. An index has one of its own, since it lies in a recommender's folder."""
        return "index.json" if self is Kind.INDEX else "manifest.json"


class DamagedError(UserError):
    """Files of a sealed folder are missing, or have other bytes than they had when it was sealed."""


def seal(folder: Path, facts: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Write the manifest of a folder that is otherwise complete: `facts`, the hashes of all files there, and its own.

    Args:
        folder: hidden files in it are not sealed.
        facts: what the manifest says beside the hashes; JSON.
        name: of the manifest's file.

    Returns:
        The manifest, as `read_manifest` gives it.
    """
    hashes = {file: sha256_of(folder / file) for file in files_in(folder) if file != name}
    return write_stamped(folder / name, {**facts, FILES: hashes})


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


def write_stamped(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON object with its own SHA-256 in it. Returns what `read_stamped` will."""
    # As JSON gives it back: the hash is of what will be read, not of tuples.
    plain = json.loads(json_text(value))
    write_json(path, plain | {OWN: _own(plain)})
    return plain


def read_stamped(path: Path, *, remedy: str) -> dict[str, Any]:
    """A JSON object that `write_stamped` wrote, without its hash.

    Raises:
        DamagedError: it cannot be read, or is not as it was written.
        FileNotFoundError: there is none.
    """
    try:
        value = read_json(path)
        # The same text too: a lost line end or another spelling of a number is damage as well.
        same_text = path.read_bytes() == json_text(value).encode()
        stated = value.pop(OWN, None) if isinstance(value, dict) else None
        whole = same_text and stated == _own(value)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error} {remedy}") from error
    if stated is None:
        raise DamagedError(f"{path} has no {OWN}: it is damaged, or an earlier version wrote it. {remedy}")
    if not whole:
        raise DamagedError(f"{path} is damaged: it is not as it was written. {remedy}")
    return value


def damaged_files(folder: Path, hashes: Mapping[str, str]) -> list[tuple[str, str]]:
    """The files that are missing or have other bytes, each with "PATH is missing" or "PATH is damaged"."""
    problems = []
    for file, expected in hashes.items():
        path = folder / file
        if not os.path.isfile(path):  # of a name that no file can have too
            problems.append((file, f"{path} is missing"))
        elif sha256_of(path) != expected:
            problems.append((file, f"{path} is damaged: its SHA-256 is not the one that was written down"))
    return problems


def read_manifest_of(folder: Path, *kinds: Kind, version: int, name: str, remedy: str) -> dict[str, Any]:
    """`read_manifest` of a folder that is known to be of one of some kinds.

    Args:
        version: of the format, as the manifest must say.

    Raises:
        DamagedError, FileNotFoundError: as `read_manifest`.
        UserError: it is a folder of another kind, or of another version.
    """
    manifest = read_manifest(folder, name=name, remedy=remedy)
    kind, written = manifest.get(KIND), manifest.get(VERSION)
    if kind not in kinds:
        raise UserError(f"{folder / name} is that of another kind of folder: {kind!r}, not {' or '.join(kinds)}.")
    if written != version:
        raise UserError(f"{folder / name}: {VERSION} is {written!r}, this version reads {version}. {remedy}")
    return manifest


def require_types(manifest: Any, record: type, path: Path) -> None:
    """Refuse a manifest, or another value of JSON, that cannot be read into a dataclass or named tuple.

    Args:
        record: each of its fields must be there, as JSON has values of its type; further keys are allowed.
        path: of the manifest, for the message.

    Raises:
        UserError: names all fields that are missing or of another type.
    """
    if not isinstance(manifest, dict):
        raise UserError(
            f"{path} cannot be read: a {type(manifest).__name__} stands where an object should. Make it again."
        )
    hints = typing.get_type_hints(record)
    wrong = [name for name, hint in hints.items() if name not in manifest or not _is_a(manifest[name], hint)]
    if wrong:
        raise UserError(f"{path} cannot be read: {', '.join(wrong)}: missing, or of another type. Make it again.")


def check_files(folder: Path, manifest: Mapping[str, Any], *, remedy: str) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: names all files that are missing or damaged.
    """
    problems = damaged_files(folder, manifest[FILES])
    if problems:
        raise DamagedError("\n".join([*(f"{problem}." for _, problem in problems), remedy]))


def foreign_files(folder: Path, manifest: Mapping[str, Any], *, name: str) -> list[str]:
    """The files that lie in a folder and are not in its manifest, each as "PATH is not in the manifest: remove it"."""
    foreign = sorted({*files_in(folder)} - {*manifest[FILES], name})
    return [f"{folder / file} is not in the manifest: remove it" for file in foreign]


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


def _is_a(value: Any, hint: Any) -> bool:
    """Whether JSON's value can stand for one of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType:
        return any(_is_a(value, choice) for choice in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list) and all(_is_a(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(entry, arguments[1]) for entry in value.values())
    if dataclasses.is_dataclass(hint):
        fields = typing.get_type_hints(hint)
        return (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(_is_a(value[name], kind) for name, kind in fields.items())
        )
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)
