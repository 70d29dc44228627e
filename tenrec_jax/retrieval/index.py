"""The items with the largest inner product, by ScaNN or by exact search, behind one interface.

An index is built, tuned by typical queries, changed by `upsert` and `delete`, and saved as a folder that may be moved:
`index.json` (search, configuration, dimensions, SHA-256 of every file and its own), `tuning.json`, and `item_ids.npy` with
`vectors.npy` (exact), or with `tree.json`, `scann/` and, if there are any, `changes/`. Every search gives k hits in
order of falling score, equal scores in order of item id; where fewer exist the rest is item 0, "no item", with score -inf.
"""

import importlib.util
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json
from tenrec_jax.retrieval.base import TUNING_FILE, ItemIndex
from tenrec_jax.retrieval.checks import checked_ids, checked_vectors
from tenrec_jax.retrieval.config import IndexConfig
from tenrec_jax.retrieval.exact import ExactIndex
from tenrec_jax.retrieval.hits import SearchResult, share_found
from tenrec_jax.retrieval.scann_index import ScannIndex, leaves_for
from tenrec_jax.retrieval.scann_tree import ScannTree
from tenrec_jax.retrieval.store import MANIFEST, checked_manifest
from tenrec_jax.retrieval.tuning import Trial, Tuning, UnreachableRecallError
from tenrec_jax.sealed import require_types

__all__ = [
    "IndexConfig",
    "ItemIndex",
    "SearchResult",
    "Trial",
    "Tuning",
    "UnreachableRecallError",
    "build_index",
    "load_index",
    "recall_against_exact",
]

logger = logging.getLogger(__name__)

# Items find themselves in their own leaf: where they stand in for queries, more leaves are read for safety.
_STAND_INS, _SHARE_FOR_STAND_INS = 256, 0.1


def build_index(
    vectors_ND: NDArray, item_ids_N: NDArray, config: IndexConfig, *, tuning_queries_BD: NDArray | None = None
) -> ItemIndex:
    """An index over a catalogue. ScaNN's k-means runs on threads: two builds may differ a little, a saved one does not.

    Unless the configuration gives ScaNN's `leaves_to_search`, the index is tuned to the configuration's `target_recall`.

    Args:
        vectors_ND: one vector per item [N, D], of any length. They are kept, and must not change afterwards.
        item_ids_N: their dense ids [N], distinct, each at least 1.
        config: how to search.
        tuning_queries_BD: a few hundred typical queries to tune by. Without them items stand in for queries, and for
            safety at least a tenth of the leaves is searched.

    Raises:
        UserError: an empty catalogue, an entry that is not finite (the first such item is named: ScaNN would end the
            process), ids that do not fit, or ScaNN asked for but not installed, too large for the catalogue or unable to
            reach the recall (by "auto" the index is then exact, and the log tells so).
    """
    if np.ndim(vectors_ND) != 2 or not np.size(vectors_ND):
        raise UserError(f"the catalogue is empty: vectors have shape {np.shape(vectors_ND)}, need [N, D]")
    ids = checked_ids(np.asarray(item_ids_N), len(vectors_ND))
    vectors = checked_vectors(vectors_ND, "item", ids)
    small = len(ids) < config.min_items_for_scann
    if config.kind == "exact" or (config.kind == "auto" and (small or importlib.util.find_spec("scann") is None)):
        return ExactIndex(vectors, ids, config)
    index = ScannIndex(ScannTree.build(vectors, ids, leaves_for(len(ids), config)), config)
    if config.leaves_to_search:
        return index
    try:
        if tuning_queries_BD is None:
            places = np.random.default_rng(0).permutation(len(ids))[:_STAND_INS]
            index.tune(vectors[places], config.target_recall, fewest_share=_SHARE_FOR_STAND_INS)
        else:
            index.tune(tuning_queries_BD, config.target_recall)
    except UnreachableRecallError as error:
        if config.kind == "scann":
            raise
        logger.warning("index: searching exactly, since index.kind is auto. %s", error)
        return ExactIndex(vectors, ids, config)
    return index


def load_index(folder: Path) -> ItemIndex:
    """The index that `save` wrote, wherever the folder is now.

    Raises:
        UserError: no index there, files that are damaged, missing or not part of it (all are named), an index of another
            version, or ScaNN needed and not installed.
    """
    folder = Path(folder)
    manifest, path = checked_manifest(folder), folder / TUNING_FILE
    tuning = _tuning(path) if path.exists() else None
    kinds = {ExactIndex.kind: ExactIndex.load, ScannIndex.kind: ScannIndex.load}
    if manifest.search not in kinds:
        raise UserError(
            f"{folder / MANIFEST}: search {manifest.search!r} is unknown to this version: build the index again"
        )
    index = kinds[manifest.search](folder, manifest.config, tuning)
    if index.size != manifest.count:
        raise UserError(
            f"{folder / MANIFEST}: count is {manifest.count}, the files hold {index.size} items: build the index again"
        )
    return index


def _tuning(path: Path) -> Tuning:
    content = read_json(path)
    require_types(content, Tuning, path)
    return Tuning.from_json(content)


def recall_against_exact(index: ItemIndex, exact: ItemIndex, queries_BD: NDArray, k: int) -> float:
    """Recall@k of the index: the share of its hits that are among the k best by exact search, over all queries.

    An item whose score equals that of the k-th best is one of them, as in ann-benchmarks: which of several equal items
    stand in the exact list says nothing of the index.

    Raises:
        ValueError: no queries.
    """
    if not len(queries_BD):
        raise ValueError("recall needs at least one query")
    return share_found(index.search(queries_BD, k), exact.search(queries_BD, k))
