"""Settings chosen by measuring: the recall they reach, the choice against trying everything, refusals, and what is kept of it."""

import importlib.util
import itertools
import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenrec_jax.errors import UserError
from tenrec_jax.retrieval.index import IndexConfig, build_index, load_index, recall_against_exact
from tenrec_jax.retrieval.tuning import Trial, cheapest_reaching, leaf_steps, reorder_steps, sweep

needs_scann = pytest.mark.skipif(
    importlib.util.find_spec("scann") is None, reason="ScaNN is not installed (it exists for Linux)"
)
N, D, K = 2000, 16, 20
IDS = np.arange(1, N + 1)


def clustered(num_rows, seed):
    """Vectors around 150 shared centres; the seed draws the members, not the centres."""
    centres = np.random.default_rng(99).normal(size=(150, D))
    generator = np.random.default_rng(seed)
    return centres[generator.integers(0, 150, num_rows)] + 0.4 * generator.normal(size=(num_rows, D))


def recall(found, truth):
    shared = [len(set(row) & set(best)) for row, best in zip(found.tolist(), truth.tolist(), strict=True)]
    return np.mean(shared) / truth.shape[1]


@pytest.fixture(scope="module")
def catalogue():
    return clustered(N, seed=0), IDS


@pytest.fixture(scope="module")
def queries():
    return clustered(100, seed=1)


@pytest.fixture(scope="module")
def truth(catalogue, queries):
    return np.argsort(-(queries @ catalogue[0].T), axis=1)[:, :K] + 1


@pytest.fixture(scope="module")
def untuned(catalogue):
    return build_index(*catalogue, IndexConfig(kind="scann", leaves_to_search=45))


@needs_scann
@pytest.mark.parametrize("target", [0.8, 0.99])
def test_a_tuned_index_has_the_recall_it_was_tuned_to(catalogue, queries, truth, target):
    index = build_index(*catalogue, IndexConfig(kind="scann", target_recall=target), tuning_queries_BD=queries)
    tuning = index.tune(queries, target, k=K)
    measured = recall(index.search(queries, K).items_BK, truth)
    assert measured >= target
    assert tuning.chosen.recall == pytest.approx(measured, abs=1e-3)
    assert (tuning.target_recall, tuning.k, tuning.queries, tuning.items) == (target, K, 100, N)
    assert tuning.chosen in tuning.trials
    reached = [trial for trial in tuning.trials if trial.recall >= target]
    assert tuning.chosen.cost == min(trial.cost for trial in reached)
    assert all(trial.queries_per_second > 0 for trial in tuning.trials)
    assert len({trial.num_leaves for trial in tuning.trials}) > 1


@needs_scann
def test_a_lower_recall_is_cheaper(catalogue, queries):
    index = build_index(*catalogue, IndexConfig(kind="scann", num_leaves=45), tuning_queries_BD=queries)
    costs = [index.tune(queries, target, k=K).chosen.cost for target in (0.7, 0.9, 0.99)]
    assert costs == sorted(costs)
    assert costs[0] < costs[2]


@needs_scann
def test_tuning_again_over_the_same_tree_chooses_the_same(catalogue, queries):
    index = build_index(*catalogue, IndexConfig(kind="scann", num_leaves=45), tuning_queries_BD=queries)

    def without_times(tuning):
        return [
            (t.num_leaves, t.leaves_to_search, t.reorder, t.recall, t.cost) for t in (tuning.chosen, *tuning.trials)
        ]

    first = without_times(index.tune(queries, 0.9, k=K))
    assert without_times(index.tune(queries, 0.9, k=K)) == first
    assert {num_leaves for num_leaves, *_ in first} == {45}


@needs_scann
def test_items_that_stand_in_for_queries_search_a_tenth_of_the_leaves_at_least(catalogue):
    copies = np.concatenate([catalogue[0], np.repeat(catalogue[0][:1], 120, axis=0)]), np.arange(1, N + 121)
    config = IndexConfig(kind="scann", num_leaves=40)
    assert build_index(*copies, config, tuning_queries_BD=copies[0][:1]).tuning.chosen.leaves_to_search < 4
    assert build_index(*copies, config).tuning.chosen.leaves_to_search >= 4


@needs_scann
def test_what_the_configuration_gives_is_not_varied(catalogue, queries):
    given_reorder = IndexConfig(kind="scann", num_leaves=50, reorder=333)
    tuning = build_index(*catalogue, given_reorder, tuning_queries_BD=queries).tuning
    assert {(trial.num_leaves, trial.reorder) for trial in tuning.trials} == {(50, 333)}
    given_leaves = IndexConfig(kind="scann", num_leaves=50, leaves_to_search=7)
    index = build_index(*catalogue, given_leaves, tuning_queries_BD=queries)
    assert index.tuning is None
    assert {trial.leaves_to_search for trial in index.tune(queries, 0.01).trials} == {7}


@needs_scann
def test_an_unreachable_recall_is_refused_and_changes_nothing(catalogue, queries, untuned):
    config = IndexConfig(kind="scann", num_leaves=40, leaves_to_search=1)
    index = build_index(*catalogue, config)
    before = index.search(queries, K)
    with pytest.raises(UserError, match=r"does not reach recall@100 of 1 .* with 1 of 40 leaves.*index\.kind to exact"):
        index.tune(queries, 1.0)
    assert index.tuning is None
    np.testing.assert_array_equal(index.search(queries, K).items_BK, before.items_BK)


