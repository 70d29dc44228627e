"""A checkpoint of the original system as a folder that scores raw ids, here and in the mirror `torch_mlu_backend`.

A table of n + 1 rows holds the hashes 1..n of raw ids, `id * 2654435761 mod n + 1` (the first of the original's hash functions,
`id * (i + 1) * 2654435761`), and in row 0 the padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from tenrec_jax.errors import UserError
from tenrec_jax.files import sha256_of
from tenrec_jax.interop import weights
from tenrec_jax.interop.export import MANIFEST, PROBE, read_manifest, save_arrays, seal
from tenrec_jax.interop.original import load_ranker, load_state, load_two_tower
from tenrec_jax.interop.original_models import (
    OriginalItemTower,
    OriginalRanker,
    OriginalTwoTower,
    OriginalUserTower,
    RankerInputs,
    TwoTowerInputs,
)
from tenrec_jax.interop.probe import blocks_of, layer_name
from tenrec_jax.models.fastformer import FastformerEncoder
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.sealed import KIND, Kind
from tenrec_jax.workspace import refuse_used, workspace

MULTIPLIER = 2654435761
MODEL = "model.safetensors"
KINDS = (Kind.ORIGINAL_RANKER, Kind.ORIGINAL_TWO_TOWER)
DEFAULT_TEMPERATURE = 0.07
PROBE_USERS, PROBE_SLOTS = 4, 16
Original = OriginalRanker | OriginalTwoTower


@dataclass(frozen=True)
class OriginalScores:
    """Of candidates, in the order given: the score [C], and each action's logit [C, A]. They depend on each other in the ranker."""

    scores: tuple[float, ...]
    logits: tuple[tuple[float, ...], ...]


def hashed(raw_id: int, rows: int) -> int:
    """The row of a table of `rows` rows in which a raw id is looked up. Exact for integers of any size."""
    return raw_id * MULTIPLIER % (rows - 1) + 1


def import_original(checkpoint: Path, out: Path, *, temperature: float = DEFAULT_TEMPERATURE) -> str:
    """Read a checkpoint of the original's ranker or two-tower and write a folder that scores with it.

    Args:
        checkpoint: see `original.load_state`.
        out: a new folder.
        temperature: of the two-tower; a checkpoint does not hold it.

    Returns:
        Which of the two it was.

    Raises:
        UserError: a file that cannot be read safely, weights of another model, or `out` is not empty.
    """
    refuse_used(out)
    state = load_state(checkpoint)
    two_tower = any(name.startswith("user_tower.") for name in state)
    prefix = "user_tower.transformer" if two_tower else "encoder"
    heads_name = f"{prefix}.layers.0.attention.query_weight.weight"
    if heads_name not in state:
        raise UserError(f"{checkpoint} holds neither the original's ranker nor its two-tower: {heads_name} is missing.")
    heads = len(state[heads_name])
    model = (
        load_two_tower(state, num_heads=heads, temperature=temperature)
        if two_tower
        else load_ranker(state, num_heads=heads)
    )
    description = describe(model)
    inputs = _draw(description)
    with workspace(out) as folder:
        weights.save(folder / MODEL, description, nnx.state(model))
        save_arrays(folder / PROBE, {f"inputs/{k}": v for k, v in inputs.items()} | _outputs(model, inputs))
        seal(folder, Kind(description.kind), {"checkpoint_sha256": sha256_of(checkpoint)})
    return description.kind


class OriginalScorer:
    """Scores with an imported ranker or two-tower. Make one with `OriginalScorer.load`."""

    def __init__(self, description: weights.Description, model: Original) -> None:
        self._description, self._model = description, model

    @classmethod
    def load(cls, folder: str | Path) -> "OriginalScorer":
        """Load a folder of `import_original`. Raises: UserError: it is not one, or is damaged."""
        kind = read_manifest(Path(folder))[KIND]
        if kind not in KINDS:
            raise UserError(f"{folder} holds a {kind}, not a model of the original system.")
        description, model = weights.load(Path(folder) / MODEL, kind)
        return cls(description, model.merged())

    def score(
        self,
        user: int,
        history: Sequence[int],
        candidates: Sequence[int],
        *,
        gender: int = 0,
        age: int = 0,
        categories: Sequence[int] | None = None,
        history_actions: Sequence[Sequence[float]] | None = None,
    ) -> OriginalScores:
        """Score candidates for one user, all by raw id.

        Args:
            user, history, candidates: raw ids; the history is in time order and may be empty.
            gender, age: feature values; 0 is unknown. categories: of the candidates; None is unknown.
            history_actions: read by the two-tower alone, one row of labels an event; None takes every event for a click.

        Raises:
            UserError: no candidates, more than the model has positions for, or a value outside its table.
        """
        vocabulary, positions = self._description.vocabulary, self._description.config.positions
        if not candidates or max(len(history), len(candidates)) > positions:
            raise UserError(f"the model takes up to {positions} events of history and 1 to {positions} candidates.")
        actions = history_actions
        if actions is None:
            actions = [[1.0] + [0.0] * (vocabulary.actions - 1)] * len(history)
        # An empty history is one slot of padding.
        history_1S = [[hashed(raw, vocabulary.items) for raw in history] or [0]]
        actions_1SA = [list(actions) or [[0.0] * vocabulary.actions]]
        candidate_1C = [[hashed(raw, vocabulary.items) for raw in candidates]]
        user_1, category_1C = [hashed(user, vocabulary.users)], [categories or [0] * len(candidates)]
        features = [gender], [age], category_1C
        given: dict[str, Any]
        if self._description.kind == weights.ORIGINAL_RANKER:
            given = dict(zip(RankerInputs._fields, (user_1, history_1S, candidate_1C, *features), strict=True))
        else:
            given = dict(
                zip(TwoTowerInputs._fields, (user_1, history_1S, actions_1SA, candidate_1C, *features), strict=True)
            )
        found = self._model({name: np.asarray(values) for name, values in given.items()})
        return OriginalScores(
            tuple(np.asarray(found["scores"])[0].tolist()), tuple(map(tuple, np.asarray(found["logits"])[0].tolist()))
        )


