"""Users' states, observations, changes of the catalogue and micro-batches, against what is computed from scratch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mirrors
import numpy as np
import pytest
from flax import nnx

from tenrec_jax import artifact, served_users
from tenrec_jax.artifact import Catalogue, Identity
from tenrec_jax.config import ServingConfig
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import FeatureConfig
from tenrec_jax.models.hashing import TableConfig, hash_rows
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.two_tower import TwoTowerConfig
from tenrec_jax.parameters import assembled, named
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Event, Item, Recommendations, Request, RequestError, Rules, UnknownUserError
from tenrec_jax.retrieval.index import IndexConfig, build_index
from tenrec_jax.timeline import Events, Profile

ITEMS = [13 * i + 1 for i in range(1, 40)]  # the eighth, the seventeenth, ... are in no training row
USER = 505
SOME = [Event(ITEMS[3], ("click", "like")), Event(ITEMS[5], ()), Event(99_999), Event(ITEMS[7], ("share",))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mirrors.write_recommender(tmp_path_factory.mktemp("served") / "recommender")


@pytest.fixture
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder)


def events_of(folder: Path, user: int) -> list[Event]:
    """A user's events in the folder's tables."""
    loaded = artifact.load(folder)
    catalogue = loaded.catalogue
    dense = catalogue.user_id.tolist().index(user)
    rows = slice(catalogue.offsets[dense], catalogue.offsets[dense + 1])
    return [
        Event(int(catalogue.item_id[item]), tuple(name for name, one in zip(loaded.actions, row, strict=True) if one))
        for item, row in zip(catalogue.item[rows], catalogue.action[rows], strict=True)
    ]


def assert_same(found: Recommendations, expected: Recommendations) -> None:
    """The same list to rounding, whatever time it took."""
    assert [item.item_id for item in found.items] == [item.item_id for item in expected.items]
    for name in ("score", "retrieval_score"):
        np.testing.assert_allclose(
            [getattr(item, name) for item in found.items],
            [getattr(item, name) for item in expected.items],
            atol=2e-5,
        )
    assert found.effects == expected.effects
    assert found.history_length == expected.history_length


def query_by_hand(folder: Path, user: int, events: Sequence[Event]) -> np.ndarray:
    """The query of a user after these events alone, from the model itself in one call."""
    loaded = artifact.load(folder)
    catalogue, model = loaded.catalogue, loaded.retrieval.merged()
    raw = catalogue.item_id.tolist()
    item = np.array([raw.index(event.item_id) if event.item_id in raw else 0 for event in events])
    action = np.array([[name in event.actions for name in loaded.actions] for event in events], np.int8)
    one = np.array([catalogue.user_id.tolist().index(user)])
    profile = Profile(catalogue.trained_user[one], catalogue.gender[one], catalogue.age[one])
    read = Events(
        catalogue.trained_item[item][None], catalogue.category[item][None], action[None], np.ones((1, len(item)), bool)
    )
    return np.asarray(model.extend(model.start(profile), read).query_BD[0])


def test_observing_is_as_if_the_log_had_held_it_all_along(folder: Path, recommender: Recommender) -> None:
    before = events_of(folder, USER)
    recommender.recommend(user_id=USER)
    first = recommender.observe(USER, SOME[:1])
    second = recommender.observe(USER, SOME[1:])
    assert (first.history_length, second.history_length) == (len(before) + 1, len(before) + 4)
    assert (first.unknown_items, second.unknown_items) == ((), (99_999,))
    answer = recommender.recommend(user_id=USER, k=50, explain=True)
    query_D = query_by_hand(folder, USER, [*before, *SOME])
    vectors = artifact.load(folder).index.catalogue()
    raw = artifact.load(folder).catalogue.item_id[vectors.item_ids_N].tolist()
    scores = dict(zip(raw, (vectors.vectors_ND @ query_D).tolist(), strict=True))
    for item in answer.items:
        assert item.retrieval_score == pytest.approx(scores[item.item_id], abs=2e-5)
    seen = {event.item_id for event in [*before, *SOME]}
    assert not seen & {item.item_id for item in answer.items}
    assert len(answer.items) == len(set(raw) - seen)
    assert answer.history is not None
    assert [(known.item_id, known.actions) for known in answer.history] == [
        (event.item_id, event.actions) for event in [*before, *SOME]
    ][-50:]
    assert answer.retrieved is not None
    expected = sorted(set(raw) - seen, key=lambda item: -scores[item])
    assert [item.item_id for item in answer.retrieved] == expected[:50]


def test_a_user_of_observations_alone_is_answered_like_a_history(recommender: Recommender) -> None:
    with pytest.raises(UnknownUserError, match="user_id 77 is not in the log"):
        recommender.recommend(user_id=77)
    for event in SOME:
        recommender.observe(77, [event])
    assert_same(recommender.recommend(user_id=77), recommender.recommend(history=SOME))


def test_a_state_that_was_given_up_is_computed_again(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_users, "KEPT_STATES", 1)
    recommender.observe(USER, SOME)
    expected = recommender.recommend(user_id=USER)
    recommender.recommend(user_id=404)
    assert_same(recommender.recommend(user_id=USER), expected)


def test_requests_answered_together_get_what_they_get_alone(folder: Path, recommender: Recommender) -> None:
    """Whatever stands beside them: wrong ones, the same user again, another number of items, histories of all lengths."""
    capped = Rules(max_per_category=3, diversity=0.3, exploration=0.3, seed=5, blocked_items=(ITEMS[2],))
    requests = [
        Request(user_id=USER),
        Request(user_id=10**9),
        Request(history=()),
        Request(history=tuple(ITEMS[:1]) * 70, k=3),
        Request(user_id=USER, k=5, rules=capped),
        Request(history=tuple(SOME), k=30),
        Request(history=("x",)),
        Request(user_id=101, k=0),
        *(Request(user_id=user) for user in (101, 202, 303, 404)),
        *(Request(history=(item,)) for item in ITEMS[:20]),
    ]
    together = recommender.answer(requests)
    assert [place for place, answer in enumerate(together) if isinstance(answer, RequestError)] == [1, 6, 7]
    assert [answer.field for answer in together if isinstance(answer, RequestError)] == ["user_id", "history[0]", "k"]
    fresh = Recommender.load(folder)
    for request, answer in zip(requests, together, strict=True):
        if isinstance(answer, Recommendations):
            (alone,) = fresh.answer([request])
            assert isinstance(alone, Recommendations)
            assert_same(answer, alone)


def test_rules_say_what_they_removed(recommender: Recommender) -> None:
    plain = recommender.recommend(history=[], k=50)
    blocked = plain.items[0].item_id
    category = next(item.category for item in plain.items[1:] if item.category)
    answer = recommender.recommend(
        history=[plain.items[2].item_id], k=50, rules=Rules(blocked_items=(blocked,), blocked_categories=(category,))
    )
    effects = {effect.rule: effect.removed for effect in answer.effects}
    assert effects["seen"] == (plain.items[2].item_id,)
    others = {item.item_id for item in plain.items if item.category == category} - {plain.items[2].item_id}
    assert set(effects["blocked"]) == {blocked} | others
    assert {item.item_id for item in answer.items} == {item.item_id for item in plain.items} - set(
        effects["blocked"]
    ) - set(effects["seen"])
    assert not recommender.recommend(history=[], k=3, rules=Rules(exclude_seen=False)).effects


def test_the_same_seed_explores_alike_and_none_anew(recommender: Recommender) -> None:
    def lists(seed: int | None, user: int) -> list[list[Any]]:
        rules = Rules(exploration=0.5, seed=seed)
        return [[i.item_id for i in recommender.recommend(user_id=user, k=8, rules=rules).items] for _ in range(4)]

    assert len({tuple(each) for each in lists(1, USER)}) == 1
    assert lists(1, USER) != lists(2, USER)
    assert len({tuple(each) for each in lists(None, USER)}) > 1


def test_added_items_are_recommended_scored_and_read(folder: Path, recommender: Recommender) -> None:
    """A new item's vector is that of an unknown item of its category."""
    before = recommender.catalogue_size
    recommender.upsert([Item(7, 2), Item(8, 1), Item(ITEMS[0], 2)])
    assert recommender.catalogue_size == before + 2
    answer = recommender.recommend(history=[], k=100)
    found = {item.item_id: item for item in answer.items}
    model = artifact.load(folder).retrieval.merged()
    query_D = query_by_hand_of_nobody(folder)
    trained = artifact.load(folder).catalogue.trained_item
    for raw, known, category in ((7, 0, 2), (8, 0, 1), (ITEMS[0], trained[1], 2)):
        vector_D = np.asarray(model.item_vectors(np.array([known]), np.array([category])))[0]
        assert found[raw].retrieval_score == pytest.approx(float(vector_D @ query_D), abs=2e-5)
        assert found[raw].category == category
    (scored,) = recommender.score([7], history=[])
    assert scored.probabilities == pytest.approx(found[7].probabilities, abs=1e-5)
    read = recommender.recommend(history=[7], k=100)
    assert not read.unknown_items
    assert 7 not in {item.item_id for item in read.items}
    recommender.delete([7, ITEMS[0]])
    assert not {7, ITEMS[0]} & {item.item_id for item in recommender.recommend(history=[], k=100).items}
    assert recommender.catalogue_size == before
    recommender.upsert([Item(7, 1)])
    assert recommender.catalogue_size == before + 1


