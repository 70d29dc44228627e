"""Servers that run in a thread of the test's process, on a free port of this machine."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tenrec_jax.serving.app import create_app
from tenrec_jax.serving.batcher import BatchOptions
from tenrec_jax.serving.guard import Limits
from tenrec_jax.serving.server import listening, make_server
from tenrec_jax.serving.service import ServeOptions

DEADLINE = 120
# Requests stay in the queue, where a test can find them.
NEVER = 3600.0


@dataclass(frozen=True)
class Served:
    """A server's address, a client of it, and what its background tasks failed with."""

    client: httpx.Client
    port: int
    failures: list[BaseException]
    server: uvicorn.Server


@contextmanager
def served(
    folder: Path, *, ready: bool = True, limits: Limits | None = None, watch_seconds: float = NEVER, **batch: Any
) -> Iterator[Served]:
    """A server of a recommender's folder, which has loaded it where `ready`. Batches of 1 are the quickest to compile."""
    options = ServeOptions(folder, BatchOptions(**{"max_batch": 1, **batch}), limits or Limits(), watch_seconds)
    failures: list[BaseException] = []
    server = make_server(create_app(options, failures.append), options)
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        port = listener.getsockname()[1]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client:
                if ready:
                    until(lambda: client.get("/readyz").status_code == 200 or failures)
                yield Served(client, port, failures, server)
        finally:
            server.should_exit = True
            thread.join(DEADLINE)


def until(condition: Any) -> Any:
    """Wait for something to become true."""
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)
    return found


def metric(client: httpx.Client, name: str) -> float:
    """The value of a metric, with its labels as Prometheus writes them; 0 before it was counted."""
    lines = (line.rpartition(" ") for line in client.get("/metrics").text.splitlines())
    return next((float(value) for key, _, value in lines if key == name), 0.0)