def is_original(folder: Path) -> bool:
    """Whether a folder is one of `import_original`. Raises: UserError: it is an exported folder, but damaged."""
    return (folder / MODEL).exists() and (folder / MANIFEST).exists() and read_manifest(folder)[KIND] in KINDS


def describe(model: Original) -> weights.Description:
    """What a model was built from, read off its modules."""
    user: OriginalRanker | OriginalUserTower
    item: OriginalRanker | OriginalItemTower
    if isinstance(model, OriginalRanker):
        user, item, encoder, positions = model, model, model.encoder, model.pos_encoding.length
        kind, config = weights.ORIGINAL_RANKER, weights.OriginalConfig(encoder.config, positions)
    else:
        user, item = model.user_tower, model.item_tower
        kind, config = (
            weights.ORIGINAL_TWO_TOWER,
            weights.OriginalConfig(
                user.encoder.config, user.pos_encoding.length, item.up.out_features, model.temperature
            ),
        )
    vocabulary = Vocabulary(
        users=user.user_embedding.num_embeddings,
        items=item.item_embedding.num_embeddings,
        genders=user.gender_embedding.num_embeddings,
        ages=user.age_embedding.num_embeddings,
        categories=item.category_embedding.num_embeddings,
        actions=model.unembedding.out_features,
    )
    return weights.Description(kind, config, vocabulary)


def _draw(description: weights.Description, seed: int = 0) -> dict[str, np.ndarray]:
    """Random users with histories of no event, one, half the slots and all of them."""
    random, vocabulary = np.random.default_rng(seed), description.vocabulary
    users, slots = PROBE_USERS, min(PROBE_SLOTS, description.config.positions)
    real_BS = np.arange(slots) < np.array([[0], [1], [slots // 2], [slots]])
    user_B = random.integers(1, vocabulary.users, users)
    history_BS = np.where(real_BS, random.integers(1, vocabulary.items, (users, slots)), 0)
    candidate_BC = random.integers(1, vocabulary.items, (users, slots))
    gender_B, age_B = random.integers(0, vocabulary.genders, users), random.integers(0, vocabulary.ages, users)
    category_BC = random.integers(0, vocabulary.categories, (users, slots))
    if description.kind == weights.ORIGINAL_RANKER:
        return dict(
            zip(RankerInputs._fields, (user_B, history_BS, candidate_BC, gender_B, age_B, category_BC), strict=True)
        )
    action_BSA = (random.random((users, slots, vocabulary.actions)) < 0.3).astype(np.float32)
    return dict(
        zip(
            TwoTowerInputs._fields,
            (user_B, history_BS, action_BSA, candidate_BC, gender_B, age_B, category_BC),
            strict=True,
        )
    )


class _Recorder:
    """Stands in for an encoder and keeps the output of every block."""

    def __init__(self, encoder: FastformerEncoder) -> None:
        self.encoder, self.layers = encoder, dict[str, Array]()

    def joint(self, x_BTD: Array, mask_BT: Array) -> Array:
        for number, (block, _) in enumerate(blocks_of(self.encoder)):
            x_BTD, _ = block(x_BTD, lambda y, block=block: (block.attention.joint(y, mask_BT), None), None)
            self.layers[layer_name(number)] = x_BTD
        return x_BTD if self.encoder.final_norm is None else self.encoder.final_norm(x_BTD)


def _outputs(model: Original, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layers' outputs, and what the model gives for `inputs`."""
    copy: Any = nnx.clone(model)
    kind, holder = (RankerInputs, copy) if isinstance(model, OriginalRanker) else (TwoTowerInputs, copy.user_tower)
    recorder = _Recorder(holder.encoder)
    # Not a part of the module that JAX should see: it is run as it stands.
    object.__setattr__(holder, "encoder", recorder)
    with jax.default_matmul_precision("highest"):
        copy.forward(kind(**{name: jnp.asarray(array) for name, array in inputs.items()}))
    found = model(inputs)
    return {name: np.asarray(array) for name, array in (recorder.layers | found).items()}
