"""The recommender that answers now, and its replacement while requests come in.

The folder may be a link. When what it holds changes, the new recommender is loaded and compiled in the background, takes over what was
observed meanwhile, and is put in place between two micro-batches: every answer comes from one version, and none waits for the loading.
"""

import asyncio
import dataclasses
import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenrec_jax.artifact import MANIFEST
from tenrec_jax.data.interactions import RawId
from tenrec_jax.errors import UserError
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Event, Recommendations, Request, RequestError
from tenrec_jax.sealed import files_in
from tenrec_jax.serving.batcher import Batcher
from tenrec_jax.serving.metrics import Metrics
from tenrec_jax.settings import SettingsError

LOG = logging.getLogger("tenrec_jax.serving")
# Of each file: its name, size and time of change. None where there is no recommender.
Signature = tuple[tuple[str, int, int], ...] | None


class NotReadyError(Exception):
    """No recommender is loaded yet."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of which the rules that it does not give are those of the recommender that will answer it."""

    user_id: RawId | None
    history: tuple[Event | RawId, ...] | None
    k: int
    rules: Mapping[str, Any]
    action_values: Mapping[str, float]
    explain: bool

    def request(self, recommender: Recommender) -> Request | RequestError:
        """As a recommender reads it, or what is wrong with its rules."""
        usual = recommender.rules
        try:
            values = dataclasses.replace(usual.action_values, **self.action_values)
        except SettingsError as error:
            return _wrong("rules.action_values", error)
        try:
            rules = dataclasses.replace(usual, action_values=values, **self.rules)
        except SettingsError as error:
            return _wrong("rules", error)
        return Request(self.user_id, self.history, self.k, rules, self.explain)


def _wrong(field: str, error: SettingsError) -> RequestError:
    name, problem = error.problems[0]
    return RequestError(f"{field}.{name}".removesuffix("."), problem)


class Live:
    """Loads the recommender of a folder, and the next one when the folder changes.

    Args:
        folder: that of the recommender, or a link to it.
        batch_sizes: what is compiled before a recommender is put in place.
    """

    def __init__(self, folder: Path, metrics: Metrics, batch_sizes: Sequence[int]) -> None:
        self._folder, self._metrics, self._batch_sizes = folder, metrics, tuple(batch_sizes)
        self._recommender: Recommender | None = None
        self._seen: Signature = None
        self.loaded_at = ""
        self.directory = folder

    @property
    def recommender(self) -> Recommender:
        """The one that answers. Only the worker thread may call what computes or changes.

        Raises:
            NotReadyError: none is loaded yet.
        """
        if self._recommender is None:
            raise NotReadyError
        return self._recommender

    def answer(self, asked: Sequence[Asked]) -> list[Recommendations | UserError]:
        """One micro-batch, by one version."""
        recommender = self.recommender
        requests = [each.request(recommender) for each in asked]
        found = iter(recommender.answer([each for each in requests if isinstance(each, Request)]))
        return [next(found) if isinstance(each, Request) else each for each in requests]

    async def start(self) -> None:
        """Load the first recommender.

        Raises:
            UserError: the folder holds none that can be loaded.
        """
        self._seen = await asyncio.to_thread(signature, self._folder)
        directory = self._folder.resolve()
        self._put(await asyncio.to_thread(self._loaded, directory), directory)

    async def watch(self, batcher: Batcher, seconds: float) -> None:
        """Look at the folder every so often, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.look(batcher)

    async def look(self, batcher: Batcher) -> None:
        """Replace the recommender if the folder holds another one. One that cannot be loaded is told, and tried again once it changes."""
        seen = await asyncio.to_thread(signature, self._folder)
        if seen == self._seen:
            return
        self._seen, directory = seen, self._folder.resolve()
        replacing = asyncio.ensure_future(self._replaced(batcher, directory))
        await asyncio.wait([replacing])
        # Whatever is wrong with the new one, the old one goes on answering.
        error = replacing.exception()
        if error is not None:
            self._metrics.refused.set(1)
            self._metrics.swaps.labels("refused").inc()
            LOG.error("the recommender now in %s is refused, version %s stays: %s", directory, self.recommender.version,
                      error, exc_info=None if isinstance(error, UserError | OSError) else error)  # fmt: skip

    async def _replaced(self, batcher: Batcher, directory: Path) -> None:
        new = await asyncio.to_thread(self._loaded, directory)
        self._metrics.refused.set(0)  # before it answers: nobody sees the new version refused
        if new.version != self.recommender.version:
            await batcher.change(lambda: self._take_over(new, directory))
            self._metrics.swaps.labels("done").inc()

    def _loaded(self, directory: Path) -> Recommender:
        began = time.perf_counter()
        recommender = Recommender.load(directory)
        recommender.warm(self._batch_sizes)
        LOG.info("version %s is loaded and warm after %.1f s", recommender.version, time.perf_counter() - began)
        return recommender

    def _take_over(self, new: Recommender, directory: Path) -> None:
        new.adopt(self.recommender)
        self._metrics.recommender.remove(self.recommender.version)
        self._put(new, directory)

    def _put(self, recommender: Recommender, directory: Path) -> None:
        self._recommender, self.directory = recommender, directory
        self.loaded_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._metrics.recommender.labels(recommender.version).set(1)
        self._metrics.loaded.set(time.time())
        self._metrics.ready.set(1)
        LOG.info("version %s of %s answers", recommender.version, directory)


def signature(folder: Path) -> Signature:
    """What tells a recommender from another without reading it; None where there is none, or while it is being changed."""
    directory = folder.resolve()
    try:
        if not (directory / MANIFEST).is_file():
            return None
        facts = ((name, (directory / name).stat()) for name in files_in(directory))
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in facts)
    except FileNotFoundError:
        return None
