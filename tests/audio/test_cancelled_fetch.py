"""Fetches that are cancelled at any moment leave no connection, and no place in the pool is lost."""

from __future__ import annotations

import asyncio
import random

from audio import AudioLimits, FetchPolicy
from audio.fetch import MediaFetcher
from benchmarks.aborts import stalled_server

NUM_ROUNDS = 40
AT_ONCE = 8


def test_cancelled_fetches_leave_nothing_open() -> None:
    rng = random.Random(0)

    async def main() -> None:
        async with stalled_server() as (url, connections):
            policy = FetchPolicy(allowed_private_hosts=frozenset({"127.0.0.1"}))
            fetcher = MediaFetcher(policy, AudioLimits())

            async def begin_and_leave() -> None:
                task = asyncio.create_task(fetcher.fetch(f"{url}/a.wav"))
                for _ in range(rng.randrange(1, 14)):  # turns of the loop: connecting takes about ten
                    await asyncio.sleep(0)
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.004)
                task.cancel()
                await asyncio.wait([task])

            for _ in range(NUM_ROUNDS):
                await asyncio.gather(*(begin_and_leave() for _ in range(AT_ONCE)))
            async with asyncio.timeout(5):
                while connections:
                    await asyncio.sleep(0.05)
            await fetcher.aclose()

    asyncio.run(main())
