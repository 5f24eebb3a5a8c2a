"""Two ranks over gloo: the same tokens as one, however run; and no rank outlives another."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine.memory
import engine.workers
from engine.client import InlineEngineClient, ProcessEngineClient
from engine.core import EngineCore
from engine.device import resolve_device
from engine.errors import EngineDeadError, EngineStartError, RankError
from engine.memory import num_kv_blocks
from engine.messages import EngineArgs, EngineOutput, EngineRequest
from engine.model_runner import ModelRunner
from engine.workers import Workers
from model.config import TextConfig
from model.kv_cache import bytes_per_block
from model.parallel import Shard
from tests.engine.test_parity import PROMPTS, args_of, request_of
from tests.ranks import on_ranks

LONG = 900
"""Tokens of an answer that is not over before something happens to a rank."""


def mixed_requests() -> list[EngineRequest]:
    """Each prompt greedily, and one with audio in all the ways of sampling."""
    audio = "two audios in one message"
    return [
        *(request_of(name) for name in PROMPTS),
        replace(request_of(audio, repetition_penalty=1.3, presence_penalty=0.5), request_id="penalties"),
        replace(request_of(audio, frequency_penalty=0.7, logit_bias=((17, 3.0),)), request_id="biases"),
        replace(request_of(audio, temperature=1.0, seed=7), request_id="sampled", n=3),
        replace(request_of(audio, temperature=0.8, top_p=0.9, top_k=50, seed=8), request_id="top"),
        replace(request_of(audio, logprobs=5), request_id="logprobs", priority=-1),
        replace(
            request_of("no audio", min_tokens=0, grammar="start: /(yes|no|nobody) +[a-z]+/"), request_id="grammar"
        ),
    ]


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[Any, list[EngineOutput]]:
    """All outputs of each choice."""
    outputs: dict[Any, list[EngineOutput]] = {}
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step():
            assert output.error is None
            outputs.setdefault(output.sequence_id, []).append(output)
        core.scheduler.check_integrity()
    return outputs


def tokens_of(outputs: dict[Any, list[EngineOutput]]) -> dict[Any, list[int]]:
    return {key: [token for output in given for token in output.new_token_ids] for key, given in outputs.items()}


@pytest.fixture(scope="module")
def alone(gqa_folder: Path) -> dict[Any, list[EngineOutput]]:
    """What one rank gives."""
    return run(EngineCore.build(args_of(gqa_folder, max_num_batched_tokens=64)), mixed_requests())


def two_ranks(folder: Path, **changes: Any) -> EngineArgs:
    changes = {"tensor_parallel_size": 2, "num_threads": 2, "rank_timeout_s": 60.0, **changes}
    return args_of(folder, **changes)


@asynccontextmanager
async def served(args: EngineArgs) -> AsyncIterator[ProcessEngineClient]:
    client = await ProcessEngineClient.start(args)
    try:
        yield client
    finally:
        await client.close()


def test_two_ranks_in_processes_of_their_own(gqa_folder: Path, alone: dict[Any, list[EngineOutput]]) -> None:
    """Batched, chunked, sampled, with aborts in between; then a prompt that the prefix cache has."""

    async def collect(client: ProcessEngineClient, request: EngineRequest) -> list[EngineOutput]:
        return [output async for output in client.generate(request)]

    async def give_up_soon(client: ProcessEngineClient, name: str) -> None:
        outputs = client.generate(replace(request_of(name, max_tokens=LONG), request_id=f"given up: {name}"))
        async for _ in outputs:
            break
        await outputs.aclose()

    async def main() -> tuple[list[EngineOutput], list[EngineOutput], str]:
        async with served(two_ranks(gqa_folder, max_num_batched_tokens=64)) as client:
            first = await asyncio.gather(
                *(collect(client, request) for request in mixed_requests()),
                *(give_up_soon(client, name) for name in ("7.3 s", "no audio")),
            )
            again = await collect(client, request_of("30 s"))
            return [output for given in first if given for output in given], again, client.info.device

    outputs, again, device = asyncio.run(main())
    ours: dict[Any, list[EngineOutput]] = {}
    for output in outputs:
        ours.setdefault(output.sequence_id, []).append(output)
    assert tokens_of(ours) == tokens_of(alone)
    for ours_at, theirs_at in zip(ours["logprobs", 0], alone["logprobs", 0], strict=True):
        for mine, other in zip(ours_at.logprobs, theirs_at.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [pair[1] for pair in mine.top] == pytest.approx([pair[1] for pair in other.top], abs=1e-4)
    assert again[0].num_cached_tokens > 700
    assert [token for output in again for token in output.new_token_ids] == tokens_of(alone)["30 s", 0]
    assert device == "2 x cpu (1 threads)"


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": True, "max_num_batched_tokens": 300},
        {"num_speculative_tokens": 4, "prompt_lookup_min": 1},
        {"max_num_seqs": 8, "max_model_len": 54 * 16, "kv_cache_memory_bytes": "54 blocks"},
    ],
    ids=["one step in flight", "drafts", "preemptions"],
)
def test_two_ranks_with(changes: dict[str, Any], gqa_folder: Path, alone: dict[Any, list[EngineOutput]]) -> None:
    if "kv_cache_memory_bytes" in changes:
        of_rank = TextConfig(num_hidden_layers=3, num_key_value_heads=1, head_dim=32)
        changes = {**changes, "kv_cache_memory_bytes": 54 * bytes_per_block(of_rank, 16, torch.float32)}
    core = EngineCore.build(two_ranks(gqa_folder, **changes))
    try:
        assert tokens_of(run(core, mixed_requests())) == tokens_of(alone)
        assert (core.stats.num_preemptions > 0) == ("kv_cache_memory_bytes" in changes)
        assert (core.stats.num_accepted_tokens > 0) == ("num_speculative_tokens" in changes)
        assert core.info.async_scheduling == ("async_scheduling" in changes)
    finally:
        core.close()


def test_fewer_bits_without_grouped_heads(mha_folder: Path) -> None:
    """Weights in int8, keys and values in float8: each rank rounds its own, close to one rank's."""
    names = ["no audio", "0.3 s", "an odd length"]
    requests = [request_of(name, max_tokens=1, min_tokens=1, logprobs=0) for name in names]
    changes = {"quantization": "int8", "kv_cache_dtype": "fp8"}
    single = run(EngineCore.build(args_of(mha_folder, **changes)), requests)
    core = EngineCore.build(two_ranks(mha_folder, **changes))
    try:
        pair = run(core, requests)
    finally:
        core.close()
    assert core.info.kv_cache_dtype == "float8_e4m3fn"
    for key, (output,) in pair.items():
        assert output.logprobs[0].logprob == pytest.approx(single[key][0].logprobs[0].logprob, abs=0.1)


