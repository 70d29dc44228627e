"""One small artefact of each kind, made without training, and what reads each."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mirrors
import numpy as np

from tenrec_jax import artifact
from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.interactions import open_table
from tenrec_jax.data.schema import KINDS
from tenrec_jax.interop.export import bring_back, export
from tenrec_jax.retrieval.index import load_index
from tenrec_jax.sealed import files_in
from torch_mlu_backend import artifact as mirror

READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "table": (open_table,),
    "index": (load_index,),
    "recommender": (artifact.load,),
    "exported": (lambda folder: bring_back(folder, folder.with_name("imported")), mirror.load),
}


def write(root: Path) -> None:
    """A folder that holds one of each."""
    random = np.random.default_rng(0)
    rows = [f"{user},{random.integers(1, 20)},1,0,0,0,1,0,1,4" for user in range(1, 9) for _ in range(5)]
    (root / "log.csv").write_text("\n".join([",".join(KINDS["qb_video"].header), *rows]) + "\n")
    ingest([root / "log.csv"], "qb_video", root / "table", progress=False)
    export(mirrors.write_recommender(root / "recommender"), root / "exported")
    shutil.copytree(root / "recommender" / "index", root / "index")


def kept(folder: Path) -> list[str]:
    """The files of an artefact; the note of when a table was checked last is none: it is made again."""
    return [name for name in files_in(folder) if name != "verified.json"]
