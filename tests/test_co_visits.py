"""Co-visits, and the order of candidates that they have a part in: against counting pair by pair, and against the PyTorch mirror."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.co_visits import BACKWARD, HISTORY, PRIOR, SUBJECT_PRIOR, WINDOW, CoVisits, count_co_visits
from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.interactions import Interactions, open_table
from tenrec_jax.errors import UserError
from tenrec_jax.files import write_json
from tenrec_jax.order import DECAYS, FLOOR, LEAST_WORTH, PRECISION, Order, Signals, fit_order, fused
from torch_mlu_backend import co_visits as mirror
from torch_mlu_backend.errors import UserError as MirrorError

ITEMS = 30


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Interactions:
    """40 users with up to 25 clicks on 30 items, and one with a single click on a further one."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("log")
    lines = [f"{user} {item}" for user in range(40) for item in random.integers(1, ITEMS + 1, random.integers(2, 26))]
    (folder / "clicks.txt").write_text("\n".join([*lines, "40 99", ""]))
    ingest([folder / "clicks.txt"], "sequences", folder / "table", progress=False)
    return open_table(folder / "table")


def weights_by_hand(table: Interactions, rows: np.ndarray) -> np.ndarray:
    near = np.zeros((table.num_items + 1,) * 2)
    for one, other in itertools.combinations(rows.tolist(), 2):
        apart = other - one
        i, j = table.item_R[one], table.item_R[other]
        if apart <= WINDOW and table.user_R[one] == table.user_R[other] and i != j:
            near[i, j] += 1 - (apart - 1) / WINDOW
            near[j, i] += BACKWARD * (1 - (apart - 1) / WINDOW)
    often = near.sum(axis=0)
    commonness = (often + PRIOR) / (often[often > 0].mean() + PRIOR)
    return near / (near.sum(axis=1, keepdims=True) + PRIOR) / np.sqrt(commonness)


def test_weights_are_those_counted_pair_by_pair_and_the_largest_are_kept(table: Interactions) -> None:
    rows = np.arange(table.num_rows - 7)
    expected = weights_by_hand(table, rows)
    for neighbours in (1, 4, ITEMS + 5):
        found = count_co_visits(table, rows, neighbours, seed=0)
        assert found.item_NK.shape == found.weight_NK.shape == (table.num_items + 1, neighbours)
        for item, (near_K, weight_K) in enumerate(zip(found.item_NK, found.weight_NK, strict=True)):
            best = np.sort(expected[item])[::-1][:neighbours]
            np.testing.assert_allclose(weight_K[: len(best)], best, atol=1e-6)
            kept = weight_K > 0
            assert len(set(near_K[kept])) == kept.sum() == min(neighbours, np.count_nonzero(expected[item]))
            np.testing.assert_allclose(expected[item][near_K[kept]], weight_K[kept], atol=1e-6)


def random_co_visits(random: np.random.Generator, items: int, neighbours: int) -> CoVisits:
    item_NK = np.stack([random.permutation(items)[:neighbours] + 1 for _ in range(items + 1)]).astype(np.int32)
    clicks_N = random.integers(0, 50, items + 1, dtype=np.int32)
    subject_N = random.integers(0, 4, items + 1, dtype=np.int32)
    # The last subject has no item of its own in the training rows.
    share_K = np.array([0, *random.dirichlet(np.ones(3)), 0], np.float32)
    return CoVisits(item_NK, random.random(item_NK.shape, np.float32), clicks_N, subject_N, share_K)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, HISTORY + 8), st.integers(0, 12), st.integers(1, 12), st.floats(0.5, 1)
)
def test_a_score_is_the_decayed_sum_of_the_clicked_events_weights(
    seed: int, events: int, candidates: int, neighbours: int, decay: float
) -> None:
    random = np.random.default_rng(seed)
    co_visits = random_co_visits(random, 12, neighbours)
    # The two last ids are of items that were added after training.
    item_S = random.integers(0, 15, events).astype(np.int32)
    clicked_S, item_C = random.random(events) < 0.7, (random.permutation(14)[:candidates] + 1).astype(np.int32)
    expected = []
    for candidate in item_C:
        terms = [0.0]
        for age, (item, clicked) in enumerate(zip(item_S[::-1], clicked_S[::-1], strict=True)):
            if clicked and age < HISTORY and item <= 12:
                shares = dict(zip(co_visits.item_NK[item].tolist(), co_visits.weight_NK[item].tolist(), strict=True))
                terms.append(decay**age * shares.get(int(candidate), 0.0))
        expected.append(math.fsum(terms))
    found = co_visits.scores(item_S, clicked_S, item_C, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if np.all(item_S <= 12):  # nothing is added in the mirror
        arrays = map(torch.from_numpy, co_visits)
        asked = (torch.from_numpy(array) for array in (item_S.astype(np.int64), clicked_S, item_C.astype(np.int64)))
        np.testing.assert_allclose(mirror.CoVisits(*arrays).scores(*asked, decay), found, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, HISTORY + 8), st.integers(0, 12))
