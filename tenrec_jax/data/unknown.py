"""How often training makes ids unknown, from which a model learns what new ones will meet.

An item that the training rows do not hold is mostly one that is rarely shown, and those fare otherwise than what everybody is shown. What
the log shows a few times tells of what it does not show (Good, 1953, doi:10.1093/biomet/40.3-4.237). So the items made unknown are those
that a part of the training rows would not have held.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq


class UnknownRates(NamedTuple):
    """Probabilities of being made unknown.

    Attributes:
        user: of each user.
        item_N1: of each event, by its item, [N + 1]; entry 0 is 0.
    """

    user: float
    item_N1: NDArray[np.float64]

    @classmethod
    def of(cls, share: float, rows_N1: NDArray[np.floating]) -> "UnknownRates":
        """The rates at which a share of the users and of the training rows' items is made unknown.

        If each training row were lost with probability q, an item with n rows would be unknown with probability `q^n`, which is the rate of
        its rows. q is the one at which that comes to the share.

        Args:
            share: above 0 and below 1.
            rows_N1: training rows of each item, [N + 1], not all 0; entry 0 is.
        """
        rows_M, number_M = np.unique(rows_N1[rows_N1 > 0], return_counts=True)
        weight_M = rows_M * number_M / (rows_M * number_M).sum()
        log_q = brentq(lambda log_q: weight_M @ np.exp(log_q * rows_M) - share, np.log(share) / rows_M[0] - 1, 0.0)
        return cls(share, np.where(rows_N1 > 0, np.exp(log_q * rows_N1), 0.0))
