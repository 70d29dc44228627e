"""Faults of files: what disks, and people, do to them."""

from pathlib import Path

import numpy as np

FAULTS = ("flip", "truncate", "zero", "delete", "swap")


def apply(fault: str, path: Path, other: Path, random: np.random.Generator) -> None:
    """Put a fault into a file; places are drawn until its bytes change. `other` is what it is swapped with."""
    if fault == "delete":
        path.unlink()
        return
    if fault == "swap":
        # By renaming, which leaves each file's own times as they were.
        path.rename(path.with_name("between"))
        other.rename(path)
        path.with_name("between").rename(other)
        return
    before = path.read_bytes()
    after = bytearray(before)
    while after == before:
        place = int(random.integers(len(before)))
        if fault == "flip":
            after[place] ^= 1 << int(random.integers(8))
        elif fault == "truncate":
            del after[place:]
        else:
            stretch = after[place : place + int(random.integers(1, 200))]
            after[place : place + len(stretch)] = bytes(len(stretch))
    path.write_bytes(after)