@needs_scann
def test_out_of_reach_auto_searches_exactly_and_says_so_where_scann_refuses(catalogue, queries, truth, caplog):
    hard = {"target_recall": 1.0, "reorder": 100, "min_items_for_scann": 100}
    with pytest.raises(UserError, match="does not reach recall@100 of 1"):
        build_index(*catalogue, IndexConfig(kind="scann", **hard), tuning_queries_BD=queries)
    with caplog.at_level(logging.WARNING):
        index = build_index(*catalogue, IndexConfig(**hard), tuning_queries_BD=queries)
    assert index.kind == "exact"
    assert "searching exactly, since index.kind is auto" in caplog.text
    np.testing.assert_array_equal(index.search(queries, K).items_BK, truth)


@needs_scann
def test_the_choice_and_its_curve_are_saved_with_the_index(catalogue, queries, tmp_path):
    index = build_index(*catalogue, IndexConfig(kind="scann", num_leaves=45), tuning_queries_BD=queries)
    index.tune(queries, 0.9, k=K)
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert loaded.tuning == index.tuning
    np.testing.assert_array_equal(loaded.search(queries, K).items_BK, index.search(queries, K).items_BK)
    written = json.loads((tmp_path / "index" / "tuning.json").read_text())
    assert [trial["recall"] for trial in written["trials"]] == [trial.recall for trial in index.tuning.trials]
    assert written["chosen"]["leaves_to_search"] == index.tuning.chosen.leaves_to_search
    tuned_again = loaded.tune(queries, 0.9, k=K)  # from the vectors on disk
    assert tuned_again.chosen.recall == index.tuning.chosen.recall


def test_exact_search_has_nothing_to_choose(catalogue, queries, tmp_path):
    index = build_index(*catalogue, IndexConfig(kind="exact"))
    tuning = index.tune(queries, 1.0, k=K)
    assert (tuning.chosen.recall, tuning.chosen.leaves_to_search, len(tuning.trials)) == (1.0, 0, 1)
    index.save(tmp_path / "index")
    assert load_index(tmp_path / "index").tuning == tuning


def test_tuning_by_nothing_or_to_no_recall_is_refused(catalogue, queries):
    index = build_index(*catalogue, IndexConfig(kind="exact"))
    for arguments in ((queries[:0],), (queries, 0.0), (queries, 1.1)):
        with pytest.raises(ValueError, match="tuning needs queries"):
            index.tune(*arguments)
    with pytest.raises(UserError, match="17 dimensions"):
        index.tune(np.zeros((3, D + 1)))
    with pytest.raises(UserError, match="query row 0"):
        index.tune(np.full((3, D), np.nan))
    with pytest.raises(UserError, match="target_recall is 2; it must be above 0 and at most 1"):
        IndexConfig(target_recall=2)


@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.floats(0.05, 1))
def test_the_sweep_finds_the_cheapest_setting_that_reaches_the_recall(data, num_leaves, num_reorders, target):
    """Against trying everything, where recall rises with both settings."""
    leaves, reorders = range(1, num_leaves + 1), range(1, num_reorders + 1)
    rises = data.draw(
        st.lists(st.floats(0, 0.2), min_size=num_leaves * num_reorders, max_size=num_leaves * num_reorders)
    )
    gain = np.array(rises).reshape(num_leaves, num_reorders)
    recall_LR = np.minimum(1, gain.cumsum(axis=0).cumsum(axis=1))
    price = data.draw(st.sampled_from([0.3, 1.0, 5.0]))

    def cost(few, reorder):
        return few + price * reorder

    def measure(few, reorder):
        return Trial(num_leaves, few, reorder, recall_LR[few - 1, reorder - 1], cost(few, reorder), 1.0)

    everything = [measure(*setting) for setting in itertools.product(leaves, reorders)]
    tried = list(sweep(measure, cost, leaves, reorders, target))
    assert len({(trial.leaves_to_search, trial.reorder) for trial in tried}) == len(tried)
    reaching = [trial for trial in everything if trial.recall >= target]
    if not reaching:
        with pytest.raises(UserError, match="does not reach"):
            cheapest_reaching(tried, target, K)
        return
    assert cheapest_reaching(tried, target, K).cost == min(trial.cost for trial in reaching)


@given(st.integers(-1, 50), st.integers(1, 3000), st.integers(1, 500), st.integers(1, 5000))
def test_steps_rise_from_the_fewest_to_all(fewest, num_leaves, k, items):
    leaves = leaf_steps(fewest, num_leaves)
    assert leaves[0] == min(max(1, fewest), num_leaves)
    assert leaves[-1] == num_leaves
    assert all(low < high <= low * 7 / 6 + 1 for low, high in itertools.pairwise(leaves))
    reorders = reorder_steps(k, items)
    assert reorders == sorted(set(reorders))
    assert reorders[-1] == min(items, 64 * k)
    assert reorders[0] == min(items, 2 * k)


@needs_scann
def test_an_index_tuned_to_more_hits_searches_more_for_still_more(catalogue, queries):
    exact = build_index(*catalogue, IndexConfig(kind="exact"))
    index = build_index(*catalogue, IndexConfig(kind="scann", num_leaves=45), tuning_queries_BD=queries)
    index.tune(queries, 0.95, k=K)
    assert recall_against_exact(index, exact, queries, 4 * K) >= 0.9
