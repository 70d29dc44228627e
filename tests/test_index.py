"""The item index against brute force: exact search, the real ScaNN, padding, refusals, saving, moving and damage."""

import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import asdict

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.errors import UserError
from tenrec_jax.retrieval import exact as exact_module
from tenrec_jax.retrieval import hits
from tenrec_jax.retrieval.index import IndexConfig, build_index, load_index, recall_against_exact
from tenrec_jax.retrieval.store import Manifest, written_as_a_whole
from tenrec_jax.sealed import DamagedError, read_stamped, write_stamped

needs_scann = pytest.mark.skipif(
    importlib.util.find_spec("scann") is None, reason="ScaNN is not installed (it exists for Linux)"
)
EXACT, SCANN = IndexConfig(kind="exact"), IndexConfig(kind="scann")
N, D = 6000, 32


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(num_rows, seed, clusters=200):
    """Unit vectors around shared centres; the seed draws the members, not the centres."""
    centres = unit(np.random.default_rng(99).normal(size=(clusters, D)))
    generator = np.random.default_rng(seed)
    return unit(centres[generator.integers(0, clusters, num_rows)] + generator.normal(size=(num_rows, D)) * 0.15)


def brute_force(vectors, ids, queries, k):
    """Plain NumPy: sorted by falling score, then by item id."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.stack([np.lexsort((ids, -row)) for row in scores])[:, :k]
    return np.take_along_axis(scores, order, axis=1), ids[order]


@pytest.fixture(scope="module")
def catalogue():
    return clustered(N, seed=0), np.random.default_rng(1).permutation(50_000)[:N].astype(np.int32) + 1


@pytest.fixture(scope="module")
def queries():
    return clustered(200, seed=2)


@pytest.fixture(scope="module")
def scann_index(catalogue):
    return build_index(*catalogue, SCANN)


def test_exact_search_equals_brute_force(catalogue, queries):
    result = build_index(*catalogue, EXACT).search(queries, 100)
    scores, items = brute_force(*catalogue, queries, 100)
    np.testing.assert_allclose(result.scores_BK, scores, atol=1e-6)
    assert np.mean(result.items_BK == items) > 0.999  # float32 may swap neighbours that differ by rounding
    assert result.scores_BK.dtype == np.float32
    assert result.items_BK.dtype == np.int32


small_integers = st.integers(-2, 2).map(float) | st.just(-0.0)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 40), st.integers(1, 4), st.integers(1, 50))
def test_exact_search_breaks_ties_by_item_id_in_any_block_size(data, num_items, dim, k):
    vectors = data.draw(hnp.arrays(np.float32, (num_items, dim), elements=small_integers))
    queries = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 6)), dim), elements=small_integers))
    ids = np.random.default_rng(num_items).permutation(100)[:num_items] + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "_QUERY_BLOCK", data.draw(st.integers(1, 7)))
        patch.setattr(exact_module, "_ITEM_BLOCK", data.draw(st.integers(1, 50)))
        result = build_index(vectors, ids, EXACT).search(queries, k)
    scores, items = brute_force(vectors, ids, queries, k)
    found = min(k, num_items)
    np.testing.assert_array_equal(result.items_BK[:, :found], items)
    np.testing.assert_array_equal(result.scores_BK[:, :found], scores)
    np.testing.assert_array_equal(result.items_BK[:, found:], 0)
    np.testing.assert_array_equal(result.scores_BK[:, found:], -np.inf)


@pytest.mark.parametrize("k", [7, 300])
def test_what_a_user_has_seen_is_left_out_of_the_best(catalogue, queries, k):
    vectors, ids = catalogue
    index = build_index(vectors, ids, EXACT)
    (best,) = brute_force(vectors, ids, queries[:1], N)[1]
    seen = np.append(best[[0, 2, 40]], 60_000).astype(np.int32)  # the last is in no index
    found = index.search_unseen(queries[:1], seen, k)
    unseen = best[~np.isin(best, seen)]
    np.testing.assert_array_equal(found.items_C, unseen[:k])
    place = {item: row for row, item in enumerate(ids.tolist())}
    expected = vectors[[place[item] for item in found.items_C.tolist()]] @ queries[0]
    np.testing.assert_allclose(found.scores_C, expected, atol=1e-5)
    np.testing.assert_array_equal(found.refused_R, best[[0, 2]] if k == 7 else best[[0, 2, 40]])
    assert not len(index.search_unseen(queries[:1], ids, k).items_C)


def test_conditions_of_several_queries_are_kept_however_many_of_the_best_they_refuse(catalogue, queries):
    vectors, ids = catalogue
    index = build_index(vectors, ids, EXACT)
    ranked = brute_force(vectors, ids, queries[:4], N)[1]
    refused = [ranked[0, :0], ranked[1, :300], ranked[2, 1::2], ranked[3]]
    allowed = [lambda items, out=out: ~np.isin(items, out) for out in refused]
    for found, best, out in zip(index.search_allowed(queries[:4], allowed, 9), ranked, refused, strict=True):
        kept = best[~np.isin(best, out)][:9]
        np.testing.assert_array_equal(found.items_C, kept)
        before = best[: np.flatnonzero(best == kept[-1])[0]] if len(kept) == 9 else best
        np.testing.assert_array_equal(found.refused_R, before[np.isin(before, out)])


def test_scores_survive_packing_bit_by_bit():
    scores = np.array([[1e15, 1.5, 1e-45, 0.0, -1e-45, -2.25, -1e30]], np.float32)
    items = np.array([[1, 2**31 - 1, 3, 4, 5, 6, 7]], np.int32)
    keys = hits.packed(scores, items)
    assert np.all(np.diff(keys[0].astype(object)) > 0)
    back, ids = hits.unpacked(keys)
    np.testing.assert_array_equal(back.view(np.uint32), scores.view(np.uint32))
    np.testing.assert_array_equal(ids, items)
    zeros = hits.packed(np.array([[0.0, -0.0]], np.float32), np.array([[2, 1]], np.int32))
    assert zeros[0, 1] < zeros[0, 0]


@needs_scann
@pytest.mark.parametrize("clusters", [50, 300, 2000])
def test_scann_as_configured_by_default_finds_95_of_the_best_100(clusters):
    vectors = clustered(N, seed=3, clusters=clusters)
    ids = np.arange(1, N + 1)
    index, exact = build_index(vectors, ids, IndexConfig()), build_index(vectors, ids, EXACT)
    assert index.kind == "scann"
    queries = clustered(300, seed=4, clusters=clusters)
    truth = brute_force(vectors, ids, queries, 100)[1]
    found = index.search(queries, 100).items_BK
    recall = np.mean(
        [len(set(row) & set(best)) / 100 for row, best in zip(found.tolist(), truth.tolist(), strict=True)]
    )
    assert recall >= 0.95
    assert recall_against_exact(index, exact, queries, 100) == pytest.approx(recall, abs=1e-3)
    assert recall_against_exact(index, exact, queries, 10) >= 0.95
    assert recall_against_exact(index, exact, queries, 300) >= 0.9


@needs_scann
def test_scann_scores_are_inner_products_in_falling_order(catalogue, queries, scann_index):
    vectors, ids = catalogue
    result = scann_index.search(queries * 3, 50)
    place = np.zeros(ids.max() + 1, int)
    place[ids] = np.arange(N)
    expected = np.einsum("bd,bkd->bk", queries.astype(np.float64) * 3, vectors[place[result.items_BK]])
    np.testing.assert_allclose(result.scores_BK, expected, atol=1e-5)
    assert np.all(np.diff(result.scores_BK, axis=1) <= 0)
    assert all(len(set(row)) == 50 for row in result.items_BK.tolist())


@needs_scann
def test_a_users_items_do_not_depend_on_who_else_is_asked_for():
    """Few leaves over unclustered vectors: here ScaNN's own batches answer one query in thirty differently."""
    vectors = np.random.default_rng(0).normal(size=(5000, 8))
    config = IndexConfig(kind="scann", num_leaves=70, leaves_to_search=7)
    index = build_index(vectors, np.arange(1, 5001), config)
    queries = np.random.default_rng(1).normal(size=(300, 8))
    together = index.search(queries, 10)
    for size in (1, 7):
        parts = [index.search(queries[i : i + size], 10) for i in range(0, len(queries), size)]
        np.testing.assert_array_equal(np.concatenate([part.items_BK for part in parts]), together.items_BK)
        np.testing.assert_array_equal(np.concatenate([part.scores_BK for part in parts]), together.scores_BK)