def test_a_step_that_fails_half_way_ends_the_engine_with_a_sentence(
    gqa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it would be repeated sequence by sequence; but the other rank has begun it."""

    def broken(*_: object) -> None:
        raise ValueError("no such clip")

    async def main() -> None:
        client = await InlineEngineClient.start(two_ranks(gqa_folder, rank_timeout_s=2.0))
        monkeypatch.setattr(ModelRunner, "_put_clips", broken)
        with pytest.raises(EngineDeadError, match="out of step: ValueError: no such clip"):
            async for _ in client.generate(request_of("0.3 s")):
                pass
        await client.close()

    asyncio.run(main())


def worker_of(client: ProcessEngineClient) -> int:
    """Process id of rank 1."""
    command = ["pgrep", "-P", str(client.process.pid), "-f", "spawn_main"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; waits a little."""
    for _ in range(300):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


async def seconds_until_dead(client: ProcessEngineClient, hurt: Callable[[], None]) -> tuple[str, float]:
    """Hurt a process in the middle of an answer. -> why the engine is dead, how long that took."""

    async def generate() -> None:
        async for _ in client.generate(request_of("no audio", max_tokens=LONG, min_tokens=LONG)):
            started.set()

    started = asyncio.Event()
    answer = asyncio.create_task(generate())
    await started.wait()
    hurt()
    at = time.monotonic()
    reason = await asyncio.wait_for(client.wait_dead(), 90)
    took = time.monotonic() - at
    with pytest.raises(EngineDeadError):
        await answer
    return reason, took


@pytest.mark.parametrize(
    ("signal_number", "rank", "says"),
    [
        (signal.SIGKILL, 1, r"rank 1 has ended \(exit code -9\)"),
        (signal.SIGSTOP, 1, "out of step: RuntimeError: .*Timed out"),
        (signal.SIGKILL, 0, r"process ended \(exit code -9\)"),
    ],
    ids=["a worker killed", "a worker that hangs", "rank 0 killed"],
)
def test_no_rank_outlives_another(signal_number: int, rank: int, says: str, gqa_folder: Path) -> None:
    """tests/integration kills one that is idle."""

    async def main() -> None:
        async with served(two_ranks(gqa_folder, rank_timeout_s=4.0)) as client:
            engine, worker = client.process.pid, worker_of(client)
            assert engine is not None
            target = worker if rank else engine
            reason, took = await seconds_until_dead(client, lambda: os.kill(target, signal_number))
            assert re.search(says, reason), reason
            assert took < 60
            assert is_gone(worker)
            assert is_gone(engine)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fault", "says"), [("speaks", "rank 2: its memory is full"), ("dies", r"rank 2 has ended \(exit code 3\)")]
)
def test_a_rank_that_does_not_come_up_is_named(
    fault: str, says: str, gqa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / fault).symlink_to(gqa_folder)
    spawn = engine.workers.spawn
    monkeypatch.setattr(engine.workers, "spawn", lambda module, *rest: spawn("tests.engine.ranks_that_fail", *rest))
    workers = Workers(two_ranks(tmp_path / fault, tensor_parallel_size=3, rank_timeout_s=2.0))
    members = [process.pid or 0 for process, _ in workers._members]
    with pytest.raises(EngineStartError, match=says):
        workers.join(torch.device("cpu"))
    workers.kill()
    assert all(is_gone(pid) for pid in members)


