"""The pool: never wider than asked, nothing drawn early, the first failure ends it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tympan.batch_run import ByteBudget
from tympan.pool import run_pool


@given(count=st.integers(0, 40), width=st.integers(1, 8), yields=st.lists(st.integers(0, 5), min_size=1))
def test_every_item_once_and_so_many_at_once(count: int, width: int, yields: list[int]) -> None:
    done: list[int] = []
    drawn = busy = 0

    async def items() -> AsyncIterator[int]:
        nonlocal drawn
        for item in range(count):
            drawn += 1
            assert drawn - len(done) <= width
            yield item

    async def work(item: int) -> None:
        nonlocal busy
        busy += 1
        assert busy <= width
        for _ in range(yields[item % len(yields)]):
            await asyncio.sleep(0)
        busy -= 1
        done.append(item)

    asyncio.run(run_pool(items(), work, width))
    assert sorted(done) == list(range(count))


def test_an_item_is_let_go_when_its_work_is_done() -> None:
    class Item:
        """A request of megabytes, say."""

    alive: weakref.WeakSet[Item] = weakref.WeakSet()

    async def items() -> AsyncIterator[Item]:
        for _ in range(50):
            assert len(alive) == 0
            item = Item()
            alive.add(item)
            yield item
            del item

    async def work(_: Item) -> None:
        await asyncio.sleep(0)

    asyncio.run(run_pool(items(), work, 1))
    assert not alive


def test_the_first_failure_cancels_the_rest() -> None:
    cancelled = []

    async def items() -> AsyncIterator[int]:
        for item in range(100):
            yield item

    async def work(item: int) -> None:
        if item == 2:
            raise ZeroDivisionError
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_pool(items(), work, 3))
    assert sorted(cancelled) == [0, 1]


@given(sizes=st.lists(st.integers(0, 20), max_size=30))
def test_bytes_in_flight_are_bounded_and_a_large_one_goes_alone(sizes: list[int]) -> None:
    async def run() -> None:
        budget = ByteBudget(10)
        held: list[int] = []

        async def one(size: int) -> None:
            await budget.take(size)
            held.append(size)
            assert sum(held) <= 10 or sum(held) == max(held)
            await asyncio.sleep(0)
            held.remove(size)
            await budget.give(size)

        await asyncio.wait_for(asyncio.gather(*map(one, sizes)), 5)

    asyncio.run(run())