@needs_scann
def test_scann_pads_with_no_item_when_too_few_leaves_are_searched(catalogue, queries):
    result = build_index(*catalogue, IndexConfig(kind="scann", leaves_to_search=1)).search(queries, 2000)
    missing = result.items_BK == 0
    assert missing[:, -1].all()
    assert not missing.all()
    np.testing.assert_array_equal(missing, np.isneginf(result.scores_BK))
    np.testing.assert_array_equal(missing, np.sort(missing, axis=1))
    assert np.isin(result.items_BK[~missing], catalogue[1]).all()


@needs_scann
def test_scann_gives_the_whole_catalogue_and_padding_when_k_exceeds_it(catalogue, queries, scann_index):
    result = scann_index.search(queries[:3], N + 5)
    for row in result.items_BK:
        assert sorted(row[:N].tolist()) == sorted(catalogue[1].tolist())
    np.testing.assert_array_equal(result.items_BK[:, N:], 0)
    np.testing.assert_array_equal(result.scores_BK[:, N:], -np.inf)


@pytest.mark.parametrize("kind", ["exact", pytest.param("scann", marks=needs_scann)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, -1e16])
def test_values_that_are_not_finite_are_refused_and_named(catalogue, queries, kind, bad):
    vectors, ids = catalogue[0].astype(np.float64), catalogue[1]
    vectors[[17, 40], 3] = bad
    with pytest.raises(UserError, match=rf"item {ids[17]} \(row 17 of the vectors\)"):
        build_index(vectors, ids, IndexConfig(kind=kind))
    index = build_index(*catalogue, IndexConfig(kind=kind, leaves_to_search=5))
    some = queries[:9].astype(np.float64)
    some[4, 0] = bad
    with pytest.raises(UserError, match="query row 4"):
        index.search(some, 5)