def test_refusals_name_the_setting(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EngineStartError, match=r"--tensor-parallel-size 4 does not divide .* num_key_value_heads, 2"
    ):
        EngineCore.build(two_ranks(gqa_folder, tensor_parallel_size=4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EngineStartError, match="--tensor-parallel-size 2: torch sees 1 CUDA device"):
        resolve_device("cuda", Shard(0, 2))


def test_a_worker_that_cannot_be_told_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(EngineArgs(""))
    with workers.in_step(None):  # type: ignore[arg-type]
        pass  # nobody is told
    broken: Any = SimpleNamespace(fileno=lambda: os.open(os.devnull, os.O_RDONLY))
    workers._members.append((broken, broken))
    monkeypatch.setattr(engine.workers, "DIAGNOSIS_SECONDS", 0.05)
    with pytest.raises(RankError, match="out of step"), workers.in_step(None):  # type: ignore[arg-type]
        pytest.fail("the step begins though a rank knows nothing of it")


def test_all_ranks_have_as_many_blocks_as_the_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TextConfig(num_hidden_layers=2, num_key_value_heads=2, head_dim=8)
    block = bytes_per_block(text, 16, torch.float32)
    budgets = [block * 70, block * 40]
    monkeypatch.setattr(engine.memory, "_budget", lambda _, model, *__: (budgets[model.shard.rank], ""))

    def of_rank(shard: Shard, max_model_len: int = 640) -> int:
        stub: Any = SimpleNamespace(
            config=SimpleNamespace(text=text),
            kv_cache_dtype=torch.float32,
            shard=shard,
            device=torch.device("cpu"),
        )
        return num_kv_blocks(EngineArgs(""), stub, 16, max_model_len)

    assert on_ranks(2, of_rank) == [41, 41]
    with pytest.raises(EngineStartError, match="--max-model-len"):
        on_ranks(2, lambda shard: of_rank(shard, 656))
