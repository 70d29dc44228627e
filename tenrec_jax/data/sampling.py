"""Negatives with the exact probabilities they were drawn with. Every draw is a pure function of (seed, step)."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.data.row_blocks import row_blocks
from tenrec_jax.errors import UserError

_CHUNK = 2048  # rows of a batch that share a generator: whatever part of a batch is asked for, its draws are the same
_MULTIPLIERS = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)


class ItemSampler(Protocol):
    """Independent draws of item ids."""

    @property
    def probability(self) -> np.ndarray:
        """Probability of each id at one draw, float64 [N + 1]; sums to 1."""

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Item ids of that shape, int32, with replacement."""


@dataclass(frozen=True, eq=False)
class UniformItems:
    """Every entry of `choices` is equally likely; int32 ids, in which an id may stand more than once."""

    choices: np.ndarray
    size: int

    @classmethod
    def of_catalogue(cls, vocabulary: TrainVocabulary) -> "UniformItems":
        """Uniform over the catalogue; all items that training does not know stand together as item 0."""
        return cls(vocabulary.item[1:], len(vocabulary.item))

    @classmethod
    def of_trained(cls, vocabulary: TrainVocabulary) -> "UniformItems":
        """Uniform over the items that training rows mention."""
        return cls(vocabulary.item[vocabulary.item > 0], len(vocabulary.item))

    @property
    def probability(self) -> np.ndarray:
        return np.bincount(self.choices, minlength=self.size) / len(self.choices)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.take(self.choices, generator.integers(0, len(self.choices), shape, np.int32))


class PopularItems:
    """Item i with probability c_i^alpha / sum_j c_j^alpha over the items with c > 0; alpha = 1 is how in-batch items come about.

    Args:
        counts_N1: training clicks c of each item, [N + 1].
        alpha: 0.75 is word2vec's (Mikolov et al., 2013).

    Raises:
        UserError: no item has a count, or alpha is not finite.
    """

    def __init__(self, counts_N1: np.ndarray, alpha: float) -> None:
        if not np.isfinite(alpha) or not counts_N1.any():
            raise UserError(f"Popularity needs items with clicks and a finite exponent; it is {alpha}.")
        weight_N1 = np.power(counts_N1, alpha, where=counts_N1 > 0, out=np.zeros(len(counts_N1)))
        self.probability = weight_N1 / weight_N1.sum()
        self._items = np.flatnonzero(self.probability).astype(np.int32)
        self._cumulated = np.cumsum(self.probability[self._items])
        # Rounding leaves the last sum a little off 1; a draw in [0, 1) must always fall below it.
        self._cumulated[-1] = 1.0

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return self._items[np.searchsorted(self._cumulated, generator.random(shape), side="right")]


@dataclass(frozen=True, eq=False)
class NegativeSampler:
    """Negatives that all queries of a step share.

    Attributes:
        items: where they are drawn from. count: draws a step. seed: of the draws.
    """

    items: ItemSampler
    count: int
    seed: int

    def draw(self, step: int) -> np.ndarray:
        """Item ids [count], int32."""
        return self.items.draw(np.random.default_rng((self.seed, step, 2)), (self.count,))


@dataclass(frozen=True, eq=False)
class WholeCatalogue:
    """No draw but every item, once a step: with these as negatives a sampled softmax is the full one.

    Attributes:
        items: whose items are taken.
    """

    items: UniformItems

    def draw(self, _: int) -> np.ndarray:
        """Item ids [N], int32."""
        return self.items.choices