def test_subjects_are_shares_of_what_is_shown_over_those_of_all(seed: int, events: int, candidates: int) -> None:
    random = np.random.default_rng(seed)
    co_visits = random_co_visits(random, 12, 3)
    item_S, item_C = (random.integers(1, 15, size).astype(np.int32) for size in (events, candidates))
    subject = [*co_visits.subject_N.tolist(), 0, 0]  # the two last items were added after training
    seen = [subject[item] for item in item_S[-HISTORY:] if subject[item]]
    expected = []
    for item in item_C:
        share, count = float(co_visits.share_K[subject[item]]), seen.count(subject[item])
        # As if each user had seen so many events more, of everybody's subjects.
        more = (count + SUBJECT_PRIOR * share) / (len(seen) + SUBJECT_PRIOR) / share if subject[item] else 1.0
        expected.append(more)
    found = co_visits.subjects(item_S, item_C)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    if max(*item_S, *item_C, 0, 0) <= 12:
        there = mirror.CoVisits(*map(torch.from_numpy, co_visits))
        asked = (torch.from_numpy(item.astype(np.int64)) for item in (item_S, item_C))
        np.testing.assert_allclose(there.subjects(*asked), found, rtol=1e-6)


def test_shares_of_subjects_are_those_of_the_given_rows(table: Interactions) -> None:
    rows = np.arange(table.num_rows - 7)
    found = count_co_visits(dataclasses.replace(table, has_exposures=True), rows, 3, seed=0)
    subject_R = found.subject_N[table.item_R[rows]]
    assert found.share_K[0] == 0
    assert len(found.share_K) == subject_R.max() + 1 > 2
    for subject, share in enumerate(found.share_K[1:], 1):
        assert share == pytest.approx((subject_R == subject).sum() / (subject_R > 0).sum())


def test_a_log_of_clicks_alone_has_no_subjects(table: Interactions) -> None:
    found = count_co_visits(table, np.arange(table.num_rows), 3, seed=0)
    item_N = np.arange(table.num_items + 1, dtype=np.int32)
    np.testing.assert_array_equal(found.subjects(item_N[1:9], item_N), 1)


def random_signals(random: np.random.Generator, *, ranked: bool, size: int = 20) -> Signals:
    worth_C = random.random(size).astype(np.float32) if ranked else None
    co_visits_C = (random.random(size) * (random.random(size) < 0.4)).astype(np.float32)
    clicks_C = random.integers(0, 100, size, dtype=np.int32)
    subjects_C = random.uniform(0.2, 5, size).astype(np.float32)
    return Signals(3 * random.normal(size=size).astype(np.float32), worth_C, co_visits_C, clicks_C, subjects_C)


