"""Arrays from `.npy` files that somebody else may have written."""

from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import DTypeLike

from tenrec_jax.errors import UserError


def open_npy(path: Path, dtype: DTypeLike, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array as a read-only memory map: a header that lies of its size costs nothing, and nothing in the file is executed.

    Args:
        dtype: of the entries.
        shape: None where any length will do.

    Raises:
        UserError: the file is missing, cannot be read, or holds another array.
    """
    try:
        with np.errstate(over="raise"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, ArithmeticError, MemoryError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an array: {error}") from error
    except (TokenError, SyntaxError, RecursionError) as error:  # of the header, which is a Python literal
        raise UserError(f"{path} cannot be read as an array: its header is no header ({error})") from error
    fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}; {np.dtype(dtype)} of shape ({wanted}) is expected"
        )
    return array


def read_npy(path: Path, dtype: DTypeLike, shape: tuple[int | None, ...]) -> np.ndarray:
    """As `open_npy`, in memory."""
    return np.array(open_npy(path, dtype, shape))