def query_by_hand_of_nobody(folder: Path) -> np.ndarray:
    model = artifact.load(folder).retrieval.merged()
    nothing = np.array([0])
    return np.asarray(model.start(Profile(nothing, *nobody(folder))).query_BD[0])


def nobody(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    catalogue = artifact.load(folder).catalogue
    return catalogue.gender[:1], catalogue.age[:1]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda r: r.upsert([Item(7, 1), Item(8, 99)]), r"items\[1\]\.category is 99; it must be 0 \(none\) to 2"),
        (lambda r: r.upsert([Item(7, 1), Item(7, 2)]), r"items\[1\] is 7, which occurs twice"),
        (lambda r: r.upsert([Item("x", 1)]), r"items\[0\] is 'x'; ids are integers"),
        (lambda r: r.delete([ITEMS[0], 5]), r"delete\[1\] is 5, which is not in the catalogue"),
        (lambda r: r.delete([ITEMS[7]]), r"delete\[0\] is \d+, which is not recommended anyway"),
        (lambda r: r.delete([ITEMS[0], ITEMS[0]]), r"delete\[1\] is 14, which occurs twice"),
        (lambda r: r.observe(1, [Event(5), Event(6, ("buy",))]), r"events\[1\]\.actions holds 'buy'; the log's"),
        (lambda r: r.observe(1, []), "events is empty"),
        (lambda r: r.recommend(history=[], rules=Rules(blocked_items=("x",))), r"rules\.blocked_items\[0\] is 'x'"),
    ],
)
def test_wrong_changes_are_refused_and_change_nothing(folder: Path, call: Any, field: str) -> None:
    recommender = Recommender.load(folder)
    with pytest.raises(RequestError, match=field):
        call(recommender)
    size = Recommender.load(folder).catalogue_size
    assert recommender.catalogue_size == size
    with pytest.raises(UnknownUserError):
        recommender.recommend(user_id=1)


