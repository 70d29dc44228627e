"""The original system's modules as they compute in evaluation, for parity alone.

`tenrec_jax.interop.original` builds them from a state dict. Each has a pure `forward`, for use under `jax.jit`; calling
the module checks its inputs on the host, runs `forward` compiled and at full float32 precision, and raises `UserError`
where an input does not fit.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from tenrec_jax.errors import UserError
from tenrec_jax.models.blocks import EncoderConfig, layer_norm
from tenrec_jax.models.fastformer import FastformerEncoder, PaperAttention, l2_normalize
from tenrec_jax.models.features import Vocabulary


class Input(NamedTuple):
    """A model's input: a letter for each axis, and the size of the table it indexes, None for plain numbers."""

    name: str
    sizes: str
    rows: int | None


class JointEncoder(nnx.Module):
    """The encoder in its joint mode. A row that is all padding pools uniformly over its tokens."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.encoder = FastformerEncoder(config, rngs=rngs)

    def __call__(self, x: ArrayLike, padding_mask: ArrayLike | None = None) -> Array:
        """Tokens [B, T, D] and their mask [B, T], True on padding and None for no padding, to [B, T, D]."""
        return _run(*nnx.split(self), *_tokens(x, padding_mask, self.encoder.config.width))

    def forward(self, x_BTD: Array, mask_BT: Array) -> Array:
        """The same with `mask_BT` True on real tokens."""
        return self.encoder.joint(x_BTD, mask_BT)


class JointPaperAttention(nnx.Module):
    """The published attention.

    In a row that is all padding the -10000 on every logit cancels, up to the float32 rounding of logits of that size
    (about 1e-3): such a row is treated as if it had no padding.
    """

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.attention = PaperAttention(width, num_heads, rngs=rngs)

    def __call__(self, x: ArrayLike, padding_mask: ArrayLike | None = None) -> Array:
        """Tokens [B, T, D] and their mask [B, T], True on padding and None for no padding, to [B, T, D]."""
        return _run(*nnx.split(self), *_tokens(x, padding_mask, self.attention.query.in_features))

    def forward(self, x_BTD: Array, mask_BT: Array) -> Array:
        """The same with `mask_BT` True on real tokens."""
        return self.attention.joint(x_BTD, mask_BT)


class PositionTable(nnx.Module):
    """Adds rows 0..T-1 of a stored table to T tokens. The stored table counts, not the formula that once filled it."""

    def __init__(self, length: int, width: int) -> None:
        self.pe = nnx.Variable(jnp.zeros((1, length, width)))

    def __call__(self, x_BTD: Array) -> Array:
        return x_BTD + self.pe[:, : x_BTD.shape[1]]

    @property
    def length(self) -> int:
        return self.pe.shape[1]


class RankerInputs(NamedTuple):
    """Ids [B], [B, S], [B, C], features [B], [B], [B, C]; 0 is padding or unknown."""

    user_id: Array
    history_item_ids: Array
    candidate_item_ids: Array
    gender: Array
    age: Array
    candidate_categories: Array


class OriginalRanker(nnx.Module):
    """User, history and candidates encoded jointly, four logits a candidate; a score depends on the others.

    Tokens: the user's is id + gender + age, a history item's id + position, a candidate's id + category + position,
    with positions from 0 in each, and then the segment's embedding 0, 1 or 2. History has no category, and the state
    dict's `action_embedding` is not read. Padding (id 0) is masked in the history alone: the user and every candidate
    are always real, a candidate with id 0 included. An empty history needs no fall-back: user and candidates remain.
    """

    def __init__(self, config: EncoderConfig, vocabulary: Vocabulary, positions: int, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.user_embedding = nnx.Embed(vocabulary.users, width, rngs=rngs)
        self.item_embedding = nnx.Embed(vocabulary.items, width, rngs=rngs)
        self.gender_embedding = nnx.Embed(vocabulary.genders, width, rngs=rngs)
        self.age_embedding = nnx.Embed(vocabulary.ages, width, rngs=rngs)
        self.category_embedding = nnx.Embed(vocabulary.categories, width, rngs=rngs)
        self.segment_embedding = nnx.Embed(3, width, rngs=rngs)
        self.pos_encoding = PositionTable(positions, width)
        self.encoder = FastformerEncoder(config, rngs=rngs)
        self.output_norm = layer_norm(width, rngs, eps=1e-5)
        self.unembedding = nnx.Linear(width, vocabulary.actions, rngs=rngs)

    def __call__(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Integer arrays named as in `RankerInputs` to `logits` [B, C, A] and `scores` [B, C], the click logits.

        Raises:
            UserError: an input is missing or misshapen, an id lies outside its table, or S or C is longer than the
                positional table.
        """
        items, genders = self.item_embedding.num_embeddings, self.gender_embedding.num_embeddings
        expected = (
            Input("user_id", "B", self.user_embedding.num_embeddings),
            Input("history_item_ids", "BS", items),
            Input("candidate_item_ids", "BC", items),
            Input("gender", "B", genders),
            Input("age", "B", self.age_embedding.num_embeddings),
            Input("candidate_categories", "BC", self.category_embedding.num_embeddings),
        )
        longest = {"S": self.pos_encoding.length, "C": self.pos_encoding.length}
        return _run(*nnx.split(self), RankerInputs(*_checked(inputs, expected, {}, longest)))

    def forward(self, inputs: RankerInputs) -> dict[str, Array]:
        segment_3D = self.segment_embedding.embedding[...]
        user_BD = self.user_embedding(inputs.user_id) + self.gender_embedding(inputs.gender)
        user_BD = user_BD + self.age_embedding(inputs.age) + segment_3D[0]
        history_BSD = self.pos_encoding(self.item_embedding(inputs.history_item_ids)) + segment_3D[1]
        candidate_BCD = self.item_embedding(inputs.candidate_item_ids)
        candidate_BCD = candidate_BCD + self.category_embedding(inputs.candidate_categories)
        candidate_BCD = self.pos_encoding(candidate_BCD) + segment_3D[2]
        x_BTD = jnp.concatenate([user_BD[:, None], history_BSD, candidate_BCD], axis=1)
        mask_BT = jnp.concatenate(
            [
                jnp.ones((*user_BD.shape[:1], 1), bool),
                inputs.history_item_ids != 0,
                jnp.ones(candidate_BCD.shape[:2], bool),
            ],
            axis=1,
        )
        y_BCD = self.encoder.joint(x_BTD, mask_BT)[:, 1 + history_BSD.shape[1] :]
        logits_BCA = self.unembedding(self.output_norm(y_BCD))
        return {"logits": logits_BCA, "scores": logits_BCA[..., 0]}