@pytest.mark.parametrize("ranked", [True, False])
def test_candidates_are_ordered_by_the_product_of_what_is_known_of_them(ranked: bool) -> None:
    signals = random_signals(np.random.default_rng(1), ranked=ranked)
    order = Order(retrieval=0.7, co_visits=0.4, popularity=0.2, subjects=0.6)
    worth_C = np.ones(20) if signals.worth_C is None else signals.worth_C
    counted_C = (1 + signals.co_visits_C / FLOOR) ** 0.4 * (1.0 + signals.clicks_C) ** 0.2 * signals.subjects_C**0.6
    product_C = worth_C * np.exp(0.7 * signals.retrieval_C) * counted_C
    found_C = fused(order, signals)
    np.testing.assert_array_equal(np.argsort(found_C), np.argsort(product_C))
    tensors = [None if each is None else torch.from_numpy(each) for each in signals]
    other = mirror.Order(**dataclasses.asdict(order))
    for weight in (0.0, 0.3, 1.0):
        there_C = other.fused(*tensors, weight)  # type: ignore[arg-type]
        np.testing.assert_allclose(there_C, fused(order, signals, weight), rtol=1e-5)
    if ranked:
        np.testing.assert_array_equal(fused(order, signals, 0.0), worth_C)
        expected_C = worth_C * np.exp(0.8 * (signals.retrieval_C - signals.retrieval_C.max()))
        np.testing.assert_allclose(fused(Order(), signals, 0.8), expected_C, rtol=1e-6)
    else:
        np.testing.assert_array_equal(fused(Order(), signals), signals.retrieval_C)


@pytest.mark.parametrize("ranked", [True, False])
def test_fitted_powers_are_those_that_choices_were_drawn_from(ranked: bool) -> None:
    random, planted = np.random.default_rng(2), Order(1.2, co_visits=0.4, popularity=0.3, subjects=0.5, decay=0.9)
    signals = [random_signals(random, ranked=ranked) for _ in range(5000)]
    clicked = []
    for each in signals:
        # A sharper choice from the same order, which the powers' ratios alone tell.
        score_C = fused(planted, each) ** 1.5 if ranked else fused(planted, each)
        odds_C = score_C if ranked else np.exp(score_C - score_C.max())
        clicked.append(np.arange(20) == random.choice(20, p=np.asarray(odds_C, float) / odds_C.sum(dtype=float)))
    found = fit_order({0.9: signals}, clicked, [np.zeros(20)] * len(signals))
    for name, power in dataclasses.asdict(planted).items():
        assert dataclasses.asdict(found)[name] == pytest.approx(power, abs=0.08), name


def test_no_other_powers_have_a_smaller_loss() -> None:
    random = np.random.default_rng(3)
    signals = [random_signals(random, ranked=True) for _ in range(50)]
    clicked = [random.random(20) < 0.1 for _ in signals]  # several, or none
    count = [np.where(hit, 1, random.integers(1, 9, 20)) for hit in clicked]

    def loss(a: float, b: float, c: float, d: float, e: float) -> float:
        total = PRECISION / 2 * ((a - 1) ** 2 + (b - 1) ** 2 + c**2 + d**2 + e**2)
        for each, hit_C, n_C in zip(signals, clicked, count, strict=True):
            assert each.worth_C is not None
            odds_C = each.worth_C**a * np.exp(b * each.retrieval_C) * (1 + each.co_visits_C / FLOOR) ** c
            odds_C = odds_C * (1.0 + each.clicks_C) ** d * each.subjects_C**e
            total -= float(np.log(odds_C[hit_C] / (n_C * odds_C).sum()).sum())
        return total

    found, axis = fit_order({1.0: signals}, clicked, [np.log(n) for n in count]), np.linspace(LEAST_WORTH, 1.5, 12)
    few = (0.0, 0.05, 0.1, 0.2)
    best_of_all = min(loss(*powers) for powers in itertools.product(axis, axis, few, few, (0.0, 0.1)))
    powers = found.retrieval, found.co_visits, found.popularity, found.subjects
    on_the_ray = (loss(a, *(a * power for power in powers)) for a in np.linspace(LEAST_WORTH, 1.5, 60))
    assert min(on_the_ray) <= best_of_all + 1e-2


