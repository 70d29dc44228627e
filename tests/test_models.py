"""Both towers and the ranker as wholes."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tenrec_jax import artifact
from tenrec_jax.config import from_mapping
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.crosses import CrossConfig
from tenrec_jax.models.features import FeatureConfig, SinusoidalPositions, Vocabulary
from tenrec_jax.models.heads import HeadsConfig
from tenrec_jax.models.losses import pairwise_losses
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.models.slots import slots_of
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.timeline import Events, Profile, Timeline

VOCABULARY = Vocabulary(users=6, items=40, genders=3, ages=8, categories=3, actions=4)
ENCODER = EncoderConfig(num_layers=2, width=16, num_heads=2, hidden=24, recency_bias=True)
CROSSES = CrossConfig(layers=2, hidden=8)


def timeline(length: int, *, real: int | None = None) -> Timeline:
    """Two users, one a row, with one slot more than events."""
    random = np.random.default_rng(0)
    mask = np.broadcast_to(np.arange(length) < (length - 1 if real is None else real), (2, length))
    return Timeline(
        Profile(user=np.array([[1], [4]]), gender=np.array([[1], [2]]), age=np.array([[3], [0]])),
        np.zeros((2, 1), np.int32),
        Events(
            item=random.integers(1, 40, (2, length)),
            category=random.integers(0, 3, (2, length)),
            action=random.integers(0, 2, (2, length, 4)).astype(np.int8),
            mask=mask,
        ),
    )


def users(of: Timeline) -> Profile:
    return Profile(*(field[:, 0] for field in of.profile))


def packed(of: Timeline) -> Timeline:
    """Both users in one row, the second one twice."""
    length = of.events.item.shape[1]

    def row(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[0], x[1], x[1]])[None]

    profile = Profile(*(np.concatenate([field[[0, 1, 1], 0], [0]])[None] for field in of.profile))
    return Timeline(profile, np.array([[0, length, 2 * length, 3 * length]]), Events(*map(row, of.events)))


def ranker(
    positions: str,
    user_id: bool,
    attention: str = "additive",
    head: str = "shared_bottom",
    crosses: CrossConfig = CROSSES,
) -> Ranker:
    features = FeatureConfig(positions=positions, user_id=user_id, max_length=12, init_scale=0.5)
    encoder, heads = dataclasses.replace(ENCODER, attention=attention), HeadsConfig(head, experts=2, expert_width=8)
    model = Ranker(RankerConfig(features, encoder, heads, crosses), VOCABULARY, rngs=nnx.Rngs(0))
    last = model.head.towers if head in ("mmoe", "ple") else model.head
    for leaf, seed in ((last.kernel, 1), (model.item_bias.embedding, 2)):  # zero in a fresh model
        leaf[...] = jax.random.normal(jax.random.key(seed), leaf.shape)
    return model


@pytest.mark.parametrize(
    ("positions", "user_id", "attention", "head", "crosses"),
    [
        ("none", True, "additive", "shared_bottom", CROSSES),
        ("learned", False, "additive", "ple", CrossConfig(layers=1, hidden=0, matched_rates=False)),
        ("sinusoidal", True, "softmax", "esmm", CrossConfig()),
    ],
)
def test_the_ranker_serves_what_it_trains(
    positions: str, user_id: bool, attention: str, head: str, crosses: CrossConfig
) -> None:
    model, full = ranker(positions, user_id, attention, head, crosses), timeline(12)
    trained = jax.jit(model.timeline_logits)(full)
    item, category = full.events.item, full.events.category

    @jax.jit
    def served(events: Events, item: np.ndarray, category: np.ndarray) -> jax.Array:
        return model.score(model.extend(model.start(users(full)), events), item, category)

    score, extend, score_after = jax.jit(model.score), jax.jit(model.extend), jax.jit(model.score_after)
    state = model.start(users(full))
    for t in range(12):
        before, candidate = timeline(12, real=t).events, (item[:, t : t + 1], category[:, t : t + 1])
        np.testing.assert_allclose(served(before, *candidate)[:, 0], trained[:, t], atol=1e-5)
        np.testing.assert_allclose(score_after(users(full), before, *candidate)[:, 0], trained[:, t], atol=1e-5)
        one_by_one = score(state, *candidate)
        np.testing.assert_allclose(one_by_one[:, 0], trained[:, t], atol=1e-5)
        event = Events(*(field[:, t : t + 1] for field in full.events))
        state = extend(state, event)


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_users_packed_into_one_row_get_the_logits_and_queries_of_rows_of_their_own(positions: str) -> None:
    features = FeatureConfig(positions=positions, max_length=12, init_scale=0.5)
    model, full = ranker(positions, True), timeline(12)
    two_tower = TwoTower(TwoTowerConfig(features, ENCODER), VOCABULARY, rngs=nnx.Rngs(0))
    for function in (model.timeline_logits, two_tower.queries):
        alone, together = (np.asarray(jax.jit(function)(rows)) for rows in (full, packed(full)))
        np.testing.assert_allclose(together[0].reshape(3, 12, -1), alone[[0, 1, 1]], atol=1e-5)


def test_an_events_own_and_later_actions_do_not_reach_its_logits() -> None:
    model, before = ranker("none", True), timeline(12, real=12)
    logits = jax.jit(model.timeline_logits)

    def with_actions(action: np.ndarray) -> jax.Array:
        return logits(before._replace(events=before.events._replace(action=action)))

    for t in (0, 5, 11):
        action = before.events.action.copy()
        action[:, t:] = 1 - action[:, t:]
        np.testing.assert_array_equal(with_actions(action)[:, : t + 1], logits(before)[:, : t + 1])
    assert not np.array_equal(with_actions(1 - before.events.action)[:, 1:], logits(before)[:, 1:])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_query_has_seen_the_events_before_it_alone(similarity: str) -> None:
    config = TwoTowerConfig(FeatureConfig(max_length=12, init_scale=0.5), ENCODER, similarity=similarity)
    model, full = TwoTower(config, VOCABULARY, rngs=nnx.Rngs(0)), timeline(13)
    queries = jax.jit(model.queries)
    whole = queries(full)
    assert whole.shape == (2, 13, 16)
    extend = jax.jit(model.extend)
    for real in (0, 3, 12):
        state = extend(model.start(users(full)), timeline(13, real=real).events)
        np.testing.assert_allclose(state.query_BD, whole[:, real], atol=1e-5)
        # Events of later slots change nothing.
        changed = full.events.item.copy()
        changed[:, real:] = 1
        other = queries(full._replace(events=full.events._replace(item=changed)))
        np.testing.assert_array_equal(other[:, : real + 1], whole[:, : real + 1])
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


def test_an_action_is_never_more_probable_than_a_click_under_esmm() -> None:
    logits = jax.jit(ranker("none", True, head="esmm", crosses=CrossConfig()).timeline_logits)(timeline(12))
    assert bool((logits[..., 1:] < logits[..., :1]).all())


def test_sinusoidal_positions_are_the_formula_at_any_place() -> None:
    place, width = np.array([[0, 1, 511, 100_000]]), 8
    expected = np.empty((1, 4, width))
    for i in range(width // 2):
        angle = place / 10_000 ** (2 * i / width)
        expected[..., i], expected[..., width // 2 + i] = np.sin(angle), np.cos(angle)
    got = SinusoidalPositions(width, 0.02)(place)
    np.testing.assert_allclose(got, expected * 0.02 * 2**0.5, atol=3e-4)
    np.testing.assert_allclose(got[:, :3], expected[:, :3] * 0.02 * 2**0.5, atol=1e-6)
    assert SinusoidalPositions(7, 0.02)(place).shape == (1, 4, 7)


@pytest.mark.parametrize(("attention", "head"), [("softmax", "mmoe"), ("additive", "ple")])
def test_a_models_config_and_weights_survive_their_files(attention: str, head: str, tmp_path: Path) -> None:
    encoder = dataclasses.replace(ENCODER, attention=attention, dtype="bfloat16", activation="swiglu", pre_norm=False)
    config = RankerConfig(FeatureConfig(positions="sinusoidal"), encoder, HeadsConfig(head, levels=2), CROSSES)
    read = from_mapping(json.loads(json.dumps(dataclasses.asdict(config))), RankerConfig)
    assert read == config
    parameters = nnx.split(Ranker(config, VOCABULARY, rngs=nnx.Rngs(0)))[1]
    artifact.save_weights(tmp_path / "weights.safetensors", parameters)
    loaded = artifact.with_weights(artifact.ranker(read, VOCABULARY), tmp_path / "weights.safetensors").parameters
    jax.tree.map(np.testing.assert_array_equal, loaded, parameters)


def test_pairwise_loss_over_all_pairs_equals_the_plain_double_loop() -> None:
    random = np.random.default_rng(3)
    logit, label = random.normal(size=(3, 9, 2)).astype(np.float32), random.integers(0, 2, (3, 9, 2))
    where = random.random((3, 9)) < 0.8
    begins = np.array([[0, 9, 9], [0, 1, 5], [0, 4, 9]])  # lengths 9; 1, 4, 4; 4, 5
    expected = np.zeros(2)
    for b in range(3):
        for u, begin in enumerate(begins[b]):
            end = 9 if u == 2 else begins[b, u + 1]
            for i in range(begin, end):
                for j in range(begin, end):
                    for action in range(2):
                        if where[b, i] and where[b, j] and label[b, i, action] > label[b, j, action]:
                            # Each of the two meets the other with this chance at a draw.
                            chance = 2 / (end - begin - 1)
                            expected[action] += chance * np.log1p(np.exp(logit[b, j, action] - logit[b, i, action]))
    slots = slots_of(begins, 9)
    got = jax.jit(lambda key: pairwise_losses(logit, label, where, slots, key, pairs=4000))(jax.random.key(0))
    np.testing.assert_allclose(got, expected, rtol=0.03)