class TwoTowerInputs(NamedTuple):
    """Ids [B], [B, S], actions [B, S, A], candidates [B, C], features [B], [B], [B, C]; 0 is padding or unknown."""

    user_ids: Array
    history_item_ids: Array
    history_actions: Array
    candidate_item_ids: Array
    user_gender: Array
    user_age: Array
    candidate_categories: Array


class OriginalUserTower(nnx.Module):
    """History to a user vector.

    An event is its item's embedding followed by the projected, normalised and clamped actions, 2D wide; then positions
    are added. In a row that is all padding, position 0 counts as real both inside the encoder and in the mean: its
    token is the padding item's embedding beside the projection of its actions.
    """

    def __init__(self, config: EncoderConfig, vocabulary: Vocabulary, positions: int, *, rngs: nnx.Rngs) -> None:
        width = config.width // 2
        self.user_embedding = nnx.Embed(vocabulary.users, width, rngs=rngs)
        self.gender_embedding = nnx.Embed(vocabulary.genders, width, rngs=rngs)
        self.age_embedding = nnx.Embed(vocabulary.ages, width, rngs=rngs)
        self.item_embedding = nnx.Embed(vocabulary.items, width, rngs=rngs)
        self.action_projection = nnx.Linear(vocabulary.actions, width, rngs=rngs)
        self.action_norm = nnx.LayerNorm(
            width, epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False, rngs=rngs
        )
        self.pos_encoding = PositionTable(positions, config.width)
        self.encoder = FastformerEncoder(config, rngs=rngs)
        self.output_projection = nnx.Linear(config.width, width, rngs=rngs)

    def forward(self, inputs: TwoTowerInputs) -> Array:
        """User vectors [B, D] of unit length."""
        action_BSD = jnp.clip(self.action_norm(self.action_projection(inputs.history_actions)), -10.0, 10.0)
        x_BSD = jnp.concatenate([self.item_embedding(inputs.history_item_ids), action_BSD], axis=-1)
        real_BS = inputs.history_item_ids != 0
        real_BS = real_BS.at[:, 0].set(real_BS[:, 0] | ~real_BS.any(axis=1))
        y_BSD = self.encoder.joint(self.pos_encoding(x_BSD), real_BS)
        mean_BD = y_BSD.mean(axis=1, where=real_BS[..., None])
        user_BD = self.user_embedding(inputs.user_ids) + self.gender_embedding(inputs.user_gender)
        return l2_normalize(user_BD + self.age_embedding(inputs.user_age) + self.output_projection(mean_BD))


