"""Clients that leave and clients that are too many: with the bundled checkpoint, and nothing of them stays."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from benchmarks.aborts import cycle, make_kinds, run, settings_of, stalled_server
from benchmarks.inside import inside

NUM_CYCLES = 250
TIMES_CAPACITY = 50


def test_whoever_leaves_at_any_stage_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with stalled_server() as (stalled, connections), inside(settings_of()) as server:
            await run(server, stalled, 60, 8, 60)
            await asyncio.sleep(1.0)
            before = server.holdings()
            task = asyncio.create_task(cycle(server.url, make_kinds(stalled)[1], "whole", random.Random(0)))
            seen: set[str] = set()
            while not task.done():
                seen |= (await server.settle(before, 0.0)).keys()
                await asyncio.sleep(0.005)
            assert {"num_in_flight", "num_at_work", "num_fds"} <= seen, "the looking glass is blind"
            assert await task == "200"
            counts = await run(server, stalled, NUM_CYCLES, 8, 60)
            assert await server.settle(before) == {}
            assert counts["cycles"] == NUM_CYCLES
            assert counts["answering: left"] > 20
            assert counts["whole: 200"] > 20
            assert not connections, "a fetch goes on for nobody"
            server.engine.check_health()

    asyncio.run(main())


def test_fifty_times_the_capacity_takes_no_memory_and_those_let_in_are_served() -> None:
    """Places: 4 that run and 4 that wait. The others are told while the first are still being served."""
    settings = settings_of(max_num_queued_reqs=4).model_copy(update={"max_num_seqs": 4})

    async def main() -> None:
        async with stalled_server() as (stalled, _), inside(settings) as server:
            kind = make_kinds(stalled)[3]
            assert await cycle(server.url, kind, "whole", random.Random(0)) == "200"
            await asyncio.sleep(1.0)
            before, rss_before = server.holdings(), server.rss_mib()
            refused_after: list[float] = []
            served_after: list[float] = []

            async def ask(number: int) -> str:
                started = time.monotonic()
                status = await cycle(server.url, kind, "whole", random.Random(number))
                (served_after if status == "200" else refused_after).append(time.monotonic() - started)
                return status

            statuses = Counter(await asyncio.gather(*map(ask, range(TIMES_CAPACITY * 4))))
            assert set(statuses) == {"200", "503"}
            assert statuses["200"] >= 8
            assert statuses["503"] > TIMES_CAPACITY
            assert sorted(refused_after)[len(refused_after) // 2] < min(served_after)
            growth = sum(server.rss_mib().values()) - sum(rss_before.values())
            assert growth < 100, f"{growth:.0f} MiB"
            assert await server.settle(before) == {}

    asyncio.run(main())
