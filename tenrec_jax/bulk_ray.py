"""Parts of bulk recommendations made by workers of Ray. A worker holds the recommender, and one that dies is started again."""

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import ray

from tenrec_jax.bulk import Question, write_part
from tenrec_jax.data.ray_engine import session
from tenrec_jax.errors import UserError
from tenrec_jax.recommender import Recommender


class _Worker:
    """Makes parts, one after the other."""

    def __init__(self, folder: Path, out: Path, question: Question) -> None:
        self._recommender, self._out, self._question = Recommender.load(folder), out, question
        if self._recommender.version != question.version:
            raise UserError(f"{folder} is another recommender than a moment ago: {self._recommender.version}.")

    def part(self, number: int) -> int:
        """Makes the part of a number."""
        return write_part(self._recommender, self._out, number, self._question)


def made_by_ray(left: list[int], folder: Path, out: Path, question: Question) -> Iterator[int]:
    """Make parts on the session of Ray that this process has, or as `session` opens one; yields the users of each as it is done."""
    with tempfile.TemporaryDirectory() as scratch, nullcontext() if ray.is_initialized() else session(Path(scratch)):
        number = min(len(left), max(1, int(ray.cluster_resources().get("CPU", 1))))
        kind = ray.remote(_Worker).options(num_cpus=1, max_restarts=3, max_task_retries=3)
        workers = [kind.remote(folder, out, question) for _ in range(number)]
        pool = ray.util.ActorPool(workers)
        yield from pool.map_unordered(lambda worker, part: worker.part.remote(part), left)
