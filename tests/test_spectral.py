"""The spectral start of item embeddings."""

import numpy as np
import pytest

from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.interactions import Interactions, open_table
from tenrec_jax.data.spectral import spectral_item_vectors
from tenrec_jax.errors import UserError


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Interactions:
    """40 users who meet 12 of the 20 items of one half of the catalogue, and two of the other; the last row alone holds item 99."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("log")
    lines = []
    for user in range(40):
        half = 20 * (user % 2)
        items = np.append(half + random.choice(20, 12, replace=False), 20 - half + random.choice(20, 2, replace=False))
        lines += [f"{user} {item}" for item in items]
    (folder / "clicks.txt").write_text("\n".join([*lines, "39 99", ""]))
    ingest([folder / "clicks.txt"], "sequences", folder / "table", progress=False)
    return open_table(folder / "table")


def test_the_vectors_are_the_singular_vectors_of_the_normalised_counts(table: Interactions) -> None:
    rows, width = np.arange(table.num_rows - 1), 4
    got_ND = spectral_item_vectors(table, rows, width, seed=0)
    count_UN = np.zeros((table.num_users + 1, table.num_items + 1))
    np.add.at(count_UN, (table.user_R[rows], table.item_R[rows]), 1)
    users, items = count_UN.sum(1) > 0, count_UN.sum(0) > 0
    count_UN = count_UN[users][:, items]
    dense = count_UN / np.sqrt(np.outer(count_UN.sum(1), count_UN.sum(0)))
    expected_ND = np.linalg.svd(dense)[2][1 : width + 1].T
    expected_ND /= np.linalg.norm(expected_ND, axis=1, keepdims=True)
    # Singular vectors are determined but for their signs, inner products are determined.
    np.testing.assert_allclose(got_ND[items] @ got_ND[items].T, expected_ND @ expected_ND.T, atol=1e-5)
    assert not got_ND[~items].any()
    assert (~items).sum() == 2  # entry 0, and the item that no given row holds


def test_items_of_the_same_audience_are_alike(table: Interactions) -> None:
    vector_ND = spectral_item_vectors(table, np.arange(table.num_rows - 1), 1, seed=0)
    first = table.items.raw_id < 20
    known = vector_ND[:, 0] != 0
    signs = np.sign(vector_ND[known, 0]) * np.where(first[known], 1, -1)
    assert abs(signs.sum()) == known.sum() == 40


def test_the_same_seed_gives_the_same_vectors(table: Interactions) -> None:
    one, other = (spectral_item_vectors(table, np.arange(table.num_rows), 4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_a_width_beyond_users_or_items_is_refused(table: Interactions) -> None:
    with pytest.raises(UserError, match=r"width 64 .* hold 40 and 41"):
        spectral_item_vectors(table, np.arange(table.num_rows), 64, seed=0)
