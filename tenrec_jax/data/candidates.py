"""The candidates of the protocol `sampled_128`."""

import numpy as np

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Split
from tenrec_jax.errors import UserError

NEGATIVES = 127

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sampled_candidates(table: Interactions, vocabulary: TrainVocabulary, split: Split, rows: np.ndarray) -> np.ndarray:
    """Each row's item and 127 draws, uniform over the other items that training rows mention.

    The draws are independent, so an item may stand twice, and an item that the user acted on elsewhere may be drawn: as in the system
    whose numbers the protocol continues. What a row gets is a function of (seed of the split, row) alone.

    Args:
        table: the log. vocabulary: ids known from training rows. split: by `sampled_128`.
        rows: row numbers [R'].

    Returns:
        Item ids, int32 [R', 128]; the row's own item first.

    Raises:
        UserError: training rows mention fewer than two items, or the split draws no candidates.
    """
    if split.seed is None:
        raise UserError(f"The protocol {split.protocol} draws no candidates; take sampled_128.")
    trained = vocabulary.item[vocabulary.item > 0]
    if len(trained) < 2:
        raise UserError("Training rows mention fewer than two items: there is nothing to draw candidates from.")
    own = table.item_R[rows]
    # Over the other items: places from the own item's on move up by one.
    own_place = np.where(vocabulary.item[own] > 0, np.searchsorted(trained, own), len(trained))[:, None]
    others = len(trained) - (own_place < len(trained))
    place = (_uniform(split.seed, rows) * others).astype(np.int64)
    return np.concatenate([own[:, None], trained[place + (place >= own_place)]], axis=1)


def _uniform(seed: int, rows: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from the counter row * 127 + slot by SplitMix64 (Steele et al., 2014), float64 [R', 127].

    Counter-based, so that a row's draws need no other row's, and the same on every machine and with every version of NumPy.
    """
    counter = rows.astype(np.uint64)[:, None] * np.uint64(NEGATIVES) + np.arange(NEGATIVES, dtype=np.uint64)
    state = _mixed(np.asarray([seed], np.uint64) * _GOLDEN + np.uint64(1)) + (counter + np.uint64(1)) * _GOLDEN
    return (_mixed(state) >> np.uint64(11)) * 2.0**-53


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
