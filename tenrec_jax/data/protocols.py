"""Named splits. A number means something only beside the name of its protocol.

Tenrec has no timestamps: order is each user's own order in the file.
"""

import difflib
import hashlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError

MIN_CLICKS = 3


class Part(IntEnum):
    """Where a row goes; NONE is used by no part."""

    NONE = 0
    TRAIN = 1
    VALIDATION = 2
    TEST = 3


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a table assigned to parts.

    Attributes:
        protocol: name of the rule.
        part_R: a `Part` a row, int8 [R], read-only.
        sha256: hash of the rule's name and the parts.
        users_left_out: users too short to be evaluated.
    """

    protocol: str
    part_R: np.ndarray
    sha256: str
    users_left_out: int

    def rows(self, part: Part) -> np.ndarray:
        """Rows of one part, int64, ascending."""
        return np.flatnonzero(self.part_R == part).astype(np.int64, copy=False)


def per_user_order(table: Interactions) -> Split:
    """Of a user's n rows, the first floor(0.8 n) are training, up to floor(0.9 n) validation, the rest test."""
    length_U = np.diff(table.offsets)
    place_R = _place_in_block(table.offsets)
    # In whole numbers: 0.9 * n can fall short of an integer.
    train_R = np.repeat(length_U * 8 // 10, length_U)
    validation_R = np.repeat(length_U * 9 // 10, length_U)
    part_R = np.where(place_R < train_R, Part.TRAIN, np.where(place_R < validation_R, Part.VALIDATION, Part.TEST))
    return _split("per_user_order", part_R, users_left_out=0)


def leave_one_out(table: Interactions) -> Split:
    """Over clicks: a user's last is test, the one before validation, the others training.

    Users with fewer than three clicks are training alone and counted as left out. Rows without a click are in no part.
    """
    clicked_R = _clicks(table)
    before = np.concatenate([[0], np.cumsum(clicked_R)])
    clicks_U = np.diff(before[table.offsets])
    from_end_C = np.repeat(clicks_U, clicks_U) - _place_in_block(before[table.offsets])
    evaluated_C = np.repeat(clicks_U >= MIN_CLICKS, clicks_U)
    part_C = np.full(len(from_end_C), Part.TRAIN, np.int8)
    part_C[evaluated_C & (from_end_C == 1)] = Part.TEST
    part_C[evaluated_C & (from_end_C == 2)] = Part.VALIDATION
    part_R = np.full(table.num_rows, Part.NONE, np.int8)
    part_R[clicked_R] = part_C
    return _split("leave_one_out", part_R, users_left_out=int((clicks_U[1:] < MIN_CLICKS).sum()))


PROTOCOLS = {rule.__name__: rule for rule in (per_user_order, leave_one_out)}


def make_split(name: str, table: Interactions) -> Split:
    """Split a table by the protocol of that name.

    Raises:
        UserError: there is no such protocol; the message names the nearest.
    """
    if name not in PROTOCOLS:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"Unknown protocol {name!r}.{hint} The protocols are {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name](table)


def _clicks(table: Interactions) -> np.ndarray:
    return table.labels_RA[:, table.actions.index("click")] > 0


def _place_in_block(offsets: np.ndarray) -> np.ndarray:
    """Position of each row in its user's block, from 0."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def _split(protocol: str, part_R: np.ndarray, *, users_left_out: int) -> Split:
    part_R = part_R.astype(np.int8)
    part_R.setflags(write=False)
    digest = hashlib.sha256(f"{protocol} {part_R.shape}\n".encode() + part_R.tobytes())
    return Split(protocol, part_R, digest.hexdigest(), users_left_out)
