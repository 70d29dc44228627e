"""The start of item embeddings from neighbours, and the subjects."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.interactions import Interactions, open_table
from tenrec_jax.data.neighbours import ITEMS_A_SUBJECT, SMOOTHING, WINDOW, item_subjects, neighbour_item_vectors
from tenrec_jax.errors import UserError

SUBJECTS, ITEMS = 4, 10


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Interactions:
    """60 users with six sessions, each of six items of one subject; every user meets all subjects alike. The last row alone holds 99."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("log")
    lines = []
    for user in range(60):
        for subject in random.permutation(np.arange(6) % SUBJECTS):
            lines += [f"{user} {ITEMS * subject + item}" for item in random.choice(ITEMS, 6, replace=False)]
    (folder / "clicks.txt").write_text("\n".join([*lines, "59 99", ""]))
    ingest([folder / "clicks.txt"], "sequences", folder / "table", progress=False)
    return open_table(folder / "table")


def by_hand(table: Interactions, rows: np.ndarray, width: int) -> np.ndarray:
    """The vectors from the formula, pair by pair and dense."""
    near = np.zeros((table.num_items + 1,) * 2)
    for one in rows:
        for other in rows[(rows > one) & (rows <= one + WINDOW)]:
            if table.user_R[one] == table.user_R[other] and table.item_R[one] != table.item_R[other]:
                pair = [table.item_R[one], table.item_R[other]]
                near[pair, pair[::-1]] += 1 - (other - one - 1) / WINDOW
    share = near.sum(1) / near.sum()
    smoothed = share**SMOOTHING / (share**SMOOTHING).sum()
    information = np.zeros_like(near)
    for i, j in zip(*np.nonzero(near), strict=True):
        information[i, j] = max(0.0, math.log(near[i, j] / near.sum() / (share[i] * smoothed[j])))
    left, values, _ = np.linalg.svd(information)
    vectors = left[:, 1 : width + 1] * np.sqrt(values[1 : width + 1])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def test_the_vectors_factorise_the_mutual_information(table: Interactions) -> None:
    rows = np.arange(table.num_rows - 1)
    got_ND, expected_ND = neighbour_item_vectors(table, rows, 5, seed=0), by_hand(table, rows, 5)
    known = got_ND.any(axis=1)
    # Singular vectors are determined but for their signs, inner products are determined.
    np.testing.assert_allclose(got_ND[known] @ got_ND[known].T, expected_ND[known] @ expected_ND[known].T, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(got_ND[known], axis=1), 1, atol=1e-5)
    assert (~known).sum() == 2  # entry 0, and the item that no given row holds


def test_items_of_one_subject_are_alike_though_everybody_meets_all(table: Interactions) -> None:
    vector_ND = neighbour_item_vectors(table, np.arange(table.num_rows - 1), SUBJECTS - 1, seed=0)
    known = np.flatnonzero(vector_ND.any(axis=1))
    subject = np.asarray(table.items.raw_id)[known].astype(int) // ITEMS
    nearest = np.argsort(-(vector_ND[known] @ vector_ND[known].T), axis=1)[:, 1]
    assert (subject[nearest] == subject).mean() > 0.9


def test_the_same_seed_gives_the_same_vectors(table: Interactions) -> None:
    one, other = (neighbour_item_vectors(table, np.arange(table.num_rows), 4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_a_width_beyond_the_items_is_refused(table: Interactions) -> None:
    with pytest.raises(UserError, match=r"width 64 takes 66 items .* hold 41"):
        neighbour_item_vectors(table, np.arange(table.num_rows), 64, seed=0)


def test_subjects_are_what_is_shown_together(table: Interactions) -> None:
    subject_N = item_subjects(table, np.arange(table.num_rows - 1), seed=0)
    raw = np.asarray(table.items.raw_id).astype(int)
    held = (raw != 99) & (np.arange(len(raw)) > 0)
    assert adjusted_rand_score(raw[held] // ITEMS, subject_N[held]) > 0.9
    assert set(subject_N.tolist()) == set(range(SUBJECTS + 1))
    assert subject_N[0] == 0
    assert subject_N[raw == 99] == 0  # no given row holds it


def test_few_items_have_no_subjects(table: Interactions) -> None:
    rows = np.flatnonzero(np.asarray(table.items.raw_id).astype(int)[table.item_R] < 2 * ITEMS_A_SUBJECT - 1)
    assert not item_subjects(table, rows, seed=0).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 45), st.integers(1, 6), st.integers(2, 12))
def test_any_log_has_subjects_or_none(seed: int, items: int, users: int, length: int) -> None:
    """Of whatever shape: apart, all alike, or nearly empty."""
    random = np.random.default_rng(seed)
    item_R = random.integers(1, items + 1, users * length) if seed % 2 else np.arange(users * length) % items + 1
    log = SimpleNamespace(user_R=np.repeat(np.arange(users), length), item_R=item_R, num_items=items)
    subject_N = item_subjects(log, np.arange(len(item_R)), seed=0)
    assert subject_N.shape == (items + 1,)
    assert subject_N[0] == 0
    assert 0 <= subject_N.min() <= subject_N.max() <= items // ITEMS_A_SUBJECT
