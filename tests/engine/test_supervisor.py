"""Engines that die, hang or cannot be started again: what requests see, when there is another try, and the end."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine import supervisor
from engine.client import EngineClient, InlineEngineClient, ProcessEngineClient
from engine.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineRestartingError,
    EngineStartError,
    TimeLimitError,
)
from engine.messages import EngineArgs, EngineInfo
from engine.supervisor import RestartPolicy, SupervisedEngineClient
from tests.reference import Prompt

SHORT = Prompt.of(5, 6, 7)
ENDLESS: dict[str, Any] = {"max_tokens": 10_000}


class _Process:
    """An engine that is as alive as the test says."""

    def __init__(self, max_model_len: int = 100) -> None:
        self.info = EngineInfo(max_model_len, 600, "cpu", "float32", "", "", "", 10, 16, 8, 512, "", 0.0)
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.num_finished = self.num_messages = self.num_in_flight = self.num_closed = 0
        self.stirs = True

    async def wait_dead(self) -> str:
        return await asyncio.shield(self.death)

    def kill(self, reason: str) -> None:
        self.death.set_result(reason)

    def has_stirred(self) -> bool:
        return self.stirs

    def check_health(self) -> None:
        if self.death.done():
            raise EngineDeadError(self.death.result())

    async def close(self) -> None:
        self.num_closed += 1


class _Starts:
    """What the supervisor calls: as many engines as it likes, or failures."""

    def __init__(self, *failures: Exception | None) -> None:
        self.engines: list[_Process] = []
        self.failures = list(failures)
        self.max_model_len = 100

    async def __call__(self) -> Any:
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self.engines.append(_Process(self.max_model_len))
        return self.engines[-1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.02)


def supervise(
    starts: _Starts,
    test: Callable[[SupervisedEngineClient], Awaitable[None]],
    policy: RestartPolicy = RestartPolicy(),  # noqa: B008
) -> None:
    async def main() -> None:
        client = await SupervisedEngineClient.launch(starts, policy)
        try:
            await asyncio.wait_for(test(client), 60)
        finally:
            await client.close()

    asyncio.run(main())


async def until(is_so: Callable[[], Any], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("quick")
def test_a_dead_engine_is_replaced_and_meanwhile_nobody_is_told_that_all_is_well() -> None:
    starts = _Starts(None, EngineStartError("no memory yet"), OSError("no process"))

    async def test(client: SupervisedEngineClient) -> None:
        told: list[int] = []
        client.on_restart = lambda: told.append(client.num_restarts)
        client.check_health()
        starts.engines[0].kill("a bug")
        with pytest.raises(EngineRestartingError):
            client.check_health()
        await until(lambda: len(starts.engines) == 2 and serves(client))
        client.check_health()
        assert client.num_restarts == 3
        assert told == [1, 2, 3]
        assert starts.engines[0].num_closed == 1

    supervise(starts, test)


@pytest.mark.usefixtures("quick")
def test_pauses_double_until_an_engine_has_finished_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, pauses, sleep = _Starts(), [], asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.extend([seconds] if seconds >= 0.03 else [])  # nobody else sleeps so long
        await sleep(seconds)

    async def test(client: SupervisedEngineClient) -> None:
        monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.03)
        monkeypatch.setattr(asyncio, "sleep", note)
        for number in range(5):
            engine = starts.engines[-1]
            engine.num_finished = int(number in (0, 4))
            engine.kill("again")
            await until(lambda engine=engine: starts.engines[-1] is not engine)  # type: ignore[misc]
        assert pauses == [0.03, 0.06, 0.12, 0.24, 0.03]

    supervise(starts, test)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("max_restarts", [0, 2])
def test_too_many_deaths_are_the_end_and_the_last_reason_is_told(max_restarts: int) -> None:
    starts = _Starts(None, None, EngineStartError("the device is gone"))

    async def test(client: SupervisedEngineClient) -> None:
        starts.engines[0].kill("first")
        if max_restarts:
            await until(lambda: len(starts.engines) == 2)
            await asyncio.sleep(0.01)
            starts.engines[1].kill("second")
        assert await client.wait_dead() == ("the device is gone" if max_restarts else "first")
        with pytest.raises(EngineDeadError) as caught:
            client.check_health()
        assert not isinstance(caught.value, EngineRestartingError)

    supervise(starts, test, RestartPolicy(max_restarts))


@pytest.mark.usefixtures("quick")
def test_old_restarts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WINDOW_SECONDS", 0.0)
    starts = _Starts()

    async def test(client: SupervisedEngineClient) -> None:
        for number in range(1, 4):
            starts.engines[-1].num_finished = 1
            starts.engines[-1].kill("again")
            await until(lambda number=number: client.num_restarts == number and serves(client))  # type: ignore[misc]

    supervise(starts, test, RestartPolicy(max_restarts=1))


@pytest.mark.usefixtures("quick")
def test_only_silence_under_work_is_a_hang() -> None:
    starts = _Starts()

    async def test(client: SupervisedEngineClient) -> None:
        engine = starts.engines[0]
        await asyncio.sleep(1.2)  # nothing to do
        engine.num_in_flight = 1
        for _ in range(40):  # slow, but alive
            await asyncio.sleep(0.03)
            engine.num_messages += 1
        assert not engine.death.done()
        await until(engine.death.done)
        assert "hung" in engine.death.result()
        await until(lambda: len(starts.engines) == 2)

    supervise(starts, test, RestartPolicy(hang_timeout_s=1.0))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("hang_timeout_s", [300.0, 0.0])
def test_a_still_engine_is_given_less_time_than_one_that_computes(
    hang_timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STILL_LIMIT_SECONDS", 0.2)
    starts = _Starts()

    async def test(client: SupervisedEngineClient) -> None:
        engine = starts.engines[0]
        engine.stirs = False
        await asyncio.sleep(0.4)  # nothing to do
        engine.num_in_flight = 1
        engine.stirs = True
        await asyncio.sleep(0.4)  # a long step
        assert not engine.death.done()
        engine.stirs = False
        if hang_timeout_s:
            await until(engine.death.done)
            assert "hung" in engine.death.result()
        else:
            await asyncio.sleep(0.5)
            assert not engine.death.done()

    supervise(starts, test, RestartPolicy(hang_timeout_s=hang_timeout_s))


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_not_what_the_server_was_built_for_does_not_serve() -> None:
    starts = _Starts()

    async def test(client: SupervisedEngineClient) -> None:
        starts.max_model_len = 50
        starts.engines[0].kill("the checkpoint was replaced")
        assert "changed" in await client.wait_dead()
        assert all(engine.num_closed for engine in starts.engines)

    supervise(starts, test, RestartPolicy(max_restarts=1))


def serves(client: SupervisedEngineClient) -> bool:
    try:
        client.check_health()
    except EngineRestartingError:
        return False
    return True


def with_real(folder: Path, test: Callable[[SupervisedEngineClient], Awaitable[None]], **policy: Any) -> None:
    start = partial(ProcessEngineClient.start, args_of(folder))

    async def main() -> None:
        client = await SupervisedEngineClient.launch(start, RestartPolicy(**policy))
        try:
            await asyncio.wait_for(test(client), 100)
        finally:
            await client.close()

    asyncio.run(main())


def args_of(folder: Path) -> EngineArgs:
    return EngineArgs(str(folder), device="cpu", num_threads=1, max_model_len=4000)


async def collect(client: EngineClient, name: str, **params: Any) -> list[int]:
    return [
        token async for output in client.generate(SHORT.request(name, **params)) for token in output.new_token_ids
    ]


def test_killed_and_hung_engines_end_their_requests_and_the_next_ones_answer_alike(
    gqa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.25)

    async def test(client: SupervisedEngineClient) -> None:
        expected, info = await collect(client, "before", max_tokens=8), client.info
        pids, fds = set(), []
        for number in (signal.SIGKILL, signal.SIGSTOP):
            tasks = [asyncio.create_task(collect(client, str(index), **ENDLESS)) for index in range(3)]
            await until(lambda: client.stats.num_running == 3)
            pid = client._client.process.pid
            assert pid is not None
            pids.add(pid)
            os.kill(pid, number)
            failed = time.monotonic()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
            assert time.monotonic() - failed < 30  # 3 to 4 on a machine with nothing else to do
            with pytest.raises(EngineDeadError):
                await collect(client, "meanwhile", max_tokens=8)
            await until(lambda: serves(client), 60)
            assert not psutil.pid_exists(pid)
            assert await collect(client, "after", max_tokens=8) == expected
            assert (client.info.max_model_len, client.info.num_blocks) == (info.max_model_len, info.num_blocks)
            gc.collect()
            fds.append(psutil.Process().num_fds())
        assert client.num_restarts == len(pids) == 2
        assert fds[0] == fds[-1], f"each restart leaves a file descriptor: {fds}"

    with_real(gqa_folder, test)


def test_closing_in_the_middle_of_a_restart_leaves_no_process(gqa_folder: Path) -> None:
    async def test(client: SupervisedEngineClient) -> None:
        assert client._client.process.pid is not None
        os.kill(client._client.process.pid, signal.SIGKILL)
        await until(lambda: client.num_restarts)
        await asyncio.sleep(supervisor.FIRST_PAUSE_SECONDS + 0.5)
        await client.close()
        with pytest.raises(EngineClosedError):
            client.check_health()

    with_real(gqa_folder, test)
    assert not [child for child in multiprocessing.active_children() if child.name == "tympan-engine"]


def test_a_request_whose_time_is_up_is_aborted(gqa_folder: Path) -> None:
    async def main() -> None:
        client = await InlineEngineClient.start(args_of(gqa_folder))
        with pytest.raises(TimeLimitError, match=r"0\.3 s"):
            async for _ in client.generate(_limited("late", 0.3, **ENDLESS)):
                pass
        assert [output async for output in client.generate(_limited("early", 30, max_tokens=3))]
        await until(lambda: not client.stats.num_running and not client.stats.kv_cache_usage)
        await client.close()

    asyncio.run(main())


def _limited(name: str, time_limit_s: float, **params: Any) -> Any:
    return dataclasses.replace(SHORT.request(name, **params), time_limit_s=time_limit_s)
