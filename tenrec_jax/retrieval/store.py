"""The folder of a saved index, sealed: `index.json` lists what is in it, with the SHA-256 of every file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tenrec_jax.errors import UserError
from tenrec_jax.retrieval.config import IndexConfig
from tenrec_jax.sealed import (
    FILES,
    KIND,
    VERSION,
    DamagedError,
    Kind,
    damaged_files,
    foreign_files,
    read_manifest_of,
    require_types,
    seal,
)
from tenrec_jax.workspace import workspace

_FORMAT = 3
MANIFEST = "index.json"
_REMEDY = "Build the index again."


@dataclass(frozen=True)
class Manifest:
    """What `index.json` says of the index; `count` is the number of items that can be found, `search` the kind of search."""

    search: str
    config: IndexConfig
    dim: int
    count: int


@contextmanager
def written_as_a_whole(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder to write the files of an index into; at the end it gets its manifest and takes the place of `folder`.

    Raises:
        UserError: the folder holds something that is not an index, or cannot be written.
    """
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no index: choose another folder")
    with workspace(folder, replace=True) as partial:
        yield partial
        seal(partial, {KIND: Kind.INDEX, VERSION: _FORMAT} | asdict(manifest), name=MANIFEST)


def checked_manifest(folder: Path) -> Manifest:
    """The manifest of a saved index, after its files were compared with their hashes.

    Raises:
        UserError: no index there, one of another format, or files that are damaged, missing or not part of it (all are named).
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no index (no {MANIFEST}): build one, or give another folder")
    content = read_manifest_of(folder, Kind.INDEX, version=_FORMAT, name=MANIFEST, remedy=_REMEDY)
    require_types(content, Manifest, path)
    problems = [problem for _, problem in damaged_files(folder, content[FILES])]
    # ScaNN reads what lies there by its name, and would unpickle some of it.
    problems += foreign_files(folder, content, name=MANIFEST)
    if problems:
        raise DamagedError("\n".join([*(f"{problem}." for problem in problems), _REMEDY]))
    return Manifest(content["search"], IndexConfig(**content["config"]), content["dim"], content["count"])
