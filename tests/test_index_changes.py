"""Indexes that change, against a dictionary searched by brute force."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.errors import UserError
from tenrec_jax.retrieval import scann_index
from tenrec_jax.retrieval.index import IndexConfig, build_index, load_index

needs_scann = pytest.mark.skipif(
    importlib.util.find_spec("scann") is None, reason="ScaNN is not installed (it exists for Linux)"
)
both_kinds = pytest.mark.parametrize("kind", ["exact", pytest.param("scann", marks=needs_scann)])
N, D, MOST = 60, 4, 90
# All leaves and all exact scores: ScaNN then finds what brute force finds. One leaf: it misses much.
THOROUGH, HASTY = {"leaves_to_search": 4, "reorder": 1000}, {"leaves_to_search": 1, "reorder": 1}

operation = st.tuples(st.sampled_from(["upsert", "delete"]), st.sets(st.integers(1, MOST), max_size=12))
operations = st.lists(operation, max_size=6)


def random_vectors(generator, count):
    return generator.normal(size=(count, D)).astype(np.float32)


def built(kind, **settings):
    vectors = random_vectors(np.random.default_rng(0), N)
    index = build_index(vectors, np.arange(1, N + 1), IndexConfig(kind=kind, num_leaves=4, **settings))
    return index, dict(zip(range(1, N + 1), vectors, strict=True))


def apply(index, model, change, item_ids, generator):
    """The same change to both; deletes only what is there. Returns the ids that changed."""
    ids = sorted(item_ids) if change == "upsert" else sorted(item_ids & model.keys())
    if not ids:
        return set()
    if change == "upsert":
        vectors = random_vectors(generator, len(ids))
        index.upsert(ids, vectors)
        model.update(zip(ids, vectors, strict=True))
    else:
        index.delete(ids)
        for item in ids:
            del model[item]
    return set(ids)


def brute_force(model, query, k):
    """Items of the dictionary by falling score."""
    return sorted(model, key=lambda item: -float(query.astype(np.float64) @ model[item]))[:k]


@both_kinds
@settings(max_examples=25, deadline=None)
@given(operations, st.sampled_from([0.0, 0.3, 10.0]), st.integers(1, MOST + 5), st.integers(0, 1000))
def test_a_changed_index_searches_as_a_dictionary_does(kind, changes, rebuild_share, k, seed):
    generator = np.random.default_rng([seed, 1])  # not the numbers of the catalogue: equal vectors would be ties
    queries = random_vectors(generator, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scann_index, "_REBUILD_SHARE", rebuild_share)
        index, model = built(kind, **THOROUGH)
        for change, item_ids in changes:
            apply(index, model, change, item_ids, generator)
            result = index.search(queries, k)
            assert index.size == len(model)
            assert set(index.item_ids_N.tolist()) == model.keys()
            for query, items, scores in zip(queries, result.items_BK.tolist(), result.scores_BK, strict=True):
                expected = brute_force(model, query, k)
                assert items == expected + [0] * (k - len(expected))
                found = len(expected)
                np.testing.assert_allclose(scores[:found], [query @ model[item] for item in expected], atol=1e-5)
                assert np.isneginf(scores[found:]).all()


@needs_scann
@settings(max_examples=25, deadline=None)
@given(operations, st.integers(1, 30), st.integers(0, 1000))
def test_changed_items_are_found_as_by_exact_search_however_hasty_the_rest(changes, k, seed):
    generator = np.random.default_rng([seed, 1])  # not the numbers of the catalogue: equal vectors would be ties
    queries = random_vectors(generator, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scann_index, "_REBUILD_SHARE", 10.0)
        index, model = built("scann", **HASTY)
        changed = set()
        for change, item_ids in changes:
            changed |= apply(index, model, change, item_ids, generator)
            for query, items in zip(queries, index.search(queries, k).items_BK.tolist(), strict=True):
                found = [item for item in items if item]
                assert set(found) <= model.keys()
                assert len(set(found)) == len(found)
                assert set(brute_force(model, query, k)) & changed <= set(found)


@needs_scann
def test_masked_items_cost_no_hits():
    """The hundred best of a query are deleted: the next hundred come up, though they all stood behind."""
    generator = np.random.default_rng(3)
    vectors, query = random_vectors(generator, 3000), random_vectors(generator, 1)
    index = build_index(vectors, np.arange(1, 3001), IndexConfig(kind="scann", leaves_to_search=55, reorder=1000))
    order = np.argsort(-(vectors @ query[0])) + 1
    index.delete(order[:100])
    np.testing.assert_array_equal(index.search(query, 10).items_BK[0], order[100:110])


@needs_scann
def test_after_many_changes_the_tree_is_built_again(monkeypatch):
    generator = np.random.default_rng(4)
    index, _ = built("scann", **THOROUGH)
    tree = index._tree
    index.delete([1, 2])
    index.upsert([3], random_vectors(generator, 1))
    assert index._tree is not tree  # 4 of 58: item 3 is masked and stands aside
    assert (index._changes, len(index._tree.item_ids_N)) == (0, 58)
    index.upsert([70], random_vectors(generator, 1))
    assert (index._changes, index.size) == (1, 59)


@needs_scann
def test_a_catalogue_too_small_for_a_tree_is_still_searched():
    index, model = built("scann", **THOROUGH)
    index.delete(np.arange(1, 51))
    query = random_vectors(np.random.default_rng(5), 1)
    survivors = {item: vector for item, vector in model.items() if item > 50}
    assert index.search(query, 3).items_BK[0].tolist() == brute_force(survivors, query[0], 3)
    with pytest.raises(UserError, match="10 items are too few for ScaNN"):
        index.tune(query)


@both_kinds
def test_everything_may_be_deleted_and_come_back(kind):
    index, _ = built(kind, **THOROUGH)
    index.delete(np.arange(1, N + 1))
    assert index.size == 0
    query = np.ones((2, D), np.float32)
    np.testing.assert_array_equal(index.search(query, 3).items_BK, 0)
    index.upsert([7], np.ones((1, D)))
    np.testing.assert_array_equal(index.search(query, 3).items_BK, [[7, 0, 0]] * 2)


@both_kinds
def test_changes_survive_saving(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(scann_index, "_REBUILD_SHARE", 10.0)
    generator = np.random.default_rng(6)
    index, model = built(kind, **THOROUGH)
    queries = random_vectors(generator, 20)
    for change, item_ids in (("upsert", {1, 2, 80}), ("delete", {2, 5, 6}), ("upsert", {6})):
        apply(index, model, change, item_ids, generator)
        index.save(tmp_path / "index")
        index = load_index(tmp_path / "index")  # and goes on from there
    assert index.size == len(model) == N - 1
    for query, items in zip(queries, index.search(queries, N).items_BK.tolist(), strict=True):
        assert items[:-1] == brute_force(model, query, N)
    for name in (path.relative_to(tmp_path / "index").as_posix() for path in (tmp_path / "index").rglob("*.npy")):
        path = tmp_path / "index" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_index(tmp_path / "index")
        path.write_bytes(content)


@needs_scann
def test_tuning_takes_the_changes_into_the_tree(monkeypatch):
    monkeypatch.setattr(scann_index, "_REBUILD_SHARE", 10.0)
    generator = np.random.default_rng(7)
    index, model = built("scann", reorder=1000)
    for change, item_ids in (("upsert", set(range(50, 90))), ("delete", set(range(1, 20)))):
        apply(index, model, change, item_ids, generator)
    queries = random_vectors(generator, 30)
    assert index.tune(queries, 1.0, k=5).items == len(model) == len(index._tree.item_ids_N)
    for query, items in zip(queries, index.search(queries, 5).items_BK.tolist(), strict=True):
        assert items == brute_force(model, query, 5)


@both_kinds
def test_changes_that_make_no_sense_are_refused_and_change_nothing(kind):
    index, model = built(kind, **THOROUGH)
    good = np.ones((2, D))
    bad = good * [[1], [np.nan]]
    cases = (
        (lambda: index.upsert([3, 3], good), "item id 3 occurs more than once"),
        (lambda: index.upsert([3, 0], good), "0 stands for no item"),
        (lambda: index.upsert([3], good), "one integer id for each of 2"),
        (lambda: index.upsert([3, 4], np.ones((2, D + 1))), "items have 5 dimensions, the index has 4"),
        (lambda: index.upsert([3, 4], bad), r"item 4 \(row 1 of the vectors\) holds NaN"),
        (lambda: index.upsert([3, 4], np.ones(2)), "item vectors must be a matrix"),
        (lambda: index.delete([1, 99]), "item 99 is not in the index"),
        (lambda: index.delete([1, 1]), "item id 1 occurs more than once"),
        (lambda: index.delete([1.0]), "one integer id"),
    )
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            change()
    queries = random_vectors(np.random.default_rng(8), 5)
    for query, items in zip(queries, index.search(queries, N).items_BK.tolist(), strict=True):
        assert items == brute_force(model, query, N)
