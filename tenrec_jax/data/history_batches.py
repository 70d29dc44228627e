"""Training examples of one target each: a clicked row, the user's history before it and negatives of its own."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.data.row_blocks import process_rows, row_blocks
from tenrec_jax.data.sampling import ExcludingSampler, ItemSampler, UserPositives
from tenrec_jax.errors import UserError
from tenrec_jax.timeline import Events, Profile, Timeline


class HistoryBatch(NamedTuple):
    """B clicked rows.

    Attributes:
        timeline: the user's last S training events before each.
        item: the row's item, int32 [B].
        label: the row's actions, int8 [B, A].
        negative: items that the user did not click in training rows, int32 [B, C].
    """

    timeline: Timeline
    item: np.ndarray
    label: np.ndarray
    negative: np.ndarray


class HistoryBatches:
    """Batches of clicked training rows, in an order that depends on (seed, epoch) alone.

    What an epoch leaves over after its last full batch is not used in that epoch. Opening is one pass over the log. It copies the
    training rows' items, categories and actions, 8 + A bytes a row, so that a history is one stretch of memory; the users' positives take
    12 to 16 bytes a click, finding and ordering the clicks 20 to 28.

    Args:
        table: the log. vocabulary: ids known from training rows. split: names the training rows.
        items: where negatives are drawn from; those that the user clicked in training rows are left out, see `ExcludingSampler`.
        history: S, events before the row.
        negatives: C, draws a row.
        batch_size: rows of a batch, over all processes.
        seed: of order and draws.

    Raises:
        UserError: the training rows hold fewer clicks than one batch.
    """

    def __init__(
        self,
        table: Interactions,
        vocabulary: TrainVocabulary,
        split: Split,
        items: ItemSampler,
        *,
        history: int,
        negatives: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._table, self._vocabulary, self._seed = table, vocabulary, seed
        self._history, self._batch_size = history, batch_size
        self._pool = ThreadPoolExecutor(1)
        self._columns = _TrainColumns.of(table, split, history)
        self._sampler = ExcludingSampler(items, UserPositives(table, split), count=negatives, seed=seed)
        self.steps_per_epoch = len(self._columns.clicked) // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"The training rows hold {len(self._columns.clicked)} clicks, fewer than a batch of {batch_size}: "
                "take smaller batches or more data."
            )
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __call__(self, step: int, process_index: int = 0, process_count: int = 1) -> HistoryBatch:
        """The batch of `step`, counted from 0 over all epochs, or one process's stretch of its rows.

        Raises:
            ValueError: the batch cannot be divided by the number of processes.
        """
        rows = process_rows(self._batch_size, process_index, process_count)
        epoch, place = divmod(step, self.steps_per_epoch)
        example = self._order(epoch)[place * self._batch_size : (place + 1) * self._batch_size]
        position, user = self._columns.clicked[example], self._columns.clicking_user[example]
        timeline = self._pool.submit(self._timeline, position[rows], user[rows])
        negative_BC = self._sampler.draw(step, user, rows)
        position = position[rows]
        columns = self._columns
        label_BA = columns.unpacked(columns.packed[position])
        return HistoryBatch(timeline.result(), columns.item[position], label_BA, negative_BC)

    def _timeline(self, position: np.ndarray, user: np.ndarray) -> Timeline:
        table, columns, length = self._table, self._columns, self._history
        start = np.maximum(columns.offsets[user], position - length)
        mask_BS = np.arange(length) < (position - start)[:, None]

        def histories(column: np.ndarray) -> np.ndarray:
            # Overlapping windows: a history is copied as one stretch.
            return sliding_window_view(column, length)[start] * mask_BS

        one_B1 = user[:, None]
        return Timeline(
            Profile(self._vocabulary.user[one_B1], table.users.gender[one_B1], table.users.age[one_B1]),
            np.zeros(one_B1.shape, np.int32),
            Events(
                item=histories(columns.item),
                category=histories(columns.category),
                action=columns.unpacked(histories(columns.packed)),
                mask=mask_BS,
            ),
        )

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch, 0)).permutation(len(self._columns.clicked))


class _TrainColumns(NamedTuple):
    """The training rows alone, one after the other, and S empty ones at the end.

    Shapes: item and category int32 [V + S]; packed, the labels of a row as one unsigned integer [V + S]; offsets [U + 2] of the users;
    clicked and clicking_user, position and dense user of each clicked row. `actions` is A.
    """

    item: np.ndarray
    category: np.ndarray
    packed: np.ndarray
    offsets: np.ndarray
    clicked: np.ndarray
    clicking_user: np.ndarray
    actions: int

    @classmethod
    def of(cls, table: Interactions, split: Split, padding: int) -> "_TrainColumns":
        size, actions = int((split.part_R == Part.TRAIN).sum()) + padding, len(table.actions)
        width = 1 << (actions - 1).bit_length()
        item, label = np.zeros(size, np.int32), np.zeros((size, width), np.int8)
        rows_U, filled = np.zeros(table.num_users + 1, np.int64), 0
        for rows in row_blocks(table.num_rows):
            trained = split.part_R[rows] == Part.TRAIN
            stretch = slice(filled, filled + int(trained.sum()))
            item[stretch], label[stretch, :actions] = table.item_R[rows][trained], table.labels_RA[rows][trained]
            rows_U += np.bincount(table.user_R[rows][trained], minlength=len(rows_U))
            filled = stretch.stop
        clicked = np.flatnonzero(label[:, table.actions.index("click")])
        packed = label.view(f"u{width}")[:, 0]
        offsets = np.concatenate([[0], np.cumsum(rows_U)])
        user = (np.searchsorted(offsets, clicked, side="right") - 1).astype(np.int32)
        return cls(item, table.items.category[item], packed, offsets, clicked, user, actions)

    def unpacked(self, packed: np.ndarray) -> np.ndarray:
        """The labels of packed rows, int8 [..., A]."""
        return packed[..., None].view(np.int8)[..., : self.actions]
