"""Named splits. A number means something only beside the name of its protocol.

Tenrec has no timestamps: order is each user's own order in the file. Every rule is a pure function of the table, and of a seed where it
draws. Rules go over the rows in blocks: beside one or two bytes a row, their memory does not grow with the log.
"""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.row_blocks import place_in_block, row_blocks, user_blocks
from tenrec_jax.data.split_file import read_parts
from tenrec_jax.errors import UserError

SPLIT_FILE = "split_file"
MIN_CLICKS = 3
MERLIN_ROUNDS, MERLIN_ITEM_ROWS, MERLIN_USER_ROWS = 5, 30, (30, 150)


class Part(IntEnum):
    """Where a row goes; NONE is used by no part."""

    NONE = 0
    TRAIN = 1
    VALIDATION = 2
    TEST = 3


_USED = np.asarray([Part.TRAIN, Part.VALIDATION, Part.TEST], np.int8)


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a table assigned to parts.

    Attributes:
        protocol: name of the rule.
        part_R: a `Part` a row, int8 [R], read-only.
        sha256: hash of the rule's name, its seed and the parts.
        users_left_out: users that the rule cannot evaluate.
        ordered: whether each user's parts follow one another in time. If so, a row may be predicted from all of the user's rows before
            it, whatever their part up to its own. If not, from the user's training rows before it alone: the other rows that stand
            before it are held out as it is.
        seed: of what was drawn; None where nothing was.
    """

    protocol: str
    part_R: np.ndarray
    sha256: str
    users_left_out: int
    ordered: bool
    seed: int | None

    def rows(self, part: Part) -> np.ndarray:
        """Rows of one part, int64, ascending."""
        return np.flatnonzero(self.part_R == part).astype(np.int64, copy=False)

    def context_of(self, part: Part) -> np.ndarray:
        """Rows that may stand before a row of `part` when it is predicted, bool [R]. Among training rows, these are all of them."""
        last = part if self.ordered else Part.TRAIN
        return (self.part_R >= Part.TRAIN) & (self.part_R <= last)


def per_user_order(table: Interactions) -> Split:
    """Of a user's n rows, the first floor(0.8 n) are training, up to floor(0.9 n) validation, the rest test."""
    return _split("per_user_order", _cut_in_order(table))


def leave_one_out(table: Interactions) -> Split:
    """Over clicks: a user's last is test, the one before validation, the others training.

    Users with fewer than three clicks are training alone and counted as left out. Rows without a click are in no part.

    Raises:
        UserError: the log has no clicks.
    """
    click = _click_column("leave_one_out", table)
    part_R, left_out = np.full(table.num_rows, Part.NONE, np.int8), 0
    for users, rows in user_blocks(table.offsets):
        offsets = table.offsets[users.start : users.stop + 1] - rows.start
        clicked_R = table.labels_RA[rows, click] > 0
        before = np.concatenate([[0], np.cumsum(clicked_R)])
        clicks_U = np.diff(before[offsets])
        from_end_C = np.repeat(clicks_U, clicks_U) - place_in_block(before[offsets])
        evaluated_C = np.repeat(clicks_U >= MIN_CLICKS, clicks_U)
        part_C = np.full(len(from_end_C), Part.TRAIN, np.int8)
        part_C[evaluated_C & (from_end_C == 1)] = Part.TEST
        part_C[evaluated_C & (from_end_C == 2)] = Part.VALIDATION
        part_R[rows][clicked_R] = part_C
        left_out += int((clicks_U < MIN_CLICKS).sum())
    # User 0 has no rows and is nobody.
    return _split("leave_one_out", part_R, users_left_out=left_out - 1)