def test_queries_of_another_shape_are_refused(catalogue):
    index = build_index(*catalogue, EXACT)
    for shape in ((3, D + 1), (3, D - 1)):
        with pytest.raises(UserError, match=rf"{shape[1]} dimensions, the index has {D}"):
            index.search(np.zeros(shape, np.float32), 5)
    for shape in ((D,), (2, 3, D), (2, 0)):
        with pytest.raises(UserError, match="query vectors must be a matrix"):
            index.search(np.zeros(shape, np.float32), 5)
    with pytest.raises(ValueError, match="k must be"):
        index.search(np.zeros((1, D), np.float32), 0)
    assert index.search(np.zeros((0, D), np.float32), 5).items_BK.shape == (0, 5)


@needs_scann
def test_scann_answers_no_query_with_no_rows(scann_index):
    assert scann_index.search(np.zeros((0, D), np.float32), 5).scores_BK.shape == (0, 5)


def test_catalogues_that_cannot_be_searched_are_refused():
    for vectors in (np.zeros((0, 4)), np.zeros((4, 0)), np.zeros(4)):
        with pytest.raises(UserError, match="catalogue is empty"):
            build_index(vectors, np.zeros(0, np.int32), EXACT)
    vectors = np.eye(3)
    cases = (
        ([0, 1, 2], "0 stands for no item"),
        ([1, 2, 2**31], "must lie in"),
        ([5, 2, 5], "5 occurs more than once"),
        ([1, 2], "one integer id"),
        ([1.0, 2.0, 3.0], "one integer id"),
    )
    for ids, message in cases:
        with pytest.raises(UserError, match=message):
            build_index(vectors, np.array(ids), EXACT)


