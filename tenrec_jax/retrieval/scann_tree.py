"""ScaNN itself: a tree of partitions, quantised residuals, exact scores for the best (Guo et al., ICML 2020)."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json
from tenrec_jax.npy import open_npy
from tenrec_jax.retrieval.hits import NO_KEY, Floats, Ids, Keys, packed
from tenrec_jax.sealed import files_in

FEWEST_ITEMS = 16  # ScaNN's quantiser has 16 centres
_SCANN_FILES = {
    "ah_codebook.pb",
    "datapoint_to_token.npy",
    "dataset.npy",
    "hashed_dataset.npy",
    "scann_assets.pbtxt",
    "scann_config.pb",
    "serialized_partitioner.pb",
}


@dataclass(frozen=True)
class ScannTree:
    """A catalogue that does not change: vectors [N, D], their item ids [N], and ScaNN's structure over them."""

    vectors_ND: Floats
    item_ids_N: Ids
    num_leaves: int
    searcher: Any

    @classmethod
    def build(cls, vectors_ND: Floats, item_ids_N: Ids, num_leaves: int) -> "ScannTree":
        """Trains partitions and quantiser. The k-means runs on threads: two builds may differ a little."""
        builder = import_scann().scann_ops_pybind.builder(vectors_ND, 1, "dot_product")
        searcher = (
            builder.tree(num_leaves, num_leaves, training_sample_size=250_000)
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(1)  # this, the number of hits and that of leaves are given again with every search
            .build()
        )
        return cls(vectors_ND, item_ids_N, num_leaves, searcher)

    @classmethod
    def load(cls, folder: Path, item_ids_N: Ids) -> "ScannTree":
        """What `save` wrote. The vectors stay on disk: they are read to tune or to build again, not to search.

        Raises:
            UserError: a file is not what ScaNN writes for such a tree.
        """
        num_leaves, scann = _num_leaves(folder / "tree.json"), folder / "scann"
        vectors_ND = _checked_files(scann, len(item_ids_N), num_leaves)
        try:
            searcher = import_scann().scann_ops_pybind.load_searcher(str(scann), assets_backcompat_shim=False)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{scann} cannot be read by ScaNN ({error}): build the index again") from error
        return cls(vectors_ND, item_ids_N, num_leaves, searcher)

    def save(self, folder: Path) -> None:
        """Writes all but the item ids."""
        (folder / "scann").mkdir()
        self.searcher.serialize(str(folder / "scann"), relative_path=True)
        (folder / "tree.json").write_text(json.dumps({"num_leaves": self.num_leaves}), encoding="utf-8")

    def search(self, queries: Floats, k: int, leaves_to_search: int, reorder: int) -> Keys:
        """Packed hits [B, k] in no order, k at most N; no key where ScaNN finds fewer than k."""
        places, scores = self._places(queries, k, leaves_to_search, reorder)
        return np.where(np.isfinite(scores), packed(scores, self.item_ids_N[places]), NO_KEY)

    def search_without(
        self, masked_N: NDArray[np.bool_], num_masked: int, queries: Floats, k: int, leaves_to_search: int, reorder: int
    ) -> Keys:
        """As `search`, among the items that are not masked, k at most their number.

        More hits than k are asked for, and for the queries that got too many masked ones twice as many again.
        """
        keys = np.full((len(queries), k), NO_KEY)
        rows, fetch = np.arange(len(queries)), min(k + num_masked, k + k // 8 + 8)
        while len(rows):
            places, scores = self._places(queries[rows], fetch, leaves_to_search, reorder + fetch - k)
            found = np.isfinite(scores)
            live = found & ~masked_N[places]
            hits = np.where(live, packed(scores, self.item_ids_N[places]), NO_KEY)
            keys[rows] = np.sort(hits, axis=1)[:, :k]
            rows = rows[found.all(axis=1) & (live.sum(axis=1) < k)]
            fetch = min(k + num_masked, 2 * fetch)
        return keys

    def _places(self, queries: Floats, k: int, leaves_to_search: int, reorder: int) -> tuple[NDArray, Floats]:
        """Rows [B, k] and scores; where ScaNN finds fewer than k it gives row 0 with score NaN."""
        # In larger batches ScaNN may read other partitions, and a user's items would depend on who else is asked for.
        # They are no faster either.
        return self.searcher.search_batched_parallel(
            queries, k, min(reorder, len(self.item_ids_N)), min(leaves_to_search, self.num_leaves), batch_size=1
        )


def _num_leaves(path: Path) -> int:
    content = read_json(path)
    num_leaves = content.get("num_leaves") if isinstance(content, dict) else None
    if type(num_leaves) is not int or num_leaves < 1:
        raise UserError(f"{path} does not say the number of leaves: build the index again")
    return num_leaves


def _checked_files(scann: Path, size: int, num_leaves: int) -> Floats:
    """The vectors, after what ScaNN would believe unseen was looked at: its own reader reads beyond the end of arrays that lie."""
    for name in sorted(set(files_in(scann)) - _SCANN_FILES):
        raise UserError(f"{scann / name} is no file of such an index, and ScaNN might run it: build the index again")
    leaf_N = open_npy(scann / "datapoint_to_token.npy", np.int32, (size,))
    open_npy(scann / "hashed_dataset.npy", np.uint8, (size, None))
    if size and not 0 <= leaf_N.min() <= leaf_N.max() < num_leaves:
        raise UserError(f"{scann / 'datapoint_to_token.npy'} names leaves that there are not: build the index again")
    return open_npy(scann / "dataset.npy", np.float32, (size, None))


def import_scann() -> ModuleType:
    """ScaNN without its TensorFlow operator, which fails to load beside most TensorFlow versions and is not needed.

    Raises:
        UserError: ScaNN is not installed.
    """
    if importlib.util.find_spec("scann") is None:
        raise UserError("ScaNN is not installed (it exists for Linux): pip install scann, or set index.kind to exact")
    with _hidden("tensorflow"):
        import scann
    return scann


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Makes `import name` fail as if it were not installed. Only this entry is put back: what is imported stays."""
    missing = ModuleType("missing")
    before = sys.modules.get(name, missing)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[name]
        else:
            sys.modules[name] = before
