"""Exact search."""

import time
from pathlib import Path

import numpy as np

from tenrec_jax.npy import read_npy
from tenrec_jax.retrieval.base import Catalogue, ItemIndex
from tenrec_jax.retrieval.config import IndexConfig
from tenrec_jax.retrieval.hits import NO_KEY, Floats, Ids, Keys, best_of
from tenrec_jax.retrieval.tuning import Trial, Tuning

_QUERY_BLOCK, _ITEM_BLOCK = 256, 1 << 12  # 4 MB of scores, about 60 MB in all


class ExactIndex(ItemIndex):
    """Every inner product is computed, in blocks, so that memory does not grow with the catalogue.

    A change copies the arrays: change many items in one call.
    """

    kind = "exact"

    def __init__(self, vectors_ND: Floats, item_ids_N: Ids, config: IndexConfig, tuning: Tuning | None = None) -> None:
        super().__init__(vectors_ND.shape[1], config, tuning)
        self._vectors_ND, self._item_ids_N = vectors_ND, item_ids_N

    @classmethod
    def load(cls, folder: Path, config: IndexConfig, tuning: Tuning | None) -> "ExactIndex":
        """What `save` wrote."""
        vectors = read_npy(folder / "vectors.npy", np.float32, (None, None))
        ids = read_npy(folder / "item_ids.npy", np.int32, (len(vectors),))
        return cls(vectors, ids, config, tuning)

    @property
    def size(self) -> int:
        """Number of items N."""
        return len(self._item_ids_N)

    @property
    def item_ids_N(self) -> Ids:
        """Their ids [N]."""
        return self._item_ids_N

    def catalogue(self) -> Catalogue:
        """The items as they are now."""
        return Catalogue(self._vectors_ND, self._item_ids_N)

    def _nearest(self, queries: Floats, k: int) -> Keys:
        best = np.full((len(queries), k), NO_KEY)
        rows = max(1, min(_QUERY_BLOCK, _QUERY_BLOCK * _ITEM_BLOCK // k))
        for start in range(0, len(queries), rows):
            block = best[start : start + rows]
            for first in range(0, self.size, _ITEM_BLOCK):
                items = slice(first, first + _ITEM_BLOCK)
                scores = queries[start : start + rows] @ self._vectors_ND[items].T
                block[:] = best_of(block, scores, self._item_ids_N[items])
        return best

    def _upsert(self, vectors: Floats, ids: Ids) -> None:
        self._delete(ids)
        self._vectors_ND = np.concatenate([self._vectors_ND, vectors])
        self._item_ids_N = np.concatenate([self._item_ids_N, ids])

    def _delete(self, ids: Ids) -> None:
        kept = ~np.isin(self._item_ids_N, ids)
        self._vectors_ND, self._item_ids_N = self._vectors_ND[kept], self._item_ids_N[kept]

    def _tuned(self, queries: Floats, target_recall: float, k: int, fewest_share: float) -> Tuning:
        """Nothing to choose: approximate search is compared with this."""
        began = time.perf_counter()
        self.search(queries, k)
        rate = len(queries) / (time.perf_counter() - began)
        trial = Trial(num_leaves=0, leaves_to_search=0, reorder=0, recall=1.0, cost=self.size, queries_per_second=rate)
        return Tuning(target_recall, k, len(queries), self.size, trial, (trial,))

    def _write(self, folder: Path) -> None:
        np.save(folder / "vectors.npy", self._vectors_ND)
        np.save(folder / "item_ids.npy", self._item_ids_N)
