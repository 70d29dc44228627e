"""Safetensors files with PyTorch alone: a machine with a vendor's image may have no other package.

Stricter than the format asks for: the tensors must fill the data without gap or overlap, so a truncated or lengthened file is an error.
"""

import ctypes
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_mlu_backend.errors import UserError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Contents(NamedTuple):
    """The header's texts and the tensors, on the CPU."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read(path: Path) -> Contents:
    """Read a file.

    Raises:
        UserError: it is absent or damaged.
    """
    try:
        buffer = bytearray(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    try:
        return _parsed(buffer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is damaged: {error}. Copy it again.") from error


def read_named(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file, which must hold some names.

    Raises:
        UserError: it is absent or damaged, or lacks one of them; all such are named.
    """
    tensors = read(path).tensors
    missing = sorted(set(names) - tensors.keys())
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}. Copy or export it again.")
    return tensors


def _parsed(buffer: bytearray) -> Contents:
    (length,) = struct.unpack_from("<Q", buffer)
    begin = 8 + length
    if begin > len(buffer):
        raise ValueError("its header is cut off")
    header: dict[str, Any] = json.loads(buffer[8:begin].decode())
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata holds other things than texts")
    tensors, end = {}, begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        first, last = (begin + offset for offset in entry["data_offsets"])
        if first != end or last - first != math.prod(shape) * dtype.itemsize or last > len(buffer):
            raise ValueError(f"entry {name} does not lie where it should")
        tensors[name] = _tensor(buffer, dtype, first, math.prod(shape)).reshape(shape)
        end = last
    if end != len(buffer):
        raise ValueError("there is more data than its header speaks of")
    return Contents(metadata, tensors)


def _tensor(buffer: bytearray, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype, offset=offset, count=count) if count else torch.empty(0, dtype=dtype)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any device and layout under a temporary name, then rename the file."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Wide types first, so that every entry is aligned.
    order = sorted(on_cpu, key=lambda name: (-on_cpu[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        size = on_cpu[name].numel() * on_cpu[name].dtype.itemsize
        shape = list(on_cpu[name].shape)
        header[name] = {"dtype": _NAMES[on_cpu[name].dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(_bytes(on_cpu[name]))
    temporary.replace(path)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the entries in order of their names: name, shape and bytes, little-endian."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}:{','.join(map(str, tensors[name].shape))}\n".encode())
        total.update(_bytes(tensors[name].detach().cpu().contiguous()))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, without a copy and without NumPy. Valid while the tensor is."""
    size = tensor.numel() * tensor.dtype.itemsize
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
