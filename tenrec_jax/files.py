"""Whole files or none: atomic writes, content hashes, and JSON."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenrec_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room; libraries in C++ and Rust say so in words alone."""
    return (isinstance(error, OSError) and error.errno in FULL) or any(os.strerror(code) in str(error) for code in FULL)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which the system lets go of however this process ends.

    Raises:
        UserError: another process holds it; `what` says what that one is doing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process {what}. Wait for it, or name another place.") from None
        yield


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under: flushed to disk and renamed to `path` once the block has ended well, removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """The path or, where something stands there, PATH-2, PATH-3 and so on."""
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on: a rename after it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` everything in a folder, and the folder."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `json_text`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON. NaN is written as null: a metric that is not defined has no number."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it holds no JSON, or nests deeper than any file of ours.
    """
    return parsed_json(path.read_bytes(), str(path))


def parsed_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text; `source` names it in messages.

    Raises:
        UserError: it is no JSON, or nests deeper than any text that is meant.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} holds no readable JSON: {error}.") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; tuples are lists, as JSON has them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
