"""What crosses between the two processes: whole, raw, read-only, and without holding anybody up."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import socket
import threading
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import channel
from engine.client import ProcessEngineClient
from engine.messages import (
    AudioClip,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    SamplingParams,
    StepOutputs,
    TokenLogprobs,
)
from tests.reference import noise

SECOND = 16_000


def pipe() -> tuple[Connection, Connection]:
    ours, theirs = multiprocessing.Pipe()
    return ours, theirs  # type: ignore[return-value]


def cross(message: object) -> Any:
    """Send a message and take it off the other end."""
    ours, theirs = pipe()
    with ours, theirs:
        sender = threading.Thread(target=channel.send, args=(ours, message))
        sender.start()
        received = channel.receive(theirs)
        sender.join()
    return received


def request_with(*clips: np.ndarray[Any, Any]) -> EngineRequest:
    frozen = []
    for index, samples in enumerate(clips):
        samples.setflags(write=False)
        frozen.append(AudioClip(samples, f"hash {index}", 5 + index, 1))
    return EngineRequest("a", tuple(range(50)), SamplingParams(8), tuple(frozen))


def test_samples_cross_bit_for_bit_and_read_only() -> None:
    sent = request_with(noise(30 * SECOND, seed=1), noise(SECOND, seed=2), np.zeros(0, np.float32))
    received = cross(sent)
    for before, after in zip(sent.clips, received.clips, strict=True):
        assert after.samples.dtype == np.float32
        assert after.samples.tobytes() == before.samples.tobytes()
        assert not after.samples.flags.writeable
        assert (after.content_hash, after.offset, after.num_tokens) == (
            before.content_hash,
            before.offset,
            before.num_tokens,
        )
    assert received.prompt_token_ids == sent.prompt_token_ids
    assert received.sampling == sent.sampling


def test_samples_are_no_part_of_the_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written from where they are: what is pickled is as small as without them."""
    written: list[memoryview] = []
    sent = request_with(noise(30 * SECOND, seed=1), noise(20 * SECOND, seed=2))

    def collect(_: Any, __: Connection, parts: list[memoryview]) -> None:
        written.extend(parts)

    monkeypatch.setattr(channel, "_transfer", collect)
    ours, theirs = pipe()
    with ours, theirs:
        channel.send(ours, sent)
    *head, first, second = written
    assert sum(part.nbytes for part in head) < 2_000
    for part, clip in zip((first, second), sent.clips, strict=True):
        assert part.nbytes == clip.samples.nbytes
        assert np.shares_memory(np.frombuffer(part, np.uint8), clip.samples)


def test_more_buffers_than_one_system_call_takes_cross_in_order() -> None:
    arrays = [np.full(7, index, np.int32) for index in range(2 * channel.MAX_VECTORS + 3)]
    received = cross(arrays)
    assert [int(array[0]) for array in received] == list(range(len(arrays)))


logprobs = st.builds(
    TokenLogprobs,
    st.integers(0, 10**6),
    st.floats(allow_nan=False),
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(allow_nan=False)), max_size=3).map(tuple),
)
outputs = st.builds(
    EngineOutput,
    request_id=st.text(max_size=40),
    new_token_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | st.integers(0, 2**31),
    num_cached_tokens=st.integers(0, 10**6),
    error=st.none() | st.text(max_size=20),
    index=st.integers(0, 127),
)


@given(st.lists(outputs, max_size=5).map(tuple))
def test_outputs_come_as_they_were_sent(sent: tuple[EngineOutput, ...]) -> None:
    step = StepOutputs(sent, EngineStats(num_running=len(sent)))
    received = cross(step)
    assert received == step
    assert all(isinstance(output.finish_reason, FinishReason | None) for output in received.outputs)


def test_a_step_of_many_outputs_is_one_small_message() -> None:
    step = StepOutputs(tuple(EngineOutput(f"{index:032d}", (index,)) for index in range(64)), EngineStats())
    ours, theirs = pipe()
    with ours, theirs:
        with socket.socket(fileno=theirs.fileno()) as reader:
            channel.send(ours, step)
            raw = reader.recv(1 << 20)
            reader.detach()
        num_buffers, length = channel._PREFIX.unpack(raw[: channel._PREFIX.size])
        assert num_buffers == 0
        assert len(raw) == channel._PREFIX.size + length
        assert len(raw) < 80 * 64
        assert pickle.loads(raw[channel._PREFIX.size :]) == step


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_an_end_that_goes_away_is_told(cut: int) -> None:
    ours, theirs = pipe()
    whole: list[bytes] = []
    with ours, theirs:
        channel.send(ours, StepOutputs((EngineOutput("a", (1,)),), EngineStats()))
        with socket.socket(fileno=theirs.fileno()) as reader:
            whole.append(reader.recv(1 << 16))
            reader.detach()
    ours, theirs = pipe()
    with theirs:
        with ours, socket.socket(fileno=ours.fileno()) as writer:
            writer.sendall(whole[0][:cut])
            writer.detach()
        with pytest.raises((EOFError, OSError)):
            channel.receive(theirs)
        with pytest.raises(BrokenPipeError):
            channel.send(theirs, EngineStats())


def test_a_full_pipe_does_not_hold_up_the_event_loop() -> None:
    """An engine that takes nothing off the pipe: clips wait in a thread, the loop goes on, and nothing is lost."""
    info = EngineInfo(256, 600, "cpu", "float32", "", "reference", "", 100, 16, 8, 64, "", 0.0)
    ending = {"kill": lambda: None, "join": lambda timeout=None: None, "is_alive": lambda: False}
    process = SimpleNamespace(pid=os.getpid(), exitcode=0, **ending)
    num_requests = 8

    async def main() -> None:
        ours, theirs = pipe()
        client = ProcessEngineClient(process, ours, info)  # type: ignore[arg-type]
        longest = 0.0
        tasks = []
        for number in range(num_requests):
            request = request_with(noise(30 * SECOND, seed=number))
            started = time.perf_counter()
            generator = client.generate(EngineRequest(str(number), (1,), request.sampling, request.clips))
            tasks.append(asyncio.create_task(anext(generator)))  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
            longest = max(longest, time.perf_counter() - started)
        assert longest < 0.5, "15 MB do not fit the pipe, so somebody waited for it"
        taken = [await asyncio.to_thread(channel.receive, theirs) for _ in range(num_requests)]
        assert [request.request_id for request in taken] == [str(number) for number in range(num_requests)]
        for request in taken:
            channel.send(theirs, StepOutputs((EngineOutput(request.request_id, (7,)),), EngineStats()))
        async with asyncio.timeout(10):
            assert [output.new_token_ids for output in await asyncio.gather(*tasks)] == [(7,)] * num_requests
        theirs.close()
        await client.close()

    asyncio.run(main())