def test_configurations_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="kind is 'faiss'; it must be one of 'auto', 'exact', 'scann'"):
        IndexConfig(kind="faiss")
    with pytest.raises(UserError, match="reorder is -1; it must be at least 0"):
        IndexConfig(reorder=-1)


@needs_scann
def test_auto_searches_small_catalogues_exactly_and_scann_refuses_tiny_ones(catalogue):
    vectors, ids = catalogue
    assert build_index(vectors[:4095], ids[:4095], IndexConfig()).kind == "exact"
    assert build_index(vectors[:4096], ids[:4096], IndexConfig(leaves_to_search=4)).kind == "scann"
    assert build_index(vectors, ids, IndexConfig(min_items_for_scann=N + 1)).kind == "exact"
    for config, count in ((SCANN, 15), (IndexConfig(kind="scann", num_leaves=101), 100)):
        with pytest.raises(UserError, match="too few for ScaNN"):
            build_index(vectors[:count], ids[:count], config)
    assert build_index(vectors[:16], ids[:16], SCANN).search(vectors[:2], 3).items_BK[:, 0].tolist() == ids[:2].tolist()


def test_without_scann_auto_is_exact_and_scann_says_what_to_install(catalogue, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    assert build_index(*catalogue, IndexConfig()).kind == "exact"
    with pytest.raises(UserError, match="pip install scann"):
        build_index(*catalogue, SCANN)


@pytest.fixture(params=["exact", pytest.param("scann", marks=needs_scann)])
def saved(request, catalogue, tmp_path):
    index = request.getfixturevalue("scann_index") if request.param == "scann" else build_index(*catalogue, EXACT)
    index.save(tmp_path / "run" / "index")
    return index, tmp_path / "run" / "index"


def test_a_saved_index_answers_identically_after_its_folder_was_moved(saved, queries, tmp_path):
    index, folder = saved
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    loaded = load_index(moved)
    assert (loaded.kind, loaded.size, loaded.dim, loaded.config) == (index.kind, N, D, index.config)
    for k in (10, 100, 500):
        before, after = index.search(queries, k), loaded.search(queries, k)
        np.testing.assert_array_equal(after.items_BK, before.items_BK)
        np.testing.assert_array_equal(after.scores_BK, before.scores_BK)
    assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in moved.rglob("*") if p.is_file())


def test_every_damaged_missing_or_foreign_file_is_named(saved):
    _, folder = saved
    manifest = json.loads((folder / "index.json").read_text())
    assert (manifest["kind"], manifest["search"], manifest["dim"], manifest["count"]) == ("index", saved[0].kind, D, N)
    assert len(manifest["files"]) == sum(1 for p in folder.rglob("*") if p.is_file()) - 1
    for name in manifest["files"]:
        path = folder / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            load_index(folder)
        path.unlink()
        with pytest.raises(UserError, match=rf"{name} is missing"):
            load_index(folder)
        path.write_bytes(content)
    (folder / "scann").mkdir(exist_ok=True)
    foreign = folder / "scann" / "scann_docids.pkl"  # ScaNN would unpickle it
    foreign.write_bytes(b"")
    with pytest.raises(UserError, match=r"scann_docids\.pkl is not in the manifest"):
        load_index(folder)
    foreign.unlink()
    load_index(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 99}, r"index\.json: format_version is 99"),
        ({"kind": "table"}, "'table', not index"),
        ({"search": "faiss"}, r"index\.json: search 'faiss'"),
        ({"config": {"kind": "exact", "leafs": 3}}, r"index\.json cannot be read: config"),
        ({"config": asdict(IndexConfig()) | {"kind": "other"}}, r"index\.json cannot be read: config"),
        ({"dim": "x", "count": None}, r"index\.json cannot be read: dim, count"),
        ({"count": 7}, r"index\.json: count is 7"),
    ],
)
def test_a_manifest_that_means_nothing_is_refused_though_its_hash_fits(catalogue, tmp_path, change, expected):
    build_index(*catalogue, EXACT).save(tmp_path / "index")
    manifest = read_stamped(tmp_path / "index" / "index.json", remedy="")
    write_stamped(tmp_path / "index" / "index.json", manifest | change)
    with pytest.raises(UserError, match=expected):
        load_index(tmp_path / "index")