def official_ctr(table: Interactions, seed: int) -> Split:
    """Every click and twice as many rows without one, drawn without replacement; the kept rows are shuffled and cut 8:1:1.

    As in the paper's CTR task (arXiv 2210.10629). Where a log has fewer rows without a click, all of them are kept. Of the n kept rows
    floor(0.8 n) are training, up to floor(0.9 n) validation, the rest test: users stand in all parts, and the held-out rows are sampled
    too, so a predicted rate is one of the sampled log.

    Raises:
        UserError: the log has no clicks, or holds clicks alone.
    """
    click = _click_column("official_ctr", table, needs_exposures=True)
    generator = np.random.default_rng((seed, 0))
    kept_R = np.asarray(table.labels_RA[:, click] > 0)
    clicks = int(kept_R.sum())
    drawn = _shuffled([2 * clicks, max(0, table.num_rows - 3 * clicks)], generator)[: table.num_rows - clicks] == 0
    kept_R[~kept_R] = drawn
    part_R = np.full(table.num_rows, Part.NONE, np.int8)
    part_R[kept_R] = _USED[_shuffled(_cuts(np.asarray([kept_R.sum()]))[0], generator)]
    return _split("official_ctr", part_R, ordered=False, seed=seed)


def merlin_qk(table: Interactions, seed: int) -> Split:
    """The filters and the split of NVIDIA Merlin's quick start for ranking on QK-video.

    Rows with another action but no click are dropped. Then come five rounds; a round keeps the users with 30 to 150 rows left, and among
    the rows that this leaves the items with at least 30. The order is Merlin's, so after the last round a user may have fewer than 30.

    Of a user's n rows, floor(n / 5) are drawn as evaluation, as there. Merlin tunes and reports on the same rows; here the drawn rows are
    divided at random, floor(half) validation and the rest test, so that nothing is chosen on the rows that are reported. Users without an
    evaluation row are counted as left out.

    Raises:
        UserError: the log has no clicks, or holds clicks alone.
    """
    click = _click_column("merlin_qk", table, needs_exposures=True)
    kept_R = np.empty(table.num_rows, bool)
    for rows in row_blocks(table.num_rows):
        labels_RA = table.labels_RA[rows]
        kept_R[rows] = (labels_RA[:, click] > 0) | ~labels_RA.any(1)
    for _ in range(MERLIN_ROUNDS):
        _keep_frequent(kept_R, table.user_R, table.num_users, *MERLIN_USER_ROWS)
        _keep_frequent(kept_R, table.item_R, table.num_items, MERLIN_ITEM_ROWS, table.num_rows)
    part_R, evaluated = np.full(table.num_rows, Part.NONE, np.int8), 0
    generator = np.random.default_rng((seed, 0))
    for users, rows in user_blocks(table.offsets):
        offsets = table.offsets[users.start : users.stop + 1] - rows.start
        kept_K = np.flatnonzero(kept_R[rows])
        rows_U = np.diff(np.searchsorted(kept_K, offsets))
        user_K = np.repeat(np.arange(len(rows_U)), rows_U)
        shuffled_K = np.lexsort((generator.random(len(kept_K)), user_K))
        place_K = place_in_block(np.concatenate([[0], np.cumsum(rows_U)]))
        drawn_K = (rows_U // 5)[user_K]
        part_K = np.where(place_K < drawn_K // 2, Part.VALIDATION, np.where(place_K < drawn_K, Part.TEST, Part.TRAIN))
        part_R[rows][kept_K[shuffled_K]] = part_K
        evaluated += int((rows_U >= 5).sum())
    return _split("merlin_qk", part_R, users_left_out=table.num_users - evaluated, ordered=False, seed=seed)


def cold_user(table: Interactions) -> Split:
    """Whole users, 8:1:1 by a hash of the raw id: a user is in the same part of every log, whatever the other users and the seed.

    The hash is BLAKE2b of the id as text (UTF-8, 8 bytes, big-endian), modulo 10: 0 to 7 are training, 8 validation, 9 test. A row is
    predicted from the user's rows before it; the user's id is unknown to the models. About a second a million users.
    """

    def tenth(raw_id: object) -> int:
        return int.from_bytes(hashlib.blake2b(str(raw_id).encode(), digest_size=8).digest(), "big") % 10

    part_of_tenth = np.asarray([Part.TRAIN] * 8 + [Part.VALIDATION, Part.TEST], np.int8)
    tenth_U = np.fromiter((tenth(raw_id) for raw_id in table.users.raw_id.tolist()), np.int8, table.num_users + 1)
    return _split("cold_user", np.repeat(part_of_tenth[tenth_U], np.diff(table.offsets)))


def sampled_128(table: Interactions, seed: int) -> Split:
    """The parts of `per_user_order`; the clicked rows of a part are ranked among `candidates.sampled_candidates`, drawn by this seed.

    Rows without a click are seen by later rows as under `per_user_order`, but not ranked.

    Raises:
        UserError: the log has no clicks.
    """
    _click_column("sampled_128", table)
    return _split("sampled_128", _cut_in_order(table), seed=seed)


FIXED: dict[str, Callable[[Interactions], Split]] = {
    rule.__name__: rule for rule in (per_user_order, leave_one_out, cold_user)
}
DRAWN: dict[str, Callable[[Interactions, int], Split]] = {
    rule.__name__: rule for rule in (official_ctr, merlin_qk, sampled_128)
}
PROTOCOLS = (*FIXED, *DRAWN)


def make_split(name: str, table: Interactions, *, seed: int = 0, file: Path | None = None) -> Split:
    """Split a table by the protocol of that name, or as a file says.

    Args:
        name: one of `PROTOCOLS`, or "split_file".
        table: the log.
        seed: of the protocols that draw.
        file: for "split_file" alone: a CSV or Parquet file that names every row's part, see `split_file.read_parts`. Nothing is known of
            its order, so the split counts as unordered.

    Raises:
        UserError: there is no such protocol (the message names the nearest), the log does not suit it, or the file is wrong.
    """
    if (name == SPLIT_FILE) != (file is not None):
        raise UserError(f"A file with the parts goes with the protocol {SPLIT_FILE}, and that protocol needs one.")
    if file is not None:
        part_R = read_parts(file, table.num_rows, {part.name.lower(): int(part) for part in Part})
        return _split(SPLIT_FILE, part_R, ordered=False)
    if name in DRAWN:
        return DRAWN[name](table, seed)
    if name in FIXED:
        return FIXED[name](table)
    close = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"Unknown protocol {name!r}.{hint} The protocols are {', '.join(PROTOCOLS)}, {SPLIT_FILE}.")


def _click_column(protocol: str, table: Interactions, *, needs_exposures: bool = False) -> int:
    if "click" not in table.actions:
        raise UserError(f"The protocol {protocol} needs clicks; this log has {', '.join(table.actions)}.")
    if needs_exposures and not table.has_exposures:
        raise UserError(
            f"The protocol {protocol} needs exposures without a click, and this log ({table.kind}) holds clicks alone. "
            "Take leave_one_out or per_user_order."
        )
    return table.actions.index("click")


def _cuts(rows_G: np.ndarray) -> np.ndarray:
    """Numbers of training, validation and test rows of groups of n rows in order, [G, 3]."""
    # In whole numbers: 0.9 * n can fall short of an integer.
    train_G, validation_G = rows_G * 8 // 10, rows_G * 9 // 10
    return np.stack([train_G, validation_G - train_G, rows_G - validation_G], axis=1)


def _cut_in_order(table: Interactions) -> np.ndarray:
    return np.repeat(np.tile(_USED, table.num_users + 1), _cuts(np.diff(table.offsets)).ravel())


def _shuffled(counts: np.ndarray | list[int], generator: np.random.Generator) -> np.ndarray:
    """`counts[k]` times k, in random order, int8."""
    values = np.repeat(np.arange(len(counts), dtype=np.int8), counts)
    generator.shuffle(values)
    return values


def _keep_frequent(kept_R: np.ndarray, id_R: np.ndarray, size: int, low: int, high: int) -> None:
    """Drop, in place, the kept rows of ids that stand in fewer than `low` or more than `high` of them."""
    rows_N = np.zeros(size + 1, np.int64)
    for rows in row_blocks(len(kept_R)):
        rows_N += np.bincount(id_R[rows][kept_R[rows]], minlength=size + 1)
    frequent_N = (rows_N >= low) & (rows_N <= high)
    for rows in row_blocks(len(kept_R)):
        kept_R[rows] &= frequent_N[id_R[rows]]


def _split(
    protocol: str, part_R: np.ndarray, *, users_left_out: int = 0, ordered: bool = True, seed: int | None = None
) -> Split:
    part_R.setflags(write=False)
    digest = hashlib.sha256(f"{protocol} {seed} {part_R.shape}\n".encode())
    digest.update(part_R.data)
    return Split(protocol, part_R, digest.hexdigest(), users_left_out, ordered, seed)
