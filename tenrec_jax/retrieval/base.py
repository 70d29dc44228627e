"""What every index can do: search, change, be tuned, be saved."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text
from tenrec_jax.retrieval.checks import checked_ids, checked_vectors
from tenrec_jax.retrieval.config import IndexConfig
from tenrec_jax.retrieval.hits import Allowed, AllowedHits, Floats, Ids, Keys, SearchResult, sorted_hits
from tenrec_jax.retrieval.store import Manifest, written_as_a_whole
from tenrec_jax.retrieval.tuning import Tuning

TUNED_K = 100
TUNING_FILE = "tuning.json"


class Catalogue(NamedTuple):
    """Vectors [N, D] float32 and their item ids [N] int32."""

    vectors_ND: Floats
    item_ids_N: Ids


class ItemIndex(ABC):
    """A catalogue of vectors with dense item ids that finds the largest inner products.

    Attributes:
        config: how it was asked to search.
        dim: D of the vectors.
        tuning: what the last tuning measured and chose; None where there was none.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int, config: IndexConfig, tuning: Tuning | None = None) -> None:
        self.dim, self.config, self.tuning = dim, config, tuning

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of items N."""

    @property
    @abstractmethod
    def item_ids_N(self) -> Ids:
        """Their ids [N], in the order of `catalogue`."""

    @abstractmethod
    def catalogue(self) -> Catalogue:
        """The items as they are now."""

    def search(self, queries_BD: NDArray, k: int) -> SearchResult:
        """The k best items of each query [B, D]; k may exceed the catalogue.

        Raises:
            UserError: queries of another dimension, or with an entry that is not finite (the first such row is named).
            ValueError: k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        queries = self._checked_queries(queries_BD)
        found = min(k, self.size) if len(queries) else 0
        return sorted_hits(self._nearest(queries, found) if found else np.empty((len(queries), 0), np.uint64), k)

    def search_allowed(self, queries_BD: NDArray, allowed: Sequence[Allowed], k: int) -> list[AllowedHits]:
        """The k best items of each query [B, D] among those that a condition of its own allows; fewer where the index holds no more.

        Somewhat more than k hits are asked for, and for the queries that have too few allowed ones among them twice as many again, so
        that the work hangs on how many of the best are refused, and not on how many are refused in all.

        Args:
            allowed: one condition a query: item ids [n] to booleans [n].

        Raises:
            UserError, ValueError: as `search` does.
        """
        hits, rows, fetch = [AllowedHits.none()] * len(queries_BD), list(range(len(queries_BD))), k + k // 8 + 8
        while rows:
            found = self.search(queries_BD[rows], max(1, min(fetch, self.size)))
            for row, scores, items in zip(rows, found.scores_BK, found.items_BK, strict=True):
                hits[row] = AllowedHits.of(scores[items > 0], items[items > 0], allowed[row], k)
            full = (found.items_BK[:, -1] > 0).tolist()
            rows = [row for row, more in zip(rows, full, strict=True) if more and len(hits[row].items_C) < k]
            if fetch >= self.size:
                break
            fetch *= 2
        return hits

    def search_unseen(self, query_1D: NDArray, seen: Ids, k: int) -> AllowedHits:
        """`search_allowed` of one query [1, D], for what is beside the items that were seen."""
        return self.search_allowed(query_1D, [lambda items: ~np.isin(items, seen)], k)[0]

    def upsert(self, item_ids_M: ArrayLike, vectors_MD: NDArray) -> None:
        """Add items, or give items that are there another vector. Searches find them at once, as exact search does.

        Raises:
            UserError: an id that occurs twice or does not fit, vectors of another dimension or with an entry that is not
                finite. Nothing has changed then.
        """
        ids = checked_ids(np.asarray(item_ids_M), len(vectors_MD))
        vectors = checked_vectors(vectors_MD, "item", ids)
        if vectors.shape[1] != self.dim:
            raise UserError(f"items have {vectors.shape[1]} dimensions, the index has {self.dim}: check the model")
        self._upsert(vectors, ids)

    def delete(self, item_ids_M: ArrayLike) -> None:
        """Remove items. No search finds them any more.

        Raises:
            UserError: an id that is not in the index, or occurs twice. Nothing has changed then.
        """
        ids = checked_ids(np.asarray(item_ids_M), np.size(item_ids_M))
        unknown = ids[~np.isin(ids, self.item_ids_N)]
        if len(unknown):
            raise UserError(
                f"item {unknown[0]} is not in the index and cannot be deleted: look for it under another id"
            )
        self._delete(ids)

    def tune(
        self, queries_BD: NDArray, target_recall: float = 0.99, *, k: int = TUNED_K, fewest_share: float = 0.0
    ) -> Tuning:
        """Choose the settings of approximate search by measuring, and search by them from now on.

        Args:
            queries_BD: a few hundred typical queries, none of those by which the index is judged later.
            target_recall: recall@k against exact search that the cheapest setting has to reach.
            k: hits per query.
            fewest_share: share of ScaNN's leaves that is searched at least, where the queries are not quite typical.

        Returns:
            The choice and all trials; it is kept as `tuning` and saved with the index.

        Raises:
            UnreachableRecallError: no setting reaches it; the index searches as before.
            UserError: queries of another dimension, or with an entry that is not finite.
            ValueError: no queries, k below 1, or a target outside (0, 1].
        """
        if not len(queries_BD) or k < 1 or not 0 < target_recall <= 1:
            raise ValueError(
                f"tuning needs queries, k >= 1 and a recall in (0, 1], got {len(queries_BD)}, {k}, {target_recall}"
            )
        self.tuning = self._tuned(self._checked_queries(queries_BD), target_recall, k, fewest_share)
        return self.tuning

    def save(self, folder: Path) -> None:
        """Writes the index; an index already there is replaced as a whole, any other content is left alone.

        Raises:
            UserError: the folder holds something that is not an index.
        """
        manifest = Manifest(self.kind, self.config, self.dim, self.size)
        with written_as_a_whole(Path(folder), manifest) as partial:
            self._write(partial)
            if self.tuning is not None:
                (partial / TUNING_FILE).write_text(json_text(self.tuning.to_json()), encoding="utf-8")

    def _checked_queries(self, queries_BD: NDArray) -> Floats:
        queries = checked_vectors(queries_BD, "query")
        if queries.shape[1] != self.dim:
            raise UserError(f"queries have {queries.shape[1]} dimensions, the index has {self.dim}: check the model")
        return queries

    @abstractmethod
    def _nearest(self, queries: Floats, k: int) -> Keys:
        """Packed hits of each query in any order, the k best among them; k is at least 1 and at most N."""

    @abstractmethod
    def _upsert(self, vectors: Floats, ids: Ids) -> None: ...

    @abstractmethod
    def _delete(self, ids: Ids) -> None: ...

    @abstractmethod
    def _tuned(self, queries: Floats, target_recall: float, k: int, fewest_share: float) -> Tuning: ...

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Writes what a load needs beside the manifest."""
