"""The folder of a saved index: `index.json` lists what is in it, with the SHA-256 of every file."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text, sha256_of
from tenrec_jax.retrieval.config import IndexConfig

_FORMAT = 2
MANIFEST = "index.json"


@dataclass(frozen=True)
class Manifest:
    """What `index.json` holds beside the hashes; `count` is the number of items that can be found."""

    kind: str
    config: IndexConfig
    dim: int
    count: int


@contextmanager
def written_as_a_whole(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder to write the files of an index into; at the end it gets its manifest and takes the place of `folder`.

    Raises:
        UserError: the folder holds something that is not an index.
    """
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no index: choose another folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    hashes = {name: sha256_of(partial / name) for name in _files(partial)}
    content = {"format": _FORMAT} | asdict(manifest) | {"files": hashes}
    (partial / MANIFEST).write_text(json_text(content), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def checked_manifest(folder: Path) -> Manifest:
    """The manifest of a saved index, after its files were compared with their hashes.

    Raises:
        UserError: no index there, one of another format, or a file that is damaged, missing or not part of it (it is named).
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no index (no {MANIFEST}): build one, or give another folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        layout, files = content["format"], dict(content["files"])
        config = IndexConfig(**content["config"])
        manifest = Manifest(str(content["kind"]), config, int(content["dim"]), int(content["count"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): build the index again") from error
    if layout != _FORMAT:
        raise UserError(f"{path}: format {layout} is unknown to this version: build the index again")
    present = _files(folder)
    for name in sorted({*files, *present}):
        if name not in files:
            raise UserError(f"{folder / name} is not part of the index: remove it")
        if name not in present or sha256_of(folder / name) != files[name]:
            raise UserError(f"{folder / name} is damaged or missing: copy or build the index again")
    return manifest


def _files(folder: Path) -> list[str]:
    """The files of an index, relative, in order; the manifest and hidden files are not among them."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST)
