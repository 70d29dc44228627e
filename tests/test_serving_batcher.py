"""The queue before the recommender: what is answered together, in what order, and what is given up."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tenrec_jax.errors import UserError
from tenrec_jax.serving.batcher import Batcher, BatchOptions, BusyError
from tenrec_jax.serving.metrics import Metrics


class Squares:
    """Squares numbers, as slowly as `gate` lets it; keeps the batches and the threads that it saw."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> list[int | UserError]:
        self.batches.append(list(numbers))
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        if 13 in numbers:
            raise ZeroDivisionError
        return [number**2 if number >= 0 else UserError(f"{number} is negative") for number in numbers]


def run(test: Callable[[Batcher, Squares], Awaitable[None]], **options: Any) -> Squares:
    squares = Squares()

    async def with_batcher() -> None:
        batcher: Batcher[int, int] = Batcher(squares, BatchOptions(**options), Metrics())
        working = asyncio.create_task(batcher.run())
        await test(batcher, squares)
        working.cancel()

    asyncio.run(with_batcher())
    return squares


async def asked(batcher: Batcher, *numbers: int) -> list[Any]:
    found = await asyncio.gather(*(batcher.answer(number) for number in numbers), return_exceptions=True)
    return [each if isinstance(each, BaseException) else each[0] for each in found]


def test_what_arrives_together_is_answered_together_up_to_the_largest_batch_and_in_order():
    async def test(batcher, _):
        assert await asked(batcher, *range(10)) == [number**2 for number in range(10)]

    assert run(test, max_batch=4).batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_one_by_one_where_the_largest_batch_is_1():
    async def test(batcher, _):
        assert await asked(batcher, 1, 2, 3) == [1, 4, 9]

    assert run(test, max_batch=1).batches == [[1], [2], [3]]


def test_a_full_batch_does_not_wait_and_a_lone_request_waits_no_longer_than_it_should():
    async def test(batcher, _):
        await asked(batcher, 1, 2)

    assert run(test, max_batch=2, batch_seconds=3600, timeout_seconds=3600).batches == [[1, 2]]

    async def alone(batcher, _):
        _, waited = await batcher.answer(1)
        assert waited >= 0.01

    run(alone, max_batch=2, batch_seconds=0.01)


def test_a_wrong_request_harms_no_other_and_a_defect_harms_its_batch_alone():
    async def test(batcher, _):
        one, wrong, two = await asked(batcher, 1, -1, 2)
        assert (one, two, str(wrong)) == (1, 4, "-1 is negative")
        assert all(isinstance(each, ZeroDivisionError) for each in await asked(batcher, 1, 13))
        assert await asked(batcher, 3) == [9]

    run(test)


def test_while_a_batch_is_computed_the_next_gathers_and_too_many_are_told_to_come_again():
    async def test(batcher, squares):
        squares.gate.clear()
        first = asyncio.create_task(asked(batcher, 0))
        while not squares.batches:
            await asyncio.sleep(0)
        waiting = [asyncio.create_task(batcher.answer(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher.answer(4)
        # What the server itself has to do is never turned away.
        changing = asyncio.create_task(batcher.change(lambda: "changed"))
        await asyncio.sleep(0)
        squares.gate.set()
        assert [(await each)[0] for each in waiting] == [1, 4, 9]
        assert (await first, await changing) == ([0], "changed")

    assert run(test, max_waiting=3).batches == [[0], [1, 2, 3]]


def test_a_request_that_took_too_long_is_given_up_and_not_computed():
    async def test(batcher, squares):
        squares.gate.clear()
        errors = await asked(batcher, 0, 1)
        squares.gate.set()
        assert all(isinstance(error, TimeoutError) for error in errors)
        assert await asked(batcher, 2) == [4]

    assert run(test, max_batch=1, timeout_seconds=0.05).batches == [[0], [2]]


def test_what_is_done_alone_keeps_its_place_and_runs_in_the_same_one_thread():
    async def test(batcher, squares):
        def add():
            squares.threads.add(threading.current_thread().name)
            squares.batches.append([-1])

        work = [batcher.answer(1), batcher.answer(2), batcher.alone(add), batcher.answer(3), batcher.answer(4)]
        await asyncio.gather(*work)
        with pytest.raises(UserError, match="refused"):
            await batcher.alone(refuse)

    squares = run(test)
    assert squares.batches == [[1, 2], [-1], [3, 4]]
    assert len(squares.threads) == 1


def refuse() -> None:
    raise UserError("refused")