def test_draws_stand_for_the_rest_of_the_catalogue() -> None:
    random = np.random.default_rng(7)
    signals = [random_signals(random, ranked=False, size=300) for _ in range(300)]
    clicked = [
        np.arange(300) == random.choice(300, p=_softmax(fused(Order(0.9, 0.3, 0.2, 0.1), each))) for each in signals
    ]
    whole = fit_order({0.8: signals}, clicked, [np.zeros(300)] * 300)
    drawn, hits, counts = [], [], []
    for each, hit_C in zip(signals, clicked, strict=True):
        known_C = hit_C | (
            each.retrieval_C >= np.sort(each.retrieval_C)[-30]
        )  # the draws are of the many that matter little
        rest_M = random.choice(np.flatnonzero(~known_C), 60, replace=False)
        kept = np.concatenate([np.flatnonzero(known_C), rest_M])
        drawn.append(Signals(*(field if field is None else field[kept] for field in each)))
        hits.append(hit_C[kept])
        counts.append(np.log(np.repeat([1.0, (~known_C).sum() / 60], [known_C.sum(), 60])))
    assert vars(fit_order({0.8: drawn}, hits, counts)) == pytest.approx(vars(whole), abs=0.1)


def _softmax(score_C: np.ndarray) -> np.ndarray:
    odds_C = np.exp(np.asarray(score_C, float) - score_C.max())
    return odds_C / odds_C.sum()


def test_where_nothing_was_clicked_the_order_stays() -> None:
    signals = random_signals(np.random.default_rng(4), ranked=True)
    nothing = {decay: [signals] for decay in DECAYS}
    assert (
        fit_order(nothing, [np.zeros(20, bool)], [np.zeros(20)])
        == fit_order({decay: [] for decay in DECAYS}, [], [])
        == Order()
    )


def test_the_decay_is_the_one_that_choices_were_drawn_with() -> None:
    random = np.random.default_rng(8)
    co_visits, item_C = random_co_visits(random, ITEMS, 10), np.arange(1, ITEMS + 1, dtype=np.int32)
    for planted in DECAYS:
        signals, clicked = {decay: list[Signals]() for decay in DECAYS}, []
        for _ in range(1000):
            item_S, all_S = random.integers(1, ITEMS + 1, 12).astype(np.int32), np.ones(12, bool)
            known = random_signals(random, ranked=False, size=ITEMS)
            for decay, lists in signals.items():
                lists.append(known._replace(co_visits_C=co_visits.scores(item_S, all_S, item_C, decay)))
            odds_C = _softmax(fused(Order(1.0, 2.0), signals[planted][-1]))
            clicked.append(np.arange(ITEMS) == random.choice(ITEMS, p=odds_C))
        assert fit_order(signals, clicked, [np.zeros(ITEMS)] * 1000).decay == planted


def test_files_come_back_and_others_are_refused(tmp_path: Path) -> None:
    co_visits, path, order = random_co_visits(np.random.default_rng(5), 6, 3), tmp_path / "pairs", tmp_path / "order"
    co_visits.save(path)
    write_json(order, dataclasses.asdict(Order(0.2, 0.3, 0.4, 0.5, 0.9)))
    for found in (CoVisits.load(path), mirror.CoVisits.load(path)):
        for one, other in zip(found, co_visits, strict=True):
            np.testing.assert_array_equal(one, other)
    assert mirror.Order.load(order) == mirror.Order(0.2, 0.3, 0.4, 0.5, 0.9)
    for wrong in ({"retrieval": -1}, {"decay": 1.5}):
        write_json(order, dataclasses.asdict(Order()) | wrong)
        with pytest.raises(MirrorError, match="a power is negative"):
            mirror.Order.load(order)
    co_visits._replace(weight_NK=co_visits.weight_NK[:2]).save(path)
    for kind, error in ((CoVisits, UserError), (mirror.CoVisits, MirrorError)):
        with pytest.raises(error, match="cannot be read as co-visits: item"):
            kind.load(path)
    co_visits._replace(share_K=co_visits.share_K[:2], subject_N=np.full(7, 2, np.int32)).save(path)
    for kind, error in ((CoVisits, UserError), (mirror.CoVisits, MirrorError)):
        with pytest.raises(error, match="cannot be read as co-visits: an item's subject"):
            kind.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as co-visits"):
        CoVisits.load(path)
