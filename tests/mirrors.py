"""Models with random weights, their PyTorch mirrors, and inputs for both."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from tenrec_jax import artifact
from tenrec_jax.artifact import Catalogue, Identity
from tenrec_jax.co_visits import CoVisits
from tenrec_jax.config import ServingConfig
from tenrec_jax.files import write_json
from tenrec_jax.interop import names, weights
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.crosses import CrossConfig
from tenrec_jax.models.features import FeatureConfig, Vocabulary
from tenrec_jax.models.heads import HeadsConfig
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.two_tower import TwoTowerConfig
from tenrec_jax.order import Order
from tenrec_jax.parameters import assembled, named
from tenrec_jax.retrieval.index import IndexConfig, build_index
from tenrec_jax.timeline import Events, Profile, Timeline
from torch_mlu_backend import modules
from torch_mlu_backend import weights as mirror_weights
from torch_mlu_backend.config import from_mapping

VOCABULARY = Vocabulary(users=6, items=40, genders=3, ages=8, categories=3, actions=4)
ENCODER = EncoderConfig(num_layers=2, width=16, num_heads=2, hidden=24, recency_bias=True)


def random_model(description: weights.Description, seed: int = 0) -> Any:
    """A model with random weights, none of which is zero as some are before training."""
    random, model = np.random.default_rng(seed), weights.structure(description)

    def drawn(name: str, like: Any) -> jax.Array:
        spread = like.shape[-2] ** -0.5 if name.endswith("kernel") else 0.3
        values = spread * random.standard_normal(like.shape, np.float32) + name.endswith("scale")
        return jax.numpy.asarray(values, like.dtype)

    leaves = {name: drawn(name, like) for name, like in named(model.parameters).items()}
    return model._replace(parameters=assembled(model.parameters, leaves)).merged()


def mirror_of(description: weights.Description, model: Any) -> Any:
    """The same model in PyTorch, in evaluation mode."""
    kind = mirror_weights.KINDS[description.kind]
    config = from_mapping(dataclasses.asdict(description.config), kind.config, "config")
    module = kind.module(config, description.vocabulary).eval()
    in_torch = names.to_torch(weights.KINDS[description.kind].names, named(nnx.state(model)))
    module.load_state_dict({name: torch.from_numpy(array) for name, array in in_torch.items()})
    return module


def tensors(arrays: Any) -> Any:
    """NumPy arrays, also in tuples, as tensors."""
    return jax.tree.map(lambda array: torch.from_numpy(np.array(array)), arrays)


def mirrored(timeline: Timeline) -> modules.Timeline:
    """A timeline as the mirror reads it."""
    return modules.Timeline(
        modules.Profile(*tensors(timeline.profile)),
        tensors(timeline.start),
        modules.Events(*tensors(timeline.events)),
    )


def random_timeline(random: np.random.Generator, batch: int, slots: int, users: int) -> Timeline:
    """Rows into which up to `users` timelines are packed, a fifth of the events hidden from later ones."""
    start = np.sort(random.integers(1, slots + 1, (batch, users)), axis=1)
    start[:, 0] = 0
    for row in start:  # ascending; the rest of the row's users have no slot
        row[np.concatenate([[False], row[1:] <= row[:-1]])] = slots
    return Timeline(random_profile(random, batch, users), np.sort(start, axis=1), random_events(random, batch, slots))


def random_profile(random: np.random.Generator, *shape: int) -> Profile:
    sizes = VOCABULARY.users, VOCABULARY.genders, VOCABULARY.ages
    return Profile(*(random.integers(0, size, shape, dtype=np.int32) for size in sizes))


def random_events(random: np.random.Generator, batch: int, slots: int, real: np.ndarray | None = None) -> Events:
    """Events of which the first `real` [B, 1] count, or four in five."""
    mask = random.random((batch, slots)) < 0.8 if real is None else np.arange(slots) < real
    return Events(
        random.integers(0, VOCABULARY.items, (batch, slots), dtype=np.int32),
        random.integers(0, VOCABULARY.categories, (batch, slots), dtype=np.int32),
        random.integers(0, 2, (batch, slots, VOCABULARY.actions)).astype(np.int8),
        mask,
    )


def ranker_description(
    encoder: EncoderConfig = ENCODER,
    head: str = "shared_bottom",
    crosses: CrossConfig | None = None,
    **features: Any,
) -> Any:
    heads = HeadsConfig(head, experts=2, expert_width=8, levels=2)
    config = RankerConfig(FeatureConfig(**{"max_length": 80} | features), encoder, heads, crosses or CrossConfig())
    return weights.Description(weights.RANKER, config, VOCABULARY)


def two_tower_description(encoder: EncoderConfig = ENCODER, features: dict | None = None, **options: Any) -> Any:
    config = TwoTowerConfig(FeatureConfig(**{"max_length": 80} | (features or {})), encoder, **options)
    return weights.Description(weights.TWO_TOWER, config, VOCABULARY)


def write_recommender(folder: Path, *, ranked: bool = True, text_ids: bool = False, co_visits: bool = False) -> Path:
    """A recommender of five users and 39 items with random weights, and an exact index."""
    random = np.random.default_rng(7)
    folder.mkdir(parents=True)
    retrieval = two_tower_description(similarity="cosine", item_bias=True)
    ranking = ranker_description(head="ple", crosses=CrossConfig(layers=2, hidden=8))
    two_tower, users, items, events = random_model(retrieval), VOCABULARY.users, VOCABULARY.items, 60
    artifact.save_weights(folder / artifact.RETRIEVAL_WEIGHTS, nnx.state(two_tower))
    if ranked:
        artifact.save_weights(folder / artifact.RANKING_WEIGHTS, nnx.state(random_model(ranking, 1)))
    if co_visits:
        near_NK = np.stack([random.permutation(items)[:10] for _ in range(items)]).astype(np.int32)
        clicks_N = random.integers(0, 90, items, dtype=np.int32)
        subject_N, share_K = random.integers(0, 4, items, dtype=np.int32), np.array([0, 0.5, 0.2, 0.3], np.float32)
        counts = CoVisits(near_NK, random.random(near_NK.shape, np.float32), clicks_N, subject_N, share_K)
        counts.save(folder / artifact.CO_VISITS)
        write_json(folder / artifact.ORDER, dataclasses.asdict(Order(0.6, 0.3, 0.2, 0.5, 0.9)))
    offsets = np.array([0, 0, 0, 1, 20, 35, events])  # user 1 has no event
    user_id, item_id = np.arange(users) * 101, np.arange(items) * 13 + (np.arange(items) > 0)
    trained = np.where(np.arange(items) % 9 == 8, 0, np.arange(items)).astype(np.int32)
    catalogue = Catalogue(
        user_id=np.array(["", *map(str, user_id[1:])], object) if text_ids else user_id,
        gender=random.integers(0, VOCABULARY.genders, users, dtype=np.int32),
        age=random.integers(0, VOCABULARY.ages, users, dtype=np.int32),
        trained_user=np.arange(users, dtype=np.int32),
        item_id=np.array(["", *(f"item {i}" for i in item_id[1:])], object) if text_ids else item_id,
        category=random.integers(0, VOCABULARY.categories, items, dtype=np.int32),
        trained_item=trained,
        item=random.integers(1, items, events, dtype=np.int32),
        action=random.integers(0, 2, (events, VOCABULARY.actions)).astype(np.int8),
        offsets=offsets,
    )
    known = np.flatnonzero(trained)
    vectors_ND = np.asarray(two_tower.item_vectors(trained[known], catalogue.category[known]))
    build_index(vectors_ND, known, IndexConfig("exact")).save(folder / artifact.INDEX)
    actions = ("click", "like", "share", "follow")
    names = tuple(f"category {i}" for i in range(1, VOCABULARY.categories))
    identity = Identity(
        "qb_video", actions, names, "0" * 64, VOCABULARY, retrieval.config, ranking.config if ranked else None
    )
    artifact.seal(folder, identity, catalogue, ServingConfig(candidates=12))
    return folder