class UserPositives:
    """The items that each user clicked in training rows; exact.

    Sorted pairs decide. Before them stands a blocked Bloom filter (Putze, Sanders and Singler, 2007): each user has 8 to 16 bytes a click,
    and each clicked item sets two bits of them. One bit in forty is set, so that one look settles nearly all items; one in two thousand
    reaches the sorted pairs. A row's looks fall into its user's few bytes, so they stay in the cache. Pairs and filter together take 16 to
    24 bytes a pair.
    """

    def __init__(self, table: Interactions, split: Split) -> None:
        self.num_users, self._items = table.num_users, table.num_items + 1
        click, keys = table.actions.index("click"), [np.zeros(0, np.int64)]
        for rows in row_blocks(table.num_rows):
            clicked = (split.part_R[rows] == Part.TRAIN) & (table.labels_RA[rows, click] > 0)
            keys.append(table.user_R[rows][clicked].astype(np.int64) * self._items + table.item_R[rows][clicked])
        self._pairs = np.unique(np.concatenate(keys))
        pairs_U = np.bincount(self.user, minlength=self.num_users + 1)
        log_bytes_U = 3 + np.ceil(np.log2(np.maximum(pairs_U, 1))).astype(np.uint32)
        self._shift_U = np.uint32(32) - log_bytes_U
        bytes_U = np.int64(1) << log_bytes_U.astype(np.int64)
        self._first_byte_U = np.cumsum(bytes_U) - bytes_U
        self._filter = np.zeros(bytes_U.sum(), np.uint8)
        item = self.item.astype(np.int32)
        for multiplier in _MULTIPLIERS:
            byte, bit = self._place(self.user, item, multiplier)
            np.bitwise_or.at(self._filter, byte, np.uint8(1) << bit)

    @property
    def user(self) -> np.ndarray:
        """User of each pair, ascending, int64 [P]."""
        return self._pairs // self._items

    @property
    def item(self) -> np.ndarray:
        """Item of each pair, int64 [P]."""
        return self._pairs % self._items

    def hits(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Places in the flattened `item`, int32 [B, ...], at which it is one of the user's, [B]; ascending."""
        place = np.flatnonzero(self._may_contain(user.reshape(-1, *[1] * (item.ndim - 1)), item, _MULTIPLIERS[0]))
        user, item = user[place // (item.size // len(user))], item.reshape(-1)[place]
        kept = self._may_contain(user, item, _MULTIPLIERS[1])
        place, user, item = place[kept], user[kept], item[kept]
        return place[self.contains(user, item)]

    def contains(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Whether each item is one of its user's, bool of the arguments' shape."""
        key = user.astype(np.int64) * self._items + item
        place = np.searchsorted(self._pairs, key)
        return self._pairs.take(place, mode="clip") == key if len(self._pairs) else np.zeros(key.shape, bool)

    def _may_contain(self, user: np.ndarray, item: np.ndarray, multiplier: np.uint32) -> np.ndarray:
        byte, bit = self._place(user, item, multiplier)
        found = np.take(self._filter, byte, mode="clip")
        found >>= bit
        found &= np.uint8(1)
        return found.view(bool)

    def _place(self, user: np.ndarray, item: np.ndarray, multiplier: np.uint32) -> tuple[np.ndarray, np.ndarray]:
        """The byte of the filter and the bit in it, 0..7, at which an item, int32, of a user is noted."""
        # Multiplicative hashing (Knuth): the product wraps around, and its high bits are the well-mixed ones.
        hashed = item.view(np.uint32) * multiplier
        bit = (hashed >> np.uint32(8)).astype(np.uint8)
        bit &= np.uint8(7)
        hashed >>= self._shift_U[user]
        return hashed + self._first_byte_U[user], bit


class ExcludingSampler:
    """Negatives of each row, none of which its user clicked in training rows.

    Draws that hit a positive are drawn again, which gives the truncated distribution exactly: with p the sampler's probabilities and
    Z_u = sum of p_j over the items j that user u clicked,

        log P(i | u) = log p_i - log(1 - Z_u)   for the other items, and -inf for those.

    Args:
        items: where they are drawn from. positives: what to leave out. count: draws a row. seed: of the draws.
    """

    def __init__(self, items: ItemSampler, positives: UserPositives, *, count: int, seed: int) -> None:
        self._items, self._positives, self._count, self._seed = items, positives, count, seed
        self._pool = ThreadPoolExecutor(os.cpu_count())
        probability, users = items.probability, positives.num_users + 1
        self._mass_U = np.bincount(positives.user, probability[positives.item], users)
        drawable = probability > 0
        self._exhausted_U = np.bincount(positives.user[drawable[positives.item]], minlength=users) == drawable.sum()

    def draw(self, step: int, user_B: np.ndarray, rows: slice | None = None) -> np.ndarray:
        """Negatives of the rows of a batch.

        Args:
            step: of training.
            user_B: dense users of the whole batch.
            rows: the rows wanted, all by default. What a row gets does not depend on it.

        Returns:
            Item ids, int32 [rows, count].

        Raises:
            UserError: a user clicked every item that can be drawn.
        """
        start, stop, _ = (rows or slice(None)).indices(len(user_B))
        first = start // _CHUNK * _CHUNK
        drawn = np.empty((max(0, stop - first), self._count), np.int32)

        def fill(begin: int) -> None:
            # To the chunk's end, even if the rows wanted end before: later rows take part in the draws.
            chunk = self._chunk(step, begin // _CHUNK, user_B[begin : begin + _CHUNK])
            drawn[begin - first : begin - first + _CHUNK] = chunk[: stop - begin]

        list(self._pool.map(fill, range(first, stop, _CHUNK)))
        return drawn[start - first :]

    def log_probability(self, user_B: np.ndarray, item_BC: np.ndarray) -> np.ndarray:
        """The log-probability of each item for its user at one draw, float64 [B, C]."""
        with np.errstate(divide="ignore"):  # items that are never drawn have log 0 = -inf
            log_p_BC = np.log(self._items.probability)[item_BC]
        log_p_BC -= np.log1p(-self._mass_U[user_B])[:, None]
        return np.where(self._positives.contains(user_B[:, None], item_BC), -np.inf, log_p_BC)

    def _chunk(self, step: int, chunk: int, user_B: np.ndarray) -> np.ndarray:
        if self._exhausted_U[user_B].any():
            user = int(user_B[self._exhausted_U[user_B]][0])
            raise UserError(f"Dense user {user} clicked every item that can be drawn, so there is no negative to draw.")
        generator = np.random.Generator(np.random.SFC64((self._seed, step, chunk, 4)))
        item_BC = self._items.draw(generator, (len(user_B), self._count))
        item, place = item_BC.reshape(-1), self._positives.hits(user_B, item_BC)
        while len(place):
            item[place] = self._items.draw(generator, place.shape)
            place = place[self._positives.hits(user_B[place // self._count], item[place])]
        return item_BC
