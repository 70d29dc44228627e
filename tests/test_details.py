"""Curves against scikit-learn; metrics by group against the metrics of that group's rows; both stages together against brute force."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from test_baselines import make_table

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.evaluation import details, metrics, two_stage
from tenrec_jax.evaluation.baselines import train_counts
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator, TargetRanks
from tenrec_jax.evaluation.places import Places
from tenrec_jax.order import DECAYS, FLOOR, Order, Signals, fit_order
from tenrec_jax.retrieval.index import IndexConfig, build_index

TABLE = make_table(actions=("click", "like"))
TRAIN, ROWS = np.arange(0, 400, 2), np.arange(1, 400, 2)
COUNTS = train_counts(TABLE, TRAIN)


def test_the_roc_curve_goes_through_the_points_of_scikit_learn_and_encloses_the_auc():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 40, 500) / 40
    labels = (generator.random(500) < scores).astype(np.int8)
    false, true = details.roc_curve(labels, scores, points=1000)
    expected_false, expected_true, _ = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(false, expected_false)
    np.testing.assert_allclose(true, expected_true)
    scores = generator.random(20_000)
    labels = (generator.random(20_000) < scores).astype(np.int8)
    false, true = details.roc_curve(labels, scores)
    assert 50 < len(false) <= 101
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)
    for one_class in (np.zeros(3), np.ones(3), np.zeros(0)):
        assert len(details.roc_curve(one_class, one_class)[0]) == 0


def test_curves_are_plain_lists_by_action():
    score_RA = np.random.default_rng(1).random((200, 2))
    found = details.curves(TABLE, ROWS, score_RA)
    assert list(found) == ["click", "like"]
    assert sum(found["like"]["reliability"]["rows"]) == 200
    assert found["click"]["roc"]["true"][-1] == 1.0


def make_ranks():
    clicked = ROWS[TABLE.labels_RA[ROWS, 0] == 1]
    first = np.random.default_rng(2).integers(1, 30, len(clicked)).astype(float)
    lists = np.zeros((0, 0), np.int32)
    return TargetRanks(
        clicked,
        TABLE.user_R[clicked],
        TABLE.item_R[clicked],
        Places(first, first),
        np.full(len(first), TABLE.num_items),
        lists,
    )


def test_metrics_by_group_are_those_of_the_groups_rows_and_groups_hold_every_row_once():
    click_R, ranks = np.random.default_rng(3).random(200), make_ranks()
    found = details.slices(TABLE, COUNTS, ROWS, click_R, ranks, seed=0, resamples=10)
    for groups in found.values():
        assert sum(group["rows"] for group in groups.values()) == 200
        assert sum(group["targets"] for group in groups.values()) == len(ranks.row)
    length_R = np.array([np.sum(TABLE.user_R[TRAIN] == user) for user in TABLE.user_R[ROWS]])
    length_P = np.array([np.sum(TABLE.user_R[TRAIN] == user) for user in ranks.user])
    by_user = found["training rows of the user"]
    assert set(by_user) <= {"10 to 29", "1 to 9"}
    for name, low, high in (("10 to 29", 10, 29), ("1 to 9", 1, 9)):
        mine, targets = (length_R >= low) & (length_R <= high), (length_P >= low) & (length_P <= high)
        if mine.any():
            expected = metrics.auc(TABLE.labels_RA[ROWS[mine], 0], click_R[mine])
            assert by_user[name]["auc"]["value"] == pytest.approx(expected)
            found_share = [
                np.mean(ranks.places.first[ranks.user == user] <= 20) for user in np.unique(ranks.user[targets])
            ]
            assert by_user[name]["recall@20"]["value"] == pytest.approx(np.mean(found_share))
    by_item = found["training clicks of the item, by tenth of the rows"]
    bounds = [tuple(map(int, name.split(": ")[1].split(" to "))) for name in by_item]
    assert all(low <= high < after for (low, high), (after, _) in itertools.pairwise(bounds))
    clicks_R = COUNTS.item_actions_N1A[TABLE.item_R[ROWS], 0]
    for (low, high), group in zip(bounds, by_item.values(), strict=True):
        assert group["rows"] == np.sum((clicks_R >= low) & (clicks_R <= high))


def test_users_without_training_rows_are_a_group_and_a_run_without_ranker_has_retrieval_alone():
    late = TRAIN[TABLE.user_R[TRAIN] > 4]
    found = details.slices(TABLE, train_counts(TABLE, late), ROWS, None, make_ranks(), seed=0, resamples=10)
    group = found["training rows of the user"]["0 (new users)"]
    assert group["rows"] == np.sum(TABLE.user_R[ROWS] <= 4)
    assert "auc" not in group
    assert "recall@20" in group


class ByNumber:
    """A ranker that prefers items by a fixed order."""

    def __init__(self, worth_N1):
        self.worth_N1 = worth_N1

    def worth(self, user, item_C, block):
        return self.worth_N1[item_C]


class ForHalf(NamedTuple):
    """Co-visits that speak for every second item, the more the fewer events there are and the less is forgotten."""

    def scores(self, item_S, clicked_S, item_C, decay):
        return np.where(item_C % 2 == 0, np.float32(0.01 * decay / (1 + len(item_S) + clicked_S.sum())), np.float32(0))

    def clicks(self, item_C):
        return item_C % 5

    def subjects(self, item_S, item_C):
        return 1.0 + item_C % 7 * len(item_S)


@pytest.mark.parametrize(
    ("exclude_seen", "weight", "ranked", "co_visits"),
    [(True, 0.0, True, False), (False, 0.8, True, True), (True, 1.0, False, True)],
)
def test_both_stages_together_find_what_brute_force_finds(exclude_seen, weight, ranked, co_visits, monkeypatch):
    monkeypatch.setattr(two_stage, "LENGTH", 4)
    generator = np.random.default_rng(5)
    known = TrainVocabulary(np.arange(14, dtype=np.int32), np.arange(30, dtype=np.int32))
    evaluator = RetrievalEvaluator(
        TABLE, known, TRAIN, ROWS, max_length=8, events_per_batch=64, exclude_seen=exclude_seen
    )
    vectors, queries = generator.normal(size=(29, 3)), generator.normal(size=(len(evaluator.users), 3))
    items = np.arange(1, 30, dtype=np.int32)
    index, worth_N1 = build_index(vectors, items, IndexConfig(kind="exact")), generator.random(30)
    order = Order(retrieval=0.6, co_visits=0.5, popularity=0.3, subjects=0.2, decay=0.9)
    second = two_stage.SecondStage(
        evaluator, ByNumber(worth_N1) if ranked else None, ForHalf() if co_visits else None, order, weight
    )
    found = two_stage.two_stage_results(second, queries, index, candidates=9, seed=0, resamples=10)
    shares = {"candidates": [], "pair": [], "retrieval": []} | ({"ranker": []} if ranked else {})
    lists = []
    for user, query in zip(evaluator.users, queries, strict=True):
        targets = [TABLE.item_R[row] for row in ROWS if TABLE.user_R[row] == user and TABLE.labels_RA[row, 0]]
        rows = [row for row in TRAIN if TABLE.user_R[row] == user]
        length = len(rows[-8:])
        events = length + sum(TABLE.labels_RA[row, 0] for row in rows[-8:])
        seen = {TABLE.item_R[row] for row in rows} if exclude_seen else set()
        fresh = [item for item in items if item not in seen]
        nearest = sorted(fresh, key=lambda item: -vectors[item - 1] @ query)

        def score(item, query=query, length=length, events=events):
            near = 0.009 / (1 + events) if co_visits and item % 2 == 0 else 0.0
            often = (1 + item % 5) ** 0.3 * (1 + item % 7 * length) ** 0.2 if co_visits else 1.0
            odds = np.exp(0.6 * (vectors[item - 1] @ query)) * (1 + near / FLOOR) ** 0.5 * often
            return worth_N1[item] * odds**weight if ranked else odds

        best = sorted(nearest[:9], key=lambda item: -score(item))
        alone = sorted(fresh, key=lambda item: -worth_N1[item])
        lists.append(sorted(fresh, key=lambda item: -score(item))[:5])
        for name, listed in zip(shares, (nearest[:9], best[:4], nearest[:4], alone[:4]), strict=False):
            shares[name].append(np.mean([target in listed for target in targets]))
    shares["gain"] = np.subtract(shares["pair"], shares["retrieval"])
    for name, values in shares.items():
        assert found["recall"][name]["value"] == pytest.approx(np.mean(values)), name
    assert (found["users"], found["items"], found["candidates"], found["k"]) == (len(evaluator.users), 29, 9, 4)
    if ranked:
        monkeypatch.setattr(two_stage, "RANK_ALL_ITEMS", 28)
        few = two_stage.two_stage_results(second, queries, index, candidates=9, seed=0, resamples=10)
        assert few["recall"]["ranker"] is None
    else:
        assert found["recall"]["ranker"] is None
        ranks = two_stage.ranks_of_both(second, queries, vectors, list_length=5)
        np.testing.assert_array_equal(ranks.lists_UK, lists)


@pytest.mark.parametrize("ranked", [True, False])
def test_the_order_is_fitted_on_what_users_clicked_among_what_it_orders(ranked, monkeypatch):
    generator = np.random.default_rng(6)
    known = TrainVocabulary(np.arange(14, dtype=np.int32), np.arange(30, dtype=np.int32))
    evaluator = RetrievalEvaluator(TABLE, known, TRAIN, ROWS, max_length=8, events_per_batch=64)
    vectors, queries = generator.normal(size=(29, 3)), generator.normal(size=(len(evaluator.users), 3))
    items, worth_N1 = np.arange(1, 30, dtype=np.int32), generator.random(30)
    second = two_stage.SecondStage(evaluator, ByNumber(worth_N1) if ranked else None, ForHalf(), Order(), 1.0)
    index = build_index(vectors, items, IndexConfig(kind="exact"))
    signals, clicked = {decay: [] for decay in DECAYS}, []
    for user, query in zip(evaluator.users, queries, strict=True):
        targets = {TABLE.item_R[row] for row in ROWS if TABLE.user_R[row] == user and TABLE.labels_RA[row, 0]}
        rows = [row for row in TRAIN if TABLE.user_R[row] == user]
        fresh = [item for item in items if item not in {TABLE.item_R[row] for row in rows}]
        nearest = sorted(fresh, key=lambda item: -vectors[item - 1] @ query)
        ordered = np.array(nearest[:9] if ranked else nearest)
        worth_C = worth_N1[ordered] if ranked else None
        for decay, lists in signals.items():
            near_C = ForHalf().scores(np.zeros(len(rows[-8:])), TABLE.labels_RA[rows[-8:], 0], ordered, decay)
            subjects_C = ForHalf().subjects(rows[-8:], ordered)
            lists.append(Signals(vectors[ordered - 1] @ query, worth_C, near_C, ordered % 5, subjects_C))
        clicked.append(np.isin(ordered, list(targets)))
    expected = fit_order(signals, clicked, [np.zeros(len(hit)) for hit in clicked])
    assert expected.co_visits > 0
    # With so many draws that each item is drawn, each stands for itself.
    monkeypatch.setattr(two_stage, "FIT_DRAWS", 2000)
    found = two_stage.fitted_order(second, queries, vectors, index, 9, seed=0)
    assert vars(found) == pytest.approx(vars(expected), abs=1e-3)