def test_a_manifest_that_was_written_over_is_damaged(catalogue, tmp_path):
    build_index(*catalogue, EXACT).save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}, indent=2) + "\n")
    with pytest.raises(DamagedError, match=r"index\.json is damaged"):
        load_index(tmp_path / "index")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "[" * 990 + "]" * 990])
def test_a_manifest_that_is_no_manifest_is_named(tmp_path, text):
    with pytest.raises(UserError, match="holds no index"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DamagedError, match=r"index\.json"):
        load_index(tmp_path)


def test_a_kill_between_the_two_renames_loses_no_index(catalogue, tmp_path):
    folder = tmp_path / "index"
    build_index(*catalogue, EXACT).save(folder)
    folder.rename(tmp_path / ".index.replaced")
    (tmp_path / ".index.partial").mkdir()
    with pytest.raises(UserError, match="holds no index"):
        load_index(folder)

    def fail():
        with written_as_a_whole(folder, Manifest("exact", EXACT, D, N)):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert load_index(folder).size == N
    assert list(tmp_path.iterdir()) == [folder]


def test_saving_replaces_an_index_and_nothing_else(catalogue, queries, tmp_path):
    vectors, ids = catalogue
    build_index(vectors, ids, EXACT).save(tmp_path / "index")
    build_index(vectors[:100], ids[:100], EXACT).save(tmp_path / "index")
    assert load_index(tmp_path / "index").size == 100
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        build_index(vectors, ids, EXACT).save(other)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_recall_against_exact_by_hand():
    vectors, ids = np.eye(4, dtype=np.float32) * np.array([[4], [3], [2], [1]], np.float32), np.array([1, 2, 3, 4])
    exact = build_index(vectors, ids, EXACT)
    other = build_index(vectors[[0, 2, 3]], ids[[0, 2, 3]], EXACT)
    queries = np.ones((2, 4), np.float32)
    assert recall_against_exact(exact, exact, queries, 9) == 1
    assert recall_against_exact(other, exact, queries, 2) == 0.5
    assert recall_against_exact(other, exact, queries, 9) == 0.75
    equal = build_index(np.ones((4, 4)), ids, EXACT), build_index(np.ones((2, 4)), ids[2:], EXACT)
    assert recall_against_exact(equal[1], equal[0], queries, 2) == 1
    assert recall_against_exact(equal[1], equal[0], queries, 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one query"):
        recall_against_exact(exact, exact, queries[:0], 2)


@needs_scann
@pytest.mark.parametrize("present", [True, False])
def test_tensorflow_is_hidden_from_scann_and_put_back(present):
    """A TensorFlow that ends the process when touched, as the real one does by an undefined symbol."""
    program = f"""
        import sys, types

        class Fake(types.ModuleType):
            def __getattr__(self, name):
                raise SystemExit("ScaNN touched TensorFlow: " + name)

        fake = Fake("tensorflow")
        if {present}:
            sys.modules["tensorflow"] = fake
        from tenrec_jax.retrieval.scann_tree import import_scann
        scann = import_scann()
        assert sys.modules.get("tensorflow") is (fake if {present} else None)
        assert ("tensorflow" in sys.modules) is {present}
        assert sys.modules["scann"] is scann is import_scann()
        assert "scann.scann_ops.py.scann_ops" not in sys.modules
        print("done")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (run.returncode, run.stdout.strip()) == (0, "done"), run.stderr