class OriginalItemTower(nnx.Module):
    """Item and category embeddings, plus a ReLU network of their sum, L2-normalised. The item table is its own."""

    def __init__(self, vocabulary: Vocabulary, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.item_embedding = nnx.Embed(vocabulary.items, width, rngs=rngs)
        self.category_embedding = nnx.Embed(vocabulary.categories, width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def forward(self, item: Array, category: Array) -> Array:
        """Integer arrays of one shape [...] to vectors [..., D] of unit length."""
        x = self.item_embedding(item) + self.category_embedding(category)
        return l2_normalize(x + self.down(jax.nn.relu(self.up(x))))


class OriginalTwoTower(nnx.Module):
    """Retrieval: cosine of the towers over the temperature, and four logits from their elementwise product.

    The cosine over the temperature is added to the click logit; the logits are then clamped to [-100, 100], which binds
    only at temperatures near 0.01 and below. No candidate is masked, and none depends on the others.
    """

    def __init__(
        self,
        config: EncoderConfig,
        vocabulary: Vocabulary,
        positions: int,
        item_hidden: int,
        temperature: float,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.width // 2
        self.temperature = temperature
        self.user_tower = OriginalUserTower(config, vocabulary, positions, rngs=rngs)
        self.item_tower = OriginalItemTower(vocabulary, width, item_hidden, rngs=rngs)
        self.output_norm = layer_norm(width, rngs, eps=1e-5)
        self.unembedding = nnx.Linear(width, vocabulary.actions, rngs=rngs)

    def __call__(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Arrays named as in `TwoTowerInputs` to representations, scores and logits.

        Returns:
            `user_repr` [B, D], `candidate_repr` [B, C, D], `scores` [B, C], `logits` [B, C, A].

        Raises:
            UserError: an input is missing or misshapen, an id lies outside its table, or S is longer than the
                positional table.
        """
        users, items = self.user_tower, self.item_tower
        expected = (
            Input("user_ids", "B", users.user_embedding.num_embeddings),
            Input("history_item_ids", "BS", users.item_embedding.num_embeddings),
            Input("history_actions", "BSA", None),
            Input("candidate_item_ids", "BC", items.item_embedding.num_embeddings),
            Input("user_gender", "B", users.gender_embedding.num_embeddings),
            Input("user_age", "B", users.age_embedding.num_embeddings),
            Input("candidate_categories", "BC", items.category_embedding.num_embeddings),
        )
        known = {"A": users.action_projection.in_features}
        arrays = _checked(inputs, expected, known, {"S": users.pos_encoding.length})
        return _run(*nnx.split(self), TwoTowerInputs(*arrays))

    def forward(self, inputs: TwoTowerInputs) -> dict[str, Array]:
        user_BD = self.user_tower.forward(inputs)
        candidate_BCD = self.item_tower.forward(inputs.candidate_item_ids, inputs.candidate_categories)
        product_BCD = user_BD[:, None] * candidate_BCD
        scores_BC = product_BCD.sum(-1) / self.temperature
        logits_BCA = self.unembedding(self.output_norm(product_BCD))
        logits_BCA = jnp.clip(logits_BCA.at[..., 0].add(scores_BC), -100.0, 100.0)
        return {"user_repr": user_BD, "candidate_repr": candidate_BCD, "scores": scores_BC, "logits": logits_BCA}


@partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, state: nnx.State, *arguments: Array | tuple[Array, ...]) -> Array | dict[str, Array]:
    # On an accelerator the default precision of a float32 product is about 1e-3.
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graphdef, state).forward(*arguments)


def _tokens(x: ArrayLike, padding_mask: ArrayLike | None, width: int) -> tuple[Array, Array]:
    """Tokens as float32 and the mask of the real ones."""
    x_BTD = jnp.asarray(x, jnp.float32)
    if x_BTD.ndim != 3 or x_BTD.shape[-1] != width:
        raise UserError(f"x has shape {x_BTD.shape}, expected [batch, tokens, {width}]")
    if padding_mask is None:
        return x_BTD, jnp.ones(x_BTD.shape[:2], bool)
    padding_BT = jnp.asarray(padding_mask)
    if padding_BT.shape != x_BTD.shape[:2] or padding_BT.dtype != bool:
        found = f"{padding_BT.dtype} {padding_BT.shape}"
        raise UserError(f"padding_mask is {found}, expected bool {x_BTD.shape[:2]}, True on padding")
    return x_BTD, ~padding_BT


def _checked(
    inputs: Mapping[str, ArrayLike], expected: Sequence[Input], known: Mapping[str, int], longest: Mapping[str, int]
) -> list[Array]:
    """The arrays in the order of `expected`, as int32 or float32.

    Args:
        known: axes whose extent is fixed; the others take theirs from the first input that has them.
        longest: extents that an axis must not exceed.
    """
    problems: list[str] = []
    extents = dict(known)
    arrays = []
    for name, sizes, rows in expected:
        if name not in inputs:
            problems.append(f"{name} is missing")
            continue
        array = np.asarray(inputs[name])
        if array.ndim == len(sizes):
            for letter, extent in zip(sizes, array.shape, strict=True):
                extents.setdefault(letter, extent)
                if extent > longest.get(letter, extent):
                    problems.append(f"{name} is {extent} long, but the weights hold {longest[letter]} positions")
        shape = tuple(extents.get(letter, letter) for letter in sizes)
        if array.shape != shape or 0 in shape:
            problems.append(f"{name} has shape {array.shape}, expected [{', '.join(sizes)}] = {shape}, none of them 0")
        else:
            problems.extend(_value_problems(name, array, rows))
        arrays.append(array)
    if problems:
        raise UserError("the inputs do not fit the weights: " + "; ".join(problems))
    return [
        jnp.asarray(array.astype(np.float32 if rows is None else np.int32))
        for array, (_, _, rows) in zip(arrays, expected, strict=True)
    ]


def _value_problems(name: str, array: np.ndarray, rows: int | None) -> list[str]:
    if rows is None:
        good = array.dtype.kind in "fiub" and bool(np.isfinite(array).all())
        return [] if good else [f"{name} must hold finite numbers"]
    if array.dtype.kind not in "iu":
        return [f"{name} is {array.dtype}, expected integers"]
    outside = np.argwhere((array < 0) | (array >= rows))
    if not len(outside):
        return []
    place = tuple(outside[0].tolist())
    return [f"{name}{list(place)} is {array[place]}, outside the table's 0..{rows - 1} ({len(outside)} such values)"]
