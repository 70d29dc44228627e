"""An index that searches by ScaNN."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tenrec_jax.errors import UserError
from tenrec_jax.npy import read_npy
from tenrec_jax.retrieval.base import Catalogue, ItemIndex
from tenrec_jax.retrieval.config import IndexConfig
from tenrec_jax.retrieval.exact import ExactIndex
from tenrec_jax.retrieval.hits import Floats, Ids, Keys, SearchResult, share_found, sorted_hits
from tenrec_jax.retrieval.scann_tree import FEWEST_ITEMS, ScannTree
from tenrec_jax.retrieval.tuning import (
    Trial,
    Tuning,
    cheapest_reaching,
    leaf_steps,
    reorder_steps,
    search_cost,
    sweep,
)

logger = logging.getLogger(__name__)

_REBUILD_SHARE = 0.05
_SMALLEST_LEAF = 16  # items a leaf on average, in trees that tuning tries


class ScannIndex(ItemIndex):
    """A tree over the catalogue as it was built, and beside it what has changed since.

    Items that were added or replaced stand aside and are searched exactly; those that were replaced or deleted are
    masked in the tree. ScaNN's own updates would put a new vector into a partition that a search may not read. When the
    items aside and those masked are together more than a twentieth of the catalogue, the tree is built again.
    """

    kind = "scann"

    def __init__(self, tree: ScannTree, config: IndexConfig, tuning: Tuning | None = None) -> None:
        super().__init__(tree.vectors_ND.shape[1], config, tuning)
        self._replace(tree)

    @classmethod
    def load(cls, folder: Path, config: IndexConfig, tuning: Tuning | None) -> "ScannIndex":
        """What `save` wrote."""
        index = cls(ScannTree.load(folder, read_npy(folder / "item_ids.npy", np.int32, (None,))), config, tuning)
        if (folder / "changes").is_dir():
            index._aside = ExactIndex.load(folder / "changes", config, None)
            index._mask(read_npy(folder / "changes" / "masked_ids.npy", np.int32, (None,)))
        return index

    @property
    def size(self) -> int:
        """Number of items N."""
        return len(self._tree.item_ids_N) - self._num_masked + self._aside.size

    @property
    def item_ids_N(self) -> Ids:
        """Their ids [N]."""
        return np.concatenate([self._tree.item_ids_N[~self._masked_N], self._aside.item_ids_N])

    def catalogue(self) -> Catalogue:
        """The items as they are now."""
        if not self._changes:
            return Catalogue(self._tree.vectors_ND, self._tree.item_ids_N)
        vectors = np.concatenate([self._tree.vectors_ND[~self._masked_N], self._aside.catalogue().vectors_ND])
        return Catalogue(vectors, self.item_ids_N)

    @property
    def _changes(self) -> int:
        return self._num_masked + self._aside.size

    def _replace(self, tree: ScannTree) -> None:
        """From now on `tree` is the whole catalogue."""
        self._tree, self._num_masked = tree, 0
        self._masked_N = np.zeros(len(tree.item_ids_N), bool)
        self._aside = ExactIndex(np.empty((0, self.dim), np.float32), np.empty(0, np.int32), self.config)

    def _nearest(self, queries: Floats, k: int) -> Keys:
        leaves, reorder = self._settings(k)
        in_tree = min(k, len(self._tree.item_ids_N) - self._num_masked)
        if not in_tree:
            keys = np.empty((len(queries), 0), np.uint64)
        elif self._num_masked:
            keys = self._tree.search_without(self._masked_N, self._num_masked, queries, in_tree, leaves, reorder)
        else:
            keys = self._tree.search(queries, in_tree, leaves, reorder)
        if not self._aside.size:
            return keys
        return np.concatenate([keys, self._aside._nearest(queries, min(k, self._aside.size))], axis=1)

    def _settings(self, k: int) -> tuple[int, int]:
        """Leaves to search and hits to reorder; for k beyond the tuned one in proportion more, unless they were given."""
        leaves, reorder = self.config.leaves_to_search, self.config.reorder or max(200, 10 * k)
        if self.tuning is not None:
            chosen, tuned_k = self.tuning.chosen, self.tuning.k
            leaves = leaves or -(-chosen.leaves_to_search * max(k, tuned_k) // tuned_k)
            reorder = self.config.reorder or -(-chosen.reorder * max(k, tuned_k) // tuned_k)
        return leaves, max(k, reorder)

    def _upsert(self, vectors: Floats, ids: Ids) -> None:
        self._mask(ids)
        self._aside._upsert(vectors, ids)
        self._build_again_after_many_changes()

    def _delete(self, ids: Ids) -> None:
        self._mask(ids)
        self._aside._delete(ids)
        self._build_again_after_many_changes()

    def _mask(self, ids: Ids) -> None:
        self._masked_N |= np.isin(self._tree.item_ids_N, ids)
        self._num_masked = int(self._masked_N.sum())

    def _build_again_after_many_changes(self) -> None:
        changes, num_leaves = self._changes, self._tree.num_leaves
        if changes <= _REBUILD_SHARE * self.size or self.size < max(FEWEST_ITEMS, num_leaves):
            return
        logger.info("index: building again over %d items after %d changes; tune again", self.size, changes)
        self._replace(ScannTree.build(*self.catalogue(), num_leaves))

    def _tuned(self, queries: Floats, target_recall: float, k: int, fewest_share: float) -> Tuning:
        """Trees of more and more leaves are tried, as long as their cheapest settings become cheaper."""
        catalogue = self.catalogue()
        truth = ExactIndex(*catalogue, self.config).search(queries, k)
        trials: list[Trial] = []
        improving: list[tuple[Trial, ScannTree]] = []
        for tree in self._trees(catalogue):
            of_tree = list(self._trials(tree, queries, truth, target_recall, fewest_share))
            trials += of_tree
            cheapest = cheapest_reaching(of_tree, target_recall, k)
            if improving and cheapest.cost >= improving[-1][0].cost:
                break
            improving.append((cheapest, tree))
        chosen, tree = improving[-1]
        if tree is not self._tree:
            self._replace(tree)
        logger.info(
            "index: %d items, %d of %d leaves, %d reordered: recall@%d %.4f, %.0f queries/s",
            *(self.size, chosen.leaves_to_search, chosen.num_leaves, chosen.reorder),
            *(k, chosen.recall, chosen.queries_per_second),
        )
        return Tuning(target_recall, k, len(queries), self.size, chosen, tuple(trials))

    def _trees(self, catalogue: Catalogue) -> Iterator[ScannTree]:
        """Trees over the whole catalogue: of the number of leaves that was given, else of twice as many each time."""
        size = len(catalogue.item_ids_N)
        num_leaves = leaves_for(size, self.config)
        while True:
            if not self._changes and num_leaves == self._tree.num_leaves:
                yield self._tree
            else:
                yield ScannTree.build(*catalogue, num_leaves)
            num_leaves *= 2
            if self.config.num_leaves or size < _SMALLEST_LEAF * num_leaves:
                return

    def _trials(
        self, tree: ScannTree, queries: Floats, truth: SearchResult, target_recall: float, fewest_share: float
    ) -> Iterator[Trial]:
        """The trials of one tree; what the configuration gives is not varied."""
        k, size = truth.items_BK.shape[1], len(tree.item_ids_N)
        in_tree = min(k, size)

        def cost(leaves: int, reorder: int) -> float:
            return search_cost(size, tree.num_leaves, leaves, reorder)

        def measure(leaves: int, reorder: int) -> Trial:
            began = time.perf_counter()
            found = sorted_hits(tree.search(queries, in_tree, leaves, reorder), k)
            rate = len(queries) / (time.perf_counter() - began)
            return Trial(tree.num_leaves, leaves, reorder, share_found(found, truth), cost(leaves, reorder), rate)

        given = self.config.leaves_to_search
        leaves = [given] if given else leaf_steps(round(fewest_share * tree.num_leaves), tree.num_leaves)
        reorders = [max(k, self.config.reorder)] if self.config.reorder else reorder_steps(k, size)
        return sweep(measure, cost, leaves, reorders, target_recall)

    def _write(self, folder: Path) -> None:
        self._tree.save(folder)
        np.save(folder / "item_ids.npy", self._tree.item_ids_N)
        if self._changes:
            (folder / "changes").mkdir()
            self._aside._write(folder / "changes")
            np.save(folder / "changes" / "masked_ids.npy", self._tree.item_ids_N[self._masked_N])


def leaves_for(size: int, config: IndexConfig) -> int:
    """Leaves of the first tree over so many items.

    Raises:
        UserError: too few items for ScaNN.
    """
    num_leaves = config.num_leaves or round(size**0.5)
    if size < max(FEWEST_ITEMS, num_leaves):
        raise UserError(f"{size} items are too few for ScaNN with {num_leaves} leaves: set index.kind to auto")
    return num_leaves
