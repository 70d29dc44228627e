"""A server in a process of its own, and a bounded load on it over the loopback: what `serving.py` measures with.

The client speaks HTTP/1.1 over sockets that stay open and reads no more of an answer than it must: on a machine of two cores a comfortable
one would take as long as the server.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

START_SECONDS = 180


@dataclass(frozen=True)
class Server:
    """A running `tenrec-jax serve`: its process, its port, and the seconds from its start until it was ready."""

    process: subprocess.Popen
    port: int
    cold_start_seconds: float

    def get(self, path: str) -> Any:
        """The JSON of an answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        """The JSON of an answer to one request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    @property
    def resident_mib(self) -> float:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the process has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(folder: Path, port: int, *flags: str) -> Iterator[Server]:
    """A server of a folder, ready."""
    command = [sys.executable, "-m", "tenrec_jax", "serve", str(folder), f"--port={port}", *flags]
    began = time.perf_counter()
    with subprocess.Popen(command) as process:
        try:
            while not _is_ready(port):
                if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    raise RuntimeError("the server did not start; its error stands above")
                time.sleep(0.05)
            yield Server(process, port, time.perf_counter() - began)
        finally:
            process.terminate()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@dataclass
class Load:
    """What came of a load: milliseconds of each answer, statuses other than 200, and the answers where they are kept."""

    milliseconds: list[float] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def p99(self) -> float:
        """The 99th percentile of the milliseconds."""
        return float(np.percentile(self.milliseconds, 99))

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.milliseconds) / self.seconds


def at_rate(
    port: int,
    bodies: Sequence[Any],
    per_second: float,
    *,
    keep: bool = False,
    each: Callable[[int], None] = lambda _: None,
) -> Load:
    """Requests that begin at a fixed rate, whether earlier ones are answered or not; a late answer counts from when it was due.

    Args:
        keep: keep the answers.
        each: called with the number of each request when it begins.
    """
    return asyncio.run(_at_rate(port, bodies, per_second, keep, each))


def in_turns(port: int, bodies: Sequence[Any], clients: int) -> Load:
    """As many requests at a time as there are clients, each of which asks again once it is answered."""
    return asyncio.run(_in_turns(port, bodies, clients))


async def _at_rate(
    port: int, bodies: Sequence[Any], per_second: float, keep: bool, each: Callable[[int], None]
) -> Load:
    load, idle = Load(), [await _Connection.open(port) for _ in range(4)]
    began = time.perf_counter()

    async def ask(place: int, body: Any) -> None:
        connection = idle.pop() if idle else await _Connection.open(port)
        await connection.ask(body, load, since=began + place / per_second, keep=keep)
        idle.append(connection)

    async with asyncio.TaskGroup() as asking:
        for place, body in enumerate(bodies):
            await asyncio.sleep(max(0.0, began + place / per_second - time.perf_counter()))
            each(place)
            asking.create_task(ask(place, body))
    load.seconds = time.perf_counter() - began
    for connection in idle:
        connection.close()
    return load


async def _in_turns(port: int, bodies: Sequence[Any], clients: int) -> Load:
    load, left = Load(), iter(bodies)

    async def ask_on(connection: _Connection) -> None:
        for body in left:
            await connection.ask(body, load, since=time.perf_counter(), keep=False)
        connection.close()

    connections = [await _Connection.open(port) for _ in range(clients)]
    began = time.perf_counter()
    await asyncio.gather(*map(ask_on, connections))
    load.seconds = time.perf_counter() - began
    return load


class _Connection:
    """One socket, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "_Connection":
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**24))

    async def ask(self, body: Any, load: Load, *, since: float, keep: bool) -> None:
        """Ask for recommendations, and write down what came of it."""
        text = json.dumps(body).encode()
        head = f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        self._writer.write(head.encode() + text)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        content = await self._reader.readexactly(length)
        load.milliseconds.append(1e3 * (time.perf_counter() - since))
        status = int(answer.split(b" ", 2)[1])
        if status != 200:
            load.errors.append(status)
        elif keep:
            load.answers.append(json.loads(content))

    def close(self) -> None:
        """Hang up."""
        self._writer.close()