def test_another_version_takes_over_what_was_told(folder: Path, recommender: Recommender) -> None:
    recommender.observe(USER, SOME)
    recommender.upsert([Item(7, 2), Item(8, 1)])
    recommender.observe(77, [Event(7)])
    recommender.delete([8, ITEMS[0]])
    other = Recommender.load(folder)
    other.adopt(recommender)
    for who in ({"user_id": USER}, {"user_id": 77}, {"history": [7]}):
        assert_same(other.recommend(**who, k=100), recommender.recommend(**who, k=100))
    third = Recommender.load(folder)
    third.adopt(other)
    assert_same(third.recommend(user_id=77, k=100), recommender.recommend(user_id=77, k=100))


@pytest.mark.parametrize(
    ("encoder", "features"),
    [({"attention": "softmax"}, {}), ({}, {"positions": "learned"}), ({}, {"positions": "sinusoidal"})],
)
def test_a_state_that_cannot_grow_begins_anew_from_the_later_half(
    encoder: dict, features: dict, tmp_path: Path
) -> None:
    """With additive attention and without learned positions it goes on for ever."""
    folder = write_recommender(
        tmp_path, dataclasses.replace(mirrors.ENCODER, **encoder), FeatureConfig(max_length=6, **features)
    )
    recommender, told = Recommender.load(folder), [Event(item) for item in ITEMS[:21]]
    kept: list[Event] = []
    for event in told:
        kept.append(event)
        if len(kept) > 6 and "sinusoidal" not in features.values():
            kept = kept[-3:]
        assert recommender.observe(77, [event]).history_length == told.index(event) + 1
        if event in (told[0], told[6], told[7], told[20]):
            answer = recommender.recommend(user_id=77, k=1, rules=Rules(exclude_seen=False), explain=True)
            vectors_ND = artifact.load(folder).index.catalogue().vectors_ND
            best = float((vectors_ND @ query_by_hand(folder, 0, kept)).max())
            assert answer.retrieved is not None
            assert answer.retrieved[0].retrieval_score == pytest.approx(best, abs=5e-5)


