"""The items with the largest inner product, by ScaNN or by exact search, behind one interface.

A saved index is a folder: `index.json` (kind, configuration, dimensions, SHA-256 of every file), `item_ids.npy`, and
`vectors.npy` (exact) or `scann/`. It may be moved. Every search gives k hits in order of falling score, equal scores in
order of item id; where fewer exist the rest is item 0, "no item", with score -inf.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError

_FORMAT = 1
_QUERY_BLOCK, _ITEM_BLOCK = 256, 1 << 12  # of exact search: 4 MB of scores, about 60 MB in all
_LARGEST = 1e15  # entries beyond it could overflow an inner product in float32
_TUNING_QUERIES, _TUNING_K, _TUNING_RECALL = 256, 100, 0.96
_NO_KEY = np.uint64(2**64 - 1)

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class IndexConfig:
    """How to search. 0 means "choose".

    Attributes:
        kind: "exact", "scann", or "auto": ScaNN where it is installed and the catalogue is large enough for it.
        num_leaves: partitions of the ScaNN tree; chosen: the square root of the catalogue.
        leaves_to_search: partitions read per query; chosen: as many as a recall@100 of 0.96 takes on the tuning
            queries, and for k > 100 in proportion more. With too few, searches end in "no item".
        reorder: approximate hits that are scored again exactly, at least k; chosen: max(200, 10 k).
        min_items_for_scann: "auto" searches smaller catalogues exactly.
    """

    kind: str = "auto"
    num_leaves: int = 0
    leaves_to_search: int = 0
    reorder: int = 0
    min_items_for_scann: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "scann", "exact"):
            raise UserError(f"index.kind is {self.kind!r}: choose auto, scann or exact")
        for key in ("num_leaves", "leaves_to_search", "reorder", "min_items_for_scann"):
            if getattr(self, key) < 0:
                raise UserError(f"index.{key} is {getattr(self, key)}: give a positive number, or 0 to have it chosen")


class SearchResult(NamedTuple):
    """Hits per query: inner products [B, K] float32 (-inf: none) and dense item ids [B, K] int32 (0: none)."""

    scores_BK: Floats
    items_BK: Ids


class ItemIndex(ABC):
    """A fixed catalogue of vectors [N, D] with dense item ids [N] that finds the largest inner products."""

    kind: ClassVar[str]

    def __init__(self, item_ids_N: Ids, dim: int, config: IndexConfig) -> None:
        self.item_ids_N, self.dim, self.config = item_ids_N, dim, config

    @property
    def size(self) -> int:
        """Number of items N."""
        return len(self.item_ids_N)

    def search(self, queries_BD: NDArray, k: int) -> SearchResult:
        """The k best items of each query [B, D]; k may exceed the catalogue.

        Raises:
            UserError: queries of another dimension, or with an entry that is not finite (the first such row is named).
            ValueError: k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        queries = _checked(queries_BD, "query")
        if queries.shape[1] != self.dim:
            raise UserError(f"queries have {queries.shape[1]} dimensions, the index has {self.dim}: check the model")
        result = np.full((len(queries), k), _NO_KEY)
        if len(queries):
            keys = self._nearest(queries, min(k, self.size))
            result[:, : keys.shape[1]] = np.sort(keys, axis=1)
        scores, items = _unpacked(result)
        return SearchResult(np.where(result == _NO_KEY, -np.inf, scores), np.where(result == _NO_KEY, 0, items))

    def save(self, folder: Path) -> None:
        """Writes the index; an index already there is replaced as a whole, any other content is left alone.

        Raises:
            UserError: the folder holds something that is not an index.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "index.json").exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no index: choose another folder")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.save(partial / "item_ids.npy", self.item_ids_N)
        self._write(partial)
        manifest = {
            "format": _FORMAT,
            "kind": self.kind,
            "config": asdict(self.config),
            "dim": self.dim,
            "count": self.size,
            "files": {name: _sha256(partial / name) for name in _files(partial)},
        }
        (partial / "index.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)

    @abstractmethod
    def _nearest(self, queries: Floats, k: int) -> NDArray[np.uint64]:
        """At most k packed hits per query, in any order."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Writes what a load needs beside the item ids."""


