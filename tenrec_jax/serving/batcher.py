"""Micro-batching: requests that arrive within a few milliseconds are answered together, by the one thread that owns the recommender.

While a batch is computed the next one gathers, so batches grow with the load and a lone request waits `batch_seconds` at most. Whatever
changes the recommender (`alone`) goes through the same queue: nothing is changed while a batch reads it, and the order is kept.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Generic, TypeVar

from tenrec_jax.errors import UserError
from tenrec_jax.serving.metrics import Metrics

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")


class BusyError(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class BatchOptions:
    """How requests are gathered.

    Attributes:
        max_batch: requests that are answered together at most; 1 answers one by one.
        batch_seconds: how long the oldest of them waits for others.
        max_waiting: requests that may wait for their turn.
        timeout_seconds: how long one may take, its waiting included.
    """

    max_batch: int = 16
    batch_seconds: float = 0.002
    max_waiting: int = 256
    timeout_seconds: float = 5.0


@dataclass(eq=False)
class _Job:
    """What waits: a request, or work that is done alone."""

    asked: float
    request: Any = None
    work: Callable[[], Any] | None = None
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Q, A]):
    """Gathers requests for `answer_all`, which runs in a thread of its own and answers each with a result or its `UserError`."""

    def __init__(
        self, answer_all: Callable[[Sequence[Q]], Sequence[A | UserError]], options: BatchOptions, metrics: Metrics
    ) -> None:
        self._answer_all, self._options, self._metrics = answer_all, options, metrics
        self._waiting: deque[_Job] = deque()
        metrics.waiting.set_function(lambda: len(self._waiting))
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="recommender")

    async def answer(self, request: Q) -> tuple[A, float]:
        """The answer, and the seconds that the request waited.

        Raises:
            UserError: the request cannot be answered.
            BusyError: too many wait already.
            TimeoutError: it took longer than it may; it is dropped if it still waits.
        """
        return await self._done(_Job(self._now(), request=request))

    async def alone(self, work: Callable[[], T]) -> tuple[T, float]:
        """The result of `work`, done in the worker thread while no batch is; as `answer` does."""
        return await self._done(_Job(self._now(), work=work))

    async def change(self, work: Callable[[], T]) -> T:
        """`alone`, for work of the server itself: it waits as long as it must, however many others wait."""
        job = _Job(self._now(), work=work)
        self._add(job)
        return (await job.answer)[0]

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                await self._do(await self._gathered())
        finally:
            self._worker.shutdown(wait=False)

    async def _done(self, job: _Job) -> tuple[Any, float]:
        if len(self._waiting) >= self._options.max_waiting:
            raise BusyError
        self._add(job)
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                return await job.answer
        finally:
            # Of a request that gave up nothing is computed any more.
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def _add(self, job: _Job) -> None:
        self._waiting.append(job)
        self._arrived.set()

    async def _gathered(self) -> list[_Job]:
        """The next jobs that are done together; waits for the first, and for more until that one is due."""
        while not self._waiting:
            await self._arrival()
        while len(self._joined()) == len(self._waiting) < self._options.max_batch and self._waiting[0].work is None:
            try:
                async with asyncio.timeout_at(self._waiting[0].asked + self._options.batch_seconds):
                    await self._arrival()
            except TimeoutError:
                break
            if not self._waiting:
                return []
        joined = self._joined()
        for _ in joined:
            self._waiting.popleft()
        return joined

    async def _arrival(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _joined(self) -> list[_Job]:
        """Those at the front of the queue that can be done together."""
        if self._waiting[0].work is not None:
            return [self._waiting[0]]
        return list(takewhile(lambda job: job.work is None, self._waiting))[: self._options.max_batch]

    async def _do(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        began, work = self._now(), jobs[0].work
        if work is None:
            self._metrics.batch_size.observe(len(jobs))
            done = self._in_worker(self._answer_all, [job.request for job in jobs])
        else:
            done = self._in_worker(lambda: [work()])
        await asyncio.wait([done])
        # An error of the work is the askers' to tell, whatever it is: this loop goes on for the others.
        error = done.exception()
        results = [error] * len(jobs) if error else done.result()
        for job, result in zip(jobs, results, strict=True):
            if job.answer.done():
                continue
            if isinstance(result, BaseException):
                job.answer.set_exception(result)
            else:
                job.answer.set_result((result, began - job.asked))

    def _in_worker(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
