"""The memory-mapped columns of a table, written shard by shard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.data.interactions import ITEM_COLUMN, LABELS_COLUMN, OFFSETS, USER_COLUMN
from tenrec_jax.data.schema import ITEM, USER
from tenrec_jax.data.shards import ColumnFile


class EventColumns:
    """The columns user, item and labels and the offsets of users, as shards come in order; a context, which ends with closed files.

    Args:
        folder: the table's.
        actions: that are labelled. labels: the columns that hold them.
        users: their number.
    """

    def __init__(self, folder: Path, actions: tuple[str, ...], labels: Sequence[str], users: int) -> None:
        self._actions, self._labels, self._folder, self._rows = actions, labels, folder, 0
        (folder / USER_COLUMN).parent.mkdir()
        self._files = {
            "user": ColumnFile(folder / USER_COLUMN, "<i4"),
            "item": ColumnFile(folder / ITEM_COLUMN, "<i4"),
            f"labels {','.join(actions)}": ColumnFile(folder / LABELS_COLUMN, "|i1", len(actions)),
        }
        self._length_U = np.zeros(users + 1, np.int64)
        self._positive_A = np.zeros(len(actions), np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.abandon()

    def append(self, rows: pa.Table) -> None:
        """Add a shard's rows."""
        user_R, item_R = as_numpy(rows[USER]), as_numpy(rows[ITEM])
        labels_RA = np.empty((rows.num_rows, len(self._labels)), np.int8)
        for action, name in enumerate(self._labels):
            labels_RA[:, action] = as_numpy(rows[name])
            self._positive_A[action] += np.count_nonzero(labels_RA[:, action])
        for file, values in zip(self._files.values(), (user_R, item_R, labels_RA), strict=True):
            file.append(values)
        lowest = int(user_R[0])
        lengths = np.bincount(user_R - lowest)
        self._length_U[lowest : lowest + len(lengths)] += lengths
        self._rows += len(user_R)

    def close(self) -> dict[str, int]:
        """Complete the files; returns the counts of rows, users and actions."""
        for file in self._files.values():
            file.close()
        offsets = ColumnFile(self._folder / OFFSETS, "<i8")
        offsets.append(np.concatenate([[0], np.cumsum(self._length_U)]))
        offsets.close()
        counts = {"rows": self._rows, "users": len(self._length_U) - 1}
        return counts | dict(zip(self._actions, self._positive_A.tolist(), strict=True))

    def described(self) -> list[tuple[str, str, tuple[int, ...], str]]:
        """Name, type, shape and hash of each column."""
        return [(name, *file.described()) for name, file in self._files.items()]