class ExactIndex(ItemIndex):
    """Every inner product is computed, in blocks, so that memory does not grow with the catalogue."""

    kind = "exact"

    def __init__(self, vectors_ND: Floats, item_ids_N: Ids, config: IndexConfig) -> None:
        super().__init__(item_ids_N, vectors_ND.shape[1], config)
        self.vectors_ND = vectors_ND

    def _nearest(self, queries: Floats, k: int) -> NDArray[np.uint64]:
        best = np.full((len(queries), k), _NO_KEY)
        rows = max(1, min(_QUERY_BLOCK, _QUERY_BLOCK * _ITEM_BLOCK // k))
        for start in range(0, len(queries), rows):
            block = best[start : start + rows]
            for first in range(0, self.size, _ITEM_BLOCK):
                items = slice(first, first + _ITEM_BLOCK)
                scores = queries[start : start + rows] @ self.vectors_ND[items].T
                block[:] = _merged(block, scores, self.item_ids_N[items])
        return best

    def _write(self, folder: Path) -> None:
        np.save(folder / "vectors.npy", self.vectors_ND)


class ScannIndex(ItemIndex):
    """ScaNN: a tree of partitions, quantised residuals, exact scores for the best (Guo et al., ICML 2020)."""

    kind = "scann"

    def __init__(self, searcher: Any, item_ids_N: Ids, dim: int, config: IndexConfig, leaves: int) -> None:
        super().__init__(item_ids_N, dim, config)
        self._searcher, self.leaves = searcher, leaves

    def _nearest(self, queries: Floats, k: int) -> NDArray[np.uint64]:
        leaves, reorder = self.leaves, max(k, self.config.reorder or max(200, 10 * k))
        if not self.config.leaves_to_search:
            leaves = -(-leaves * max(k, _TUNING_K) // _TUNING_K)
        # In larger batches ScaNN may read other partitions, and a user's items would depend on who else is asked for.
        places, scores = self._searcher.search_batched_parallel(
            queries, k, min(reorder, self.size), leaves, batch_size=1
        )
        # Where ScaNN finds fewer than k it reports place 0 with score NaN.
        keys = _packed(scores, self.item_ids_N[places])
        return np.where(np.isfinite(scores), keys, _NO_KEY)

    def _write(self, folder: Path) -> None:
        (folder / "scann").mkdir()
        self._searcher.serialize(str(folder / "scann"), relative_path=True)
        (folder / "leaves.json").write_text(json.dumps(self.leaves), encoding="utf-8")


def build_index(
    vectors_ND: NDArray, item_ids_N: NDArray, config: IndexConfig, *, tuning_queries_BD: NDArray | None = None
) -> ItemIndex:
    """An index over a catalogue. ScaNN's k-means runs on threads: two builds may differ a little, a saved one does not.

    Args:
        vectors_ND: one vector per item [N, D], of any length.
        item_ids_N: their dense ids [N], distinct, each at least 1.
        config: how to search.
        tuning_queries_BD: a few hundred typical queries by which ScaNN's `leaves_to_search` is chosen. Without them
            items stand in for queries, and for safety at least a tenth of the leaves is searched.

    Raises:
        UserError: an empty catalogue, an entry that is not finite (the first such item is named: ScaNN would end the
            process), ids that do not fit, ScaNN asked for but not installed, or too small a catalogue for it.
    """
    if np.ndim(vectors_ND) != 2 or not np.size(vectors_ND):
        raise UserError(f"the catalogue is empty: vectors have shape {np.shape(vectors_ND)}, need [N, D]")
    ids = _checked_ids(np.asarray(item_ids_N), len(vectors_ND))
    vectors = _checked(vectors_ND, "item", ids)
    exact = ExactIndex(vectors, ids, config)
    small = len(ids) < config.min_items_for_scann
    if config.kind == "exact" or (config.kind == "auto" and (small or importlib.util.find_spec("scann") is None)):
        return exact
    num_leaves = config.num_leaves or round(len(ids) ** 0.5)
    if len(ids) < max(16, num_leaves):
        raise UserError(f"{len(ids)} items are too few for ScaNN with {num_leaves} leaves: set index.kind to auto")
    searcher = (
        import_scann()
        .scann_ops_pybind.builder(vectors, _TUNING_K, "dot_product")
        .tree(num_leaves, num_leaves, training_sample_size=250_000)
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(10 * _TUNING_K)
        .build()
    )
    index = ScannIndex(searcher, ids, exact.dim, config, config.leaves_to_search)
    if not config.leaves_to_search:
        index.leaves = _tuned_leaves(index, exact, num_leaves, tuning_queries_BD)
    return index


def load_index(folder: Path) -> ItemIndex:
    """The index that `save` wrote, wherever the folder is now.

    Raises:
        UserError: no index there, a file that is damaged, missing or not part of it (it is named), an index of a newer
            version, or ScaNN needed and not installed.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no index (no index.json): build one, or give another folder")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        layout, kind, files = manifest["format"], manifest["kind"], dict(manifest["files"])
        config, dim, count = IndexConfig(**manifest["config"]), int(manifest["dim"]), int(manifest["count"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): build the index again") from error
    if layout != _FORMAT or kind not in (ExactIndex.kind, ScannIndex.kind):
        raise UserError(f"{path}: format {layout}, kind {kind!r} is unknown to this version: build the index again")
    present = _files(folder)
    for name in sorted({*files, *present}):
        if name not in files:
            raise UserError(f"{folder / name} is not part of the index: remove it")
        if name not in present or _sha256(folder / name) != files[name]:
            raise UserError(f"{folder / name} is damaged or missing: copy or build the index again")
    ids = np.load(folder / "item_ids.npy", allow_pickle=False)
    if len(ids) != count:
        raise UserError(f"{path}: count is {count}, item_ids.npy holds {len(ids)}: build the index again")
    if kind == ExactIndex.kind:
        return ExactIndex(np.load(folder / "vectors.npy", allow_pickle=False), ids, config)
    leaves = json.loads((folder / "leaves.json").read_text(encoding="utf-8"))
    loader = import_scann().scann_ops_pybind.load_searcher
    return ScannIndex(loader(str(folder / "scann"), assets_backcompat_shim=False), ids, dim, config, leaves)


def recall_against_exact(index: ItemIndex, exact: ItemIndex, queries_BD: NDArray, k: int) -> float:
    """Recall@k of the index: the share of its hits that are among the k best by exact search, over all queries.

    An item whose score equals that of the k-th best is one of them, as in ann-benchmarks: which of several equal items
    stand in the exact list says nothing of the index.

    Raises:
        ValueError: no queries.
    """
    if not len(queries_BD):
        raise ValueError("recall needs at least one query")
    return _share_found(index.search(queries_BD, k), exact.search(queries_BD, k))


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


def _tuned_leaves(index: ScannIndex, exact: ExactIndex, num_leaves: int, queries_BD: NDArray | None) -> int:
    """The fewest leaves, in steps of a quarter, that reach the recall; all of them where none does."""
    if queries_BD is None:
        places = np.random.default_rng(0).permutation(exact.size)[:_TUNING_QUERIES]
        queries_BD, index.leaves = exact.vectors_ND[places], max(1, num_leaves // 10)
    else:
        index.leaves = max(1, num_leaves // 100)
    truth = exact.search(queries_BD, _TUNING_K)
    while index.leaves < num_leaves:
        if _share_found(index.search(queries_BD, _TUNING_K), truth) >= _TUNING_RECALL:
            break
        index.leaves = min(num_leaves, index.leaves + 1 + index.leaves // 4)
    return index.leaves


def _share_found(found: SearchResult, truth: SearchResult) -> float:
    row = np.arange(len(truth.items_BK), dtype=np.int64)[:, None] << 32
    member = np.isin(found.items_BK + row, truth.items_BK + row)
    last = np.where(truth.items_BK > 0, truth.scores_BK, np.inf).min(axis=1, keepdims=True)
    tied = found.scores_BK >= last - 1e-6 * np.abs(last)
    return int(((member | tied) & (found.items_BK > 0)).sum()) / int((truth.items_BK > 0).sum())


def _checked(vectors: NDArray, name: str, ids: Ids | None = None) -> Floats:
    """float32 [B, D], C-contiguous; every entry finite and small enough for inner products in float32."""
    if np.ndim(vectors) != 2 or not np.shape(vectors)[1]:
        raise UserError(f"{name} vectors must be a matrix with at least one column, got shape {np.shape(vectors)}")
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(vectors, dtype=np.float32)
    good = (result.max(axis=1, initial=0) <= _LARGEST) & (result.min(axis=1, initial=0) >= -_LARGEST)
    if not good.all():
        row = int(np.argmin(good))
        which = f"{name} row {row}" if ids is None else f"{name} {ids[row]} (row {row} of the vectors)"
        raise UserError(f"{which} holds NaN, infinity or an entry beyond {_LARGEST:g}: look for a diverged model")
    return result


def _checked_ids(ids: NDArray, count: int) -> Ids:
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"need one integer id for each of {count} items, got {ids.dtype} {ids.shape}")
    if ids.min() < 1 or ids.max() > np.iinfo(np.int32).max:
        raise UserError(f"item ids must lie in [1, 2**31), got {ids.min()} to {ids.max()}: 0 stands for no item")
    values, times = np.unique(ids, return_counts=True)
    if len(values) < count:
        raise UserError(f"item id {values[np.argmax(times > 1)]} occurs more than once")
    return ids.astype(np.int32)


def _packed(scores: Floats, items: Ids) -> NDArray[np.uint64]:
    """Keys whose rising order is falling score, then rising item id: the score's bits, made monotone, above the id."""
    bits = (scores + np.float32(0)).view(np.uint32)  # the sum turns -0.0 into 0.0
    falling = ~bits ^ ((~(bits >> 31) + np.uint32(1)) | np.uint32(1 << 31))
    return (falling.astype(np.uint64) << np.uint64(32)) | items.astype(np.uint64)


def _unpacked(keys: NDArray[np.uint64]) -> tuple[Floats, Ids]:
    rising = ~(keys >> np.uint64(32)).astype(np.uint32)
    bits = rising ^ (((rising >> 31) - np.uint32(1)) | np.uint32(1 << 31))
    return bits.view(np.float32), (keys & np.uint64(2**32 - 1)).astype(np.uint32).view(np.int32)


def _merged(best: NDArray[np.uint64], scores: Floats, items: Ids) -> NDArray[np.uint64]:
    """The best [B, K] keys of those held and of a block of scores [B, n]; only scores that may enter are packed."""
    worst = best.max(axis=1)
    bar = np.where(worst == _NO_KEY, -np.inf, _unpacked(worst)[0])
    # Twenty times as fast as nonzero of the matrix.
    row, column = np.divmod(np.flatnonzero(scores >= bar[:, None]), scores.shape[1])
    if not len(row):
        return best
    entering = np.bincount(row, minlength=len(best))
    place = np.arange(len(row)) - np.repeat(np.cumsum(entering) - entering, entering)
    candidates = np.full((len(best), best.shape[1] + entering.max()), _NO_KEY)
    candidates[:, : best.shape[1]] = best
    candidates[row, best.shape[1] + place] = _packed(scores[row, column], items[column])
    candidates.partition(best.shape[1] - 1, axis=1)
    return candidates[:, : best.shape[1]]


def _files(folder: Path) -> list[str]:
    """The files of an index, relative, in order; index.json and hidden files are not among them."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / "index.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
