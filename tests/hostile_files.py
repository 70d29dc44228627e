"""Files that somebody wrote to run code, to exhaust memory or stack, or to be read beyond their end."""

import io
import json
import os
import pickle  # noqa: TID251  makes files that try to run code
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class Command:
    """Unpickling this would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


def hostile(suffix: str, mark: Path) -> dict[str, bytes]:
    """Contents by name, for a file of that suffix; one that is executed makes the file `mark`."""
    kinds = {".safetensors": safetensors, ".json": json_texts, ".parquet": parquet, ".npy": npy, ".npz": npz}
    of_kind = dict(kinds[suffix](mark)) if suffix in kinds else {}
    return of_kind | {"empty": b"", "garbage": bytes(range(256)) * 4}


def safetensors(mark: Path) -> Iterator[tuple[str, bytes]]:
    def entry(*offsets: int) -> dict:
        return {"dtype": "F32", "shape": [4], "data_offsets": offsets}

    def file(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    yield "a header beyond the file's end", struct.pack("<Q", 2**63) + b"{}"
    yield "a header far too long", struct.pack("<Q", 2**40) + b"{" + b" " * 100
    overlapping = json.dumps({"a": entry(0, 16), "b": entry(8, 24)}).encode()
    yield "overlapping entries", file(overlapping, bytes(24))
    yield "an entry beyond the end", file(json.dumps({"a": entry(0, 2**40)}).encode(), bytes(16))
    huge = {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}
    yield "a shape that overflows", file(json.dumps(huge).encode())
    yield "a header nested deeply", file(b'{"a":' * 100_000)
    yield "a header that nests within limits", file(b'{"a":' * 900 + b"{}" + b"}" * 900)
    yield "a header of a huge number", file(b'{"a": ' + b"9" * 100_000 + b"}")
    yield "a header that is a list", file(b"[1, 2]")
    yield "other entries", file(json.dumps({"other": entry(0, 16)}).encode(), bytes(16))
    yield "metadata of other types", file(b'{"__metadata__": {"config": 5}}')


def json_texts(mark: Path) -> Iterator[tuple[str, bytes]]:
    yield "nested deeply", b"[" * 100_000
    yield "nested within limits", b"[" * 900 + b"]" * 900
    yield "a huge number", b"1" * 100_000
    yield "a lone surrogate", '"\ud800"'.encode("utf-8", "surrogatepass")
    yield "a list", b"[1, 2]"
    yield "a number", b"7"
    yield "an object of other keys", b'{"\\ud800": [1]}'


def parquet(mark: Path) -> Iterator[tuple[str, bytes]]:
    yield "garbage between the marks", b"PAR1" + bytes(range(256)) + struct.pack("<I", 200) + b"PAR1"
    yield "a footer beyond the file", b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1"
    sink = io.BytesIO()
    pq.write_table(pa.table({"other": [1, 2]}), sink)
    yield "other columns", sink.getvalue()
    yield "a page that is cut", sink.getvalue()[:20] + bytes(40) + sink.getvalue()[60:]


def npy(mark: Path) -> Iterator[tuple[str, bytes]]:
    sink = io.BytesIO()
    np.save(sink, np.array([Command(mark)], dtype=object))
    yield "objects", sink.getvalue()

    def file(header: bytes) -> bytes:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header

    yield "a header that is no literal", file(b"__import__('os').system('true')\n")
    yield "a header nested deeply", file(b"(" * 5000 + b"\n")
    yield (
        "a header of a huge shape",
        file(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 8)}\n"),
    )
    yield "a header of a negative shape", file(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n")
    yield "a header that is cut", file(b"{'descr'")[:-4]
    yield "a pickle", pickled(mark)
    scalar = io.BytesIO()
    np.save(scalar, np.float32(3))
    yield "a number", scalar.getvalue()
    texts = io.BytesIO()
    np.save(texts, np.array(["a", "b"]))
    yield "texts", texts.getvalue()


def npz(mark: Path) -> Iterator[tuple[str, bytes]]:
    sink = io.BytesIO()
    np.savez(sink, **{"encoder.layers.0": np.array([Command(mark)], dtype=object)})
    yield "objects", sink.getvalue()
    yield "a pickle", pickled(mark)
    for what, data in npy(mark):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("weights/query.npy", data)
        yield f"an array: {what}", archive.getvalue()


def pickled(mark: Path) -> bytes:
    """A pickle that makes the file `mark`."""
    return pickle.dumps(Command(mark))