def test_items_added_to_hashed_tables_have_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no more room for them, and beside items that come with a request."""
    monkeypatch.setattr("tenrec_jax.user_states.ROOM", 2)
    table = TableConfig("hashed", 2, 11)
    folder = write_recommender(tmp_path, mirrors.ENCODER, FeatureConfig(max_length=20, item_table=table))
    recommender = Recommender.load(folder)
    by_worth = Rules(retrieval_weight=0.0)
    answers = {raw: recommender.recommend(history=[raw], k=5, rules=by_worth) for raw in (1001, 1002, 1003)}
    assert answers[1001].unknown_items == (1001,)
    for raw in (1001, 1002, 1003):
        recommender.upsert([Item(raw)])
    for raw, before in answers.items():
        after = recommender.recommend(history=[raw], k=5)
        assert not after.unknown_items
        np.testing.assert_allclose(
            [item.score for item in recommender.score([i.item_id for i in before.items], history=[raw])],
            [item.score for item in before.items],
            atol=2e-5,
        )
        both = recommender.recommend(history=[raw, 55_555], k=5)
        assert both.unknown_items == (55_555,)
    leaves = named(artifact.load(folder).retrieval.parameters)
    vector_D = np.asarray(leaves["items.id.embedding"])[hash_rows(np.array([1002]), table)[0]].sum(0)
    vector_D = vector_D + np.asarray(leaves["items.category.embedding"])[0]
    (scored,) = recommender.score([1002], history=[])
    query_D = query_by_hand_of_nobody(folder)
    assert scored.retrieval_score == pytest.approx(float(vector_D @ query_D), abs=2e-5)


def write_recommender(folder: Path, encoder: EncoderConfig, features: FeatureConfig) -> Path:
    """Five users, 39 items, no events, random weights."""
    vocabulary, random = mirrors.VOCABULARY, np.random.default_rng(3)
    folder = folder / "recommender"
    folder.mkdir()
    retrieval, ranking = TwoTowerConfig(features, encoder), RankerConfig(features, encoder)
    raw = np.array([-1, *ITEMS])
    for name, model, seed in (
        (artifact.RETRIEVAL_WEIGHTS, artifact.two_tower(retrieval, vocabulary), 0),
        (artifact.RANKING_WEIGHTS, artifact.ranker(ranking, vocabulary), 1),
    ):
        draws = np.random.default_rng(seed)
        leaves = {
            key: 0.3 * draws.standard_normal(like.shape, np.float32)
            if np.issubdtype(like.dtype, np.floating)
            else np.concatenate([features.item_table.unknown_k[None], hash_rows(raw[1:], features.item_table)])
            for key, like in named(model.parameters).items()
        }
        artifact.save_weights(folder / name, assembled(model.parameters, leaves))
    users, items = vocabulary.users, vocabulary.items
    zeros, known = np.zeros(users, np.int32), np.arange(items, dtype=np.int32)
    catalogue = Catalogue(
        user_id=np.arange(users) * 101,
        gender=zeros,
        age=zeros,
        trained_user=np.arange(users, dtype=np.int32),
        item_id=raw,
        category=random.integers(0, vocabulary.categories, items, dtype=np.int32) * (known > 0),
        trained_item=known,
        item=np.zeros(0, np.int32),
        action=np.zeros((0, vocabulary.actions), np.int8),
        offsets=np.zeros(users + 1, np.int64),
    )
    two_tower = artifact.with_weights(artifact.two_tower(retrieval, vocabulary), folder / artifact.RETRIEVAL_WEIGHTS)
    vectors_ND = np.asarray(nnx.merge(*two_tower).item_vectors(known[1:], catalogue.category[1:]))
    build_index(vectors_ND, known[1:], IndexConfig("exact")).save(folder / artifact.INDEX)
    identity = Identity("qb_video", ("click", "like", "share", "follow"), (), "0" * 64, vocabulary, retrieval, ranking)
    artifact.seal(folder, identity, catalogue, ServingConfig(candidates=12))
    return folder
