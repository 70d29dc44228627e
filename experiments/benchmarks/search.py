"""Sides of the search benchmark: our index, faiss and hnswlib, each built once, kept in a folder, and set to a recall.

Every side has one number that trades time for recall (leaves, probes, ef), which is raised until the tuning queries reach the recall.
faiss is taken as plain inverted lists, as lists of 4-bit codes whose best are scored again (the nearest to what ScaNN does), and as HNSW.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np

from tenrec_jax.retrieval.index import IndexConfig, build_index, load_index

K, BATCH, THREADS = 100, 256, 2
CATEGORIES, CLUSTERS_A_CATEGORY = 200, 50
Search = Callable[[np.ndarray], np.ndarray]
FAISS = {
    "IVF1024,Flat": "faiss IVF, exact scores",
    "IVF2048,PQ32x4fs,RFlat": "faiss IVF, 4-bit codes, reordered",
    "HNSW32": "faiss HNSW",
}


@dataclass(frozen=True)
class Side:
    """A way to search: its name, the setting it was given, and the function from queries [B, D] to places [B, K]."""

    name: str
    setting: str
    search: Search


def clustered(rows: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors [rows, D] in clusters that stand in categories; the seed draws the members, not the clusters."""
    random = np.random.default_rng(99)
    categories = np.repeat(
        _unit(random.standard_normal((CATEGORIES, dim), dtype=np.float32)), CLUSTERS_A_CATEGORY, axis=0
    )
    clusters = _unit(categories + 0.08 * random.standard_normal(categories.shape, dtype=np.float32))
    random = np.random.default_rng(seed)
    noise = random.standard_normal((rows, dim), dtype=np.float32)
    return _unit(clusters[random.integers(0, len(clusters), rows)] + 0.06 * noise)


def recall(search: Search, queries: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true places that are found."""
    pairs = zip(in_batches(search, queries), truth, strict=True)
    return sum(len(np.intersect1d(found, true)) for found, true in pairs) / truth.size


def in_batches(search: Search, queries: np.ndarray) -> np.ndarray:
    """All answers, asked for in batches."""
    return np.concatenate([search(queries[start : start + BATCH]) for start in range(0, len(queries), BATCH)])


def queries_per_second(search: Search, queries: np.ndarray) -> float:
    """Rate over a second or more: fast sides answer all queries several times."""
    passes, began = 0, time.perf_counter()
    while not passes or time.perf_counter() < began + 1:
        in_batches(search, queries)
        passes += 1
    return passes * len(queries) / (time.perf_counter() - began)


def ours(vectors: np.ndarray, queries: np.ndarray, target: float, folder: Path) -> Side:
    """Our index, by the tuning that it does itself."""
    config = IndexConfig(kind="scann", target_recall=target)
    ids = np.arange(1, len(vectors) + 1)

    def build(path: Path) -> None:
        build_index(vectors, ids, config, tuning_queries_BD=queries).save(path)

    index = load_index(_kept(folder / f"ours_{target:g}", build))
    assert index.tuning is not None
    chosen = index.tuning.chosen
    setting = f"{chosen.leaves_to_search} of {chosen.num_leaves} leaves, {chosen.reorder} reordered"
    return Side("ours, ScaNN", setting, lambda batch: index.search(batch, K).items_BK - 1)


def faiss_exact(vectors: np.ndarray) -> Side:
    """faiss, every inner product."""
    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return Side("faiss, exact", "", lambda batch: index.search(batch, K)[1])


def our_exact(vectors: np.ndarray) -> Side:
    """Ours, every inner product."""
    index = build_index(vectors, np.arange(1, len(vectors) + 1), IndexConfig(kind="exact"))
    return Side("ours, exact", "", lambda batch: index.search(batch, K).items_BK - 1)


def faiss_side(
    factory: str, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray, target: float, folder: Path
) -> Side:
    """An index of `FAISS`. Of its settings that reach the recall, the fastest on the tuning queries counts."""
    faiss.omp_set_num_threads(THREADS)

    def build(path: Path) -> None:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[:250_000])
        index.add(vectors)
        faiss.write_index(index, str(path))

    index = faiss.read_index(str(_kept(folder / factory.replace(",", "_"), build)))

    def side(parameters: Any, setting: str) -> Side:
        return Side(FAISS[factory], setting, lambda batch: index.search(batch, K, params=parameters)[1])

    def probing(again: int) -> Iterable[Side]:
        for probes in _steps(1, 256):
            lists = faiss.SearchParametersIVF(nprobe=probes)
            if again:
                refined = faiss.IndexRefineSearchParameters(k_factor=again, base_index_params=lists)
                yield side(refined, f"{probes} lists, {again * K} reordered")
            else:
                yield side(lists, f"{probes} lists")

    ways: list[Iterable[Side]]
    if "HNSW" in factory:
        ways = [(side(faiss.SearchParametersHNSW(efSearch=ef), f"ef {ef}") for ef in _steps(K, 2000))]
    else:
        ways = [probing(again) for again in ((2, 3, 4, 8) if "RFlat" in factory else (0,))]
    return _fastest_reaching(ways, queries, truth, target)


def hnswlib_side(vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray, target: float, folder: Path) -> Side:
    """hnswlib with the parameters of its examples."""

    def build(path: Path) -> None:
        index = hnswlib.Index("ip", vectors.shape[1])
        index.init_index(len(vectors), M=16, ef_construction=200)
        index.add_items(vectors, num_threads=THREADS)
        index.save_index(str(path))

    path = _kept(folder / "hnswlib", build)
    index = hnswlib.Index("ip", vectors.shape[1])
    index.load_index(str(path))

    def search(ef: int, batch: np.ndarray) -> np.ndarray:
        index.set_ef(ef)
        return index.knn_query(batch, K, num_threads=THREADS)[0].astype(np.int64)

    def side(ef: int) -> Side:
        return Side("hnswlib", f"ef {ef}", lambda batch: search(ef, batch))

    return _fastest_reaching([(side(ef) for ef in _steps(K, 2000))], queries, truth, target)


def _fastest_reaching(ways: Iterable[Iterable[Side]], queries: np.ndarray, truth: np.ndarray, target: float) -> Side:
    """Of each way the first side that reaches the recall; of these the fastest."""
    reaching: list[tuple[float, Side]] = []
    for sides in ways:
        for side in sides:
            if recall(side.search, queries, truth) >= target:
                reaching.append((queries_per_second(side.search, queries), side))
                break
    return max(reaching, key=lambda pair: pair[0])[1]


def _kept(path: Path, build: Callable[[Path], None]) -> Path:
    if not path.exists():
        began = time.perf_counter()
        build(path)
        print(f"built {path.name} in {time.perf_counter() - began:.0f} s", flush=True)
    return path


def _steps(first: int, last: int) -> Iterable[int]:
    """From the first to the last in steps of a sixth, as our tuning takes them."""
    return itertools.takewhile(
        lambda x: x <= last, itertools.accumulate(itertools.repeat(first), lambda x, _: x + max(1, x // 6))
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
