"""What the routes work with: the live recommender, the queue before it, the numbers, and the tasks in the background."""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tenrec_jax.requests import Recommendations
from tenrec_jax.serving.batcher import Batcher, BatchOptions
from tenrec_jax.serving.guard import Limits
from tenrec_jax.serving.live import Asked, Live
from tenrec_jax.serving.metrics import Metrics
from tenrec_jax.user_states import BATCH_SIZES


@dataclass(frozen=True)
class ServeOptions:
    """How a recommender is served.

    Attributes:
        folder: of the recommender, or a link to it.
        batch: how requests are gathered. limits: what a client may ask.
        watch_seconds: how often the folder is looked at for another recommender.
    """

    folder: Path
    batch: BatchOptions = field(default_factory=BatchOptions)
    limits: Limits = field(default_factory=Limits)
    watch_seconds: float = 5.0


class Service:
    """One server's parts.

    Args:
        on_failure: called with the error if a task in the background ends, after which nothing would be answered any more.
    """

    def __init__(self, options: ServeOptions, on_failure: Callable[[BaseException], None]) -> None:
        self._options, self._on_failure = options, on_failure
        self.metrics = Metrics()
        # All sizes to which batches are padded, up to the one that holds the largest.
        sizes = BATCH_SIZES[: 1 + bisect_left(BATCH_SIZES, options.batch.max_batch)]
        self.live = Live(options.folder, self.metrics, sizes)
        self.batcher: Batcher[Asked, Recommendations] = Batcher(self.live.answer, options.batch, self.metrics)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load the recommender, watch its folder and answer, until the context ends."""
        tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self._load_and_watch())]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _load_and_watch(self) -> None:
        await self.live.start()
        await self.live.watch(self.batcher, self._options.watch_seconds)

    def _ended(self, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
