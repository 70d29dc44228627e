"""Both towers and the ranker as wholes."""

import jax
import numpy as np
import pytest
from flax import nnx

from tenrec_jax.models.fastformer import FastformerConfig
from tenrec_jax.models.features import FeatureConfig, Vocabulary
from tenrec_jax.models.losses import pairwise_losses
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.timeline import Timeline

VOCABULARY = Vocabulary(users=6, items=40, genders=3, ages=8, categories=3, actions=4)
ENCODER = FastformerConfig(num_layers=2, width=16, num_heads=2, hidden=24, recency_bias=True)


def timeline(length: int, *, real: int | None = None) -> Timeline:
    random = np.random.default_rng(0)
    mask = np.broadcast_to(np.arange(length) < (length if real is None else real), (2, length))
    return Timeline(
        user=np.array([1, 4]),
        gender=np.array([1, 2]),
        age=np.array([3, 0]),
        item=random.integers(1, 40, (2, length)) * mask,
        category=random.integers(0, 3, (2, length)) * mask,
        action=random.integers(0, 2, (2, length, 4)).astype(np.int8) * mask[..., None],
        mask=mask,
    )


def ranker(positions: str, user_id: bool) -> Ranker:
    features = FeatureConfig(positions=positions, user_id=user_id, max_length=12, init_scale=0.5)
    model = Ranker(RankerConfig(features, ENCODER), VOCABULARY, rngs=nnx.Rngs(0))
    for leaf, seed in ((model.head.kernel, 1), (model.item_bias.embedding, 2)):  # zero in a fresh model
        leaf[...] = jax.random.normal(jax.random.key(seed), leaf.shape)
    return model


@pytest.mark.parametrize(("positions", "user_id"), [("none", True), ("learned", False)])
def test_the_ranker_serves_what_it_trains(positions: str, user_id: bool) -> None:
    model, full = ranker(positions, user_id), timeline(12)
    trained = jax.jit(model.timeline_logits)(full)

    @jax.jit
    def served(history: Timeline, item: np.ndarray, category: np.ndarray) -> jax.Array:
        return model.score(model.state(history), item, category)

    for t in range(12):
        history = timeline(12, real=t)
        logits = served(history, full.item[:, t : t + 1], full.category[:, t : t + 1])
        np.testing.assert_allclose(logits[:, 0], trained[:, t], atol=1e-5)


def test_an_events_own_and_later_actions_do_not_reach_its_logits() -> None:
    model, before = ranker("none", True), timeline(12)
    logits = jax.jit(model.timeline_logits)
    for t in (0, 5, 11):
        action = before.action.copy()
        action[:, t:] = 1 - action[:, t:]
        after = logits(before._replace(action=action))
        np.testing.assert_array_equal(after[:, : t + 1], logits(before)[:, : t + 1])
    assert not np.array_equal(logits(before._replace(action=1 - before.action))[:, 1:], logits(before)[:, 1:])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_query_has_seen_the_events_before_it_alone(similarity: str) -> None:
    config = TwoTowerConfig(FeatureConfig(max_length=12, init_scale=0.5), ENCODER, similarity=similarity)
    model, full = TwoTower(config, VOCABULARY, rngs=nnx.Rngs(0)), timeline(12)
    queries = jax.jit(model.queries)
    whole = queries(full)
    assert whole.shape == (2, 13, 16)
    for real in (0, 3, 12):
        np.testing.assert_allclose(queries(timeline(12, real=real))[:, real], whole[:, real], atol=1e-5)
    if similarity == "cosine":
        norms = np.linalg.norm(whole, axis=-1) * config.temperature
        np.testing.assert_allclose(norms, 1.0, atol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_an_item_bias_adds_to_every_querys_score_of_that_item(similarity: str) -> None:
    features = FeatureConfig(max_length=12, init_scale=0.5)
    plain, biased = (
        TwoTower(TwoTowerConfig(features, ENCODER, similarity=similarity, item_bias=on), VOCABULARY, rngs=nnx.Rngs(0))
        for on in (False, True)
    )
    bias = jax.random.normal(jax.random.key(1), (40, 1))
    biased.item_bias.embedding[...] = bias
    item, category = np.arange(40), np.arange(40) % 3

    def scores(model: TwoTower) -> jax.Array:
        return model.queries(timeline(12)) @ model.item_vectors(item, category).T

    np.testing.assert_allclose(scores(biased), scores(plain) + bias[:, 0], rtol=1e-5, atol=1e-5)


def test_pairwise_loss_over_all_distances_equals_the_plain_double_loop() -> None:
    random = np.random.default_rng(3)
    logit, label = random.normal(size=(3, 6, 2)).astype(np.float32), random.integers(0, 2, (3, 6, 2))
    where = random.random((3, 6)) < 0.8
    expected = np.zeros(2)
    for b in range(3):
        for action in range(2):
            for i in range(6):
                for j in range(6):
                    if where[b, i] and where[b, j] and label[b, i, action] > label[b, j, action]:
                        expected[action] += 2 * np.log1p(np.exp(logit[b, j, action] - logit[b, i, action]))
    # Distances are drawn uniformly from 1..5, so many draws average to a fifth of the sum over all of them.
    got = jax.jit(lambda key: pairwise_losses(logit, label, where, key, pairs=4000))(jax.random.key(0))
    np.testing.assert_allclose(got, expected / 5, rtol=0.03)
