"""Files of text as blocks of whole lines: plain, gzip or zstd."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from tenrec_jax.errors import UserError

BLOCK_BYTES = 4 << 20
LONGEST_LINE = 1 << 20
BOM = b"\xef\xbb\xbf"
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# What is taken for text by mistake.
_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh91AY": "bzip2 data; unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "xz data; unpack it, or compress it with gzip or zstd",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
}


class TextBlock(NamedTuple):
    """Whole lines of a file, the last one ended too. `first_line` counts from 1."""

    path: str
    first_line: int
    data: bytes


def open_source(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        UserError: it is missing, a folder or empty, or cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file inside it.")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not path.stat().st_size:
        file.close()
        raise UserError(f"{path} is empty.")
    return file


@contextmanager
def open_text(path: Path, *, progress: bool = False) -> Iterator[IO[bytes]]:
    """Open a file of text, which may be compressed; its first bytes tell.

    Raises:
        UserError: as `open_source`, the file is an archive or Parquet, or compressed data end early or are damaged (while reading).
    """
    with open_source(path) as file:
        start = file.read(max(map(len, [*COMPRESSIONS, *_OTHERS])))
        for magic, what in _OTHERS.items():
            if start.startswith(magic):
                raise UserError(f"{path} is {what}.")
        compression = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
        file.seek(0)
        bar = tqdm.wrapattr(
            file, "read", total=path.stat().st_size, desc=path.name, disable=not progress, leave=False, bytes=True
        )
        with bar as metered:
            if not compression:
                yield metered
                return
            try:
                yield pa.CompressedInputStream(pa.PythonFile(metered, "r"), compression)
            except OSError as error:
                if error.errno is None:
                    raise UserError(f"{path} is damaged {compression} data: {error}. Fetch the file again.") from error
                raise


def text_blocks(file: IO[bytes], path: str, *, first_line: int = 1, start: bytes = b"") -> Iterator[TextBlock]:
    """The rest of a file as blocks of about `BLOCK_BYTES`, each of whole lines. A missing last line end is added.

    Args:
        file: what to read.
        path: its name for messages.
        first_line: number of the first line to come.
        start: bytes that were read already and stand before what is left.

    Raises:
        UserError: a line is longer than `LONGEST_LINE` bytes.
    """
    rest = start
    while True:
        data = file.read(BLOCK_BYTES)
        rest += data if data or rest.endswith(b"\n") or not rest else b"\n"
        end = rest.rfind(b"\n") + 1
        if not end and len(rest) > LONGEST_LINE:
            raise UserError(
                f"{path}:{first_line} is longer than {LONGEST_LINE:,} bytes without a line end. Is this a text file?"
            )
        if end:
            yield TextBlock(path, first_line, rest[:end])
            first_line += rest.count(b"\n")
            rest = rest[end:]
        if not data:
            return


def first_line_of(file: IO[bytes], path: str) -> tuple[bytes, bytes]:
    """The first line of a file without its line end and byte order mark, and what was read beyond it.

    Raises:
        UserError: it is longer than `LONGEST_LINE` bytes.
    """
    data = b""
    while b"\n" not in data and len(data) <= LONGEST_LINE and (more := file.read(LONGEST_LINE)):
        data += more
    line, _, rest = data.removeprefix(BOM).partition(b"\n")
    if len(line) > LONGEST_LINE:
        raise UserError(f"{path}:1 is longer than {LONGEST_LINE:,} bytes without a line end. Is this a text file?")
    return line.removesuffix(b"\r"), rest
