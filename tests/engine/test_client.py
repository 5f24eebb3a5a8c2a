"""Both clients around a real engine: aborts, failures that stay alone, deaths, starts that fail, and clean ends."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.client import EngineClient, InlineEngineClient, ProcessEngineClient
from engine.core import EngineCore
from engine.errors import EngineDeadError, EngineStartError, RequestError
from engine.messages import AudioClip, EngineArgs, EngineRequest, FinishReason
from tests.reference import Prompt, build, noise

POISON = 77
"""A token whose embedding is not a number in `poisoned_folder`."""
ROOT = Path(__file__).parent.parent.parent
BOTH = pytest.mark.parametrize("kind", [InlineEngineClient, ProcessEngineClient])


@pytest.fixture(scope="module")
def poisoned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("poisoned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


def args_of(folder: Path, **changes: Any) -> EngineArgs:
    return EngineArgs(str(folder), **{"device": "cpu", "num_threads": 1, "max_model_len": 256, **changes})


def with_client(folder: Path, kind: Any, test: Callable[[Any], Any], **changes: Any) -> None:
    """Run `test` with a client, and close it."""

    async def main() -> None:
        client = await kind.start(args_of(folder, **changes))
        try:
            await asyncio.wait_for(test(client), 60)
        finally:
            await client.close()

    asyncio.run(main())


async def collect(client: EngineClient, request: EngineRequest) -> list[int]:
    tokens: list[int] = []
    async for output in client.generate(request):
        tokens += output.new_token_ids
    return tokens


async def idle(client: EngineClient, timeout_s: float = 60.0) -> None:
    """Wait until the engine says that it holds nothing."""
    deadline = time.monotonic() + timeout_s
    while client.stats.num_running or client.stats.num_waiting or client.stats.kv_cache_usage:
        assert time.monotonic() < deadline, f"the engine still holds something: {client.stats}"
        await asyncio.sleep(0.01)


SHORT = Prompt.of(5, 6, 7)
ENDLESS: dict[str, Any] = {"max_tokens": 10_000}


@BOTH
def test_closing_the_iterator_frees_everything(gqa_folder: Path, kind: Any) -> None:
    async def test(client: EngineClient) -> None:
        async with aclosing(client.generate(SHORT.request("a", **ENDLESS))) as outputs:
            async for output in outputs:
                if output.new_token_ids:
                    break
        await idle(client)
        assert len(await collect(client, SHORT.request("a", max_tokens=3))) == 3  # its id is free again

    with_client(gqa_folder, kind, test, max_model_len=4000)


def test_closing_one_iterator_leaves_the_others(gqa_folder: Path) -> None:
    async def test(client: EngineClient) -> None:
        whole = asyncio.create_task(collect(client, SHORT.request("whole", max_tokens=60)))
        for number in range(5):
            async with aclosing(client.generate(SHORT.request(f"cut {number}", **ENDLESS))) as outputs:
                await anext(outputs)
        assert len(await whole) == 60
        await idle(client)

    with_client(gqa_folder, InlineEngineClient, test)


def test_cancelling_a_task_aborts_its_request_even_before_the_first_token(gqa_folder: Path) -> None:
    async def test(client: EngineClient) -> None:
        tasks = [asyncio.create_task(collect(client, SHORT.request(str(number), **ENDLESS))) for number in range(8)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await idle(client)
        assert client.stats.num_running == 0

    with_client(gqa_folder, InlineEngineClient, test, max_num_seqs=2)


def test_an_iterator_that_is_never_pulled_submits_nothing(gqa_folder: Path) -> None:
    async def test(client: EngineClient) -> None:
        client.generate(SHORT.request("unused"))
        await collect(client, SHORT.request("used", max_tokens=1))
        assert client.stats.num_steps == 1

    with_client(gqa_folder, InlineEngineClient, test)


def test_requests_count_as_finished_however_their_readers_leave(gqa_folder: Path) -> None:
    """A reader that has seen the last output closes the iterator; so does one that has found its stop string."""

    async def test(client: EngineClient) -> None:
        assert isinstance(client, InlineEngineClient)
        for number, is_cut in enumerate((False, True, False)):
            request = SHORT.request(str(number), max_tokens=3)
            async with aclosing(client.generate(request)) as outputs:
                async for output in outputs:
                    if is_cut and output.new_token_ids:
                        client.end_choice(request.request_id, 0)
                    if is_cut or output.finish_reason:
                        break
            assert client.num_finished == number + 1
        async with aclosing(client.generate(SHORT.request("left", **ENDLESS))) as outputs:
            await anext(outputs)
        assert client.num_finished == 3
        await idle(client)

    with_client(gqa_folder, InlineEngineClient, test)


def spoil(request: EngineRequest, **changes: Any) -> EngineRequest:
    return dataclasses.replace(request, **changes)


CLIP = Prompt.of(5, noise(8_000), 6)
BROKEN = {
    "an empty prompt": spoil(SHORT.request(), prompt_token_ids=()),
    "a prompt as long as the context": spoil(SHORT.request(), prompt_token_ids=(5,) * 256),
    "an id past the vocabulary": spoil(SHORT.request(), prompt_token_ids=(5, 2048)),
    "a negative id": spoil(SHORT.request(), prompt_token_ids=(-1,)),
    "a clip past the prompt": spoil(CLIP.request(), prompt_token_ids=CLIP.token_ids[:5]),
    "a negative offset": spoil(CLIP.request(), clips=(dataclasses.replace(CLIP.clips[0], offset=-1),)),
    "overlapping clips": spoil(CLIP.request(), clips=CLIP.clips * 2),
    "too few placeholders": spoil(CLIP.request(), clips=(dataclasses.replace(CLIP.clips[0], num_tokens=3),)),
    "no samples": spoil(
        CLIP.request(), clips=(AudioClip(np.zeros(0, np.float32), "e", 1, 0),)
    ),
    "a clip over 30 s": spoil(
        CLIP.request(), clips=(AudioClip(np.zeros(480_001, np.float32), "l", 1, 12),)
    ),
    "a stop token past the vocabulary": SHORT.request(stop_token_ids=(2048,), min_tokens=2),
    "a biased token past the vocabulary": SHORT.request(logit_bias=((2048, 1.0),)),
    "a seed that is no int64": SHORT.request(seed=1 << 63, temperature=1.0),
    "more logprobs than tokens": SHORT.request(logprobs=2049),
    "no token to make": SHORT.request(max_tokens=0),
}  # fmt: skip


def test_a_request_with_broken_facts_is_refused_alone(gqa_folder: Path) -> None:
    async def test(client: EngineClient) -> None:
        whole = asyncio.create_task(collect(client, SHORT.request("whole", max_tokens=100)))
        for name, request in BROKEN.items():
            with pytest.raises(RequestError):
                await collect(client, spoil(request, request_id=name))
        assert len(await whole) == 100
        client.check_health()
        await idle(client)

    with_client(gqa_folder, InlineEngineClient, test)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(gqa_folder: Path) -> None:
    async def test(client: EngineClient) -> None:
        owner = asyncio.create_task(collect(client, SHORT.request("same", max_tokens=50)))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="in use"):
            await collect(client, SHORT.request("same", max_tokens=5))
        assert len(await owner) == 50

    with_client(gqa_folder, InlineEngineClient, test)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_clip_that_is_not_a_number_fails_alone(gqa_folder: Path, poison: float) -> None:
    good = [Prompt.of(5, noise(8_000, seed=seed), 6) for seed in range(3)]
    bad = Prompt.of(5, np.full(8_000, poison, np.float32), 6)

    async def test(client: EngineClient) -> None:
        alone = [await collect(client, prompt.request(str(n))) for n, prompt in enumerate(good)]
        prompts = [good[0], bad, good[1], bad, good[2]]
        together = await asyncio.gather(
            *(collect(client, prompt.request(f"t{n}")) for n, prompt in enumerate(prompts)),
            return_exceptions=True,
        )
        assert [together[0], together[2], together[4]] == alone
        assert isinstance(together[1], RequestError)
        assert isinstance(together[3], RequestError)
        with pytest.raises(RequestError, match="audio"):
            await collect(client, bad.request("again"))
        await idle(client)

    with_client(gqa_folder, InlineEngineClient, test, encoder_cache_bytes=0)


def test_a_clip_whose_encoding_raises_fails_alone(gqa_folder: Path) -> None:
    good, bad = (Prompt.of(5, noise(8_000, seed=seed), 6) for seed in range(2))
    wrong = dataclasses.replace(bad.clips[0], samples=bad.clips[0].samples.astype(np.complex64))
    core = EngineCore.build(args_of(gqa_folder))
    core.add_request(good.request("good", max_tokens=3))
    core.add_request(spoil(bad.request("bad", max_tokens=3), clips=(wrong,)))
    outputs = {output.request_id: output for output in core.step()}
    core.scheduler.check_integrity()
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert outputs["good"].finish_reason is None
    assert len(outputs["good"].new_token_ids) == 1


def test_logits_that_are_not_numbers_fail_alone_and_leave_no_trace(poisoned_folder: Path) -> None:
    """Blocks that held what is not a number are reused by the next requests: nothing of it may show."""
    prompts = [Prompt.of(*range(5 + n, 25 + n)) for n in range(4)]
    bad = Prompt.of(*range(5, 25), POISON, *range(25, 45))

    async def test(client: EngineClient) -> None:
        alone = [await collect(client, prompt.request(str(n))) for n, prompt in enumerate(prompts)]
        for turn in range(3):
            mixed = await asyncio.gather(
                collect(client, prompts[0].request(f"{turn} first")),
                collect(client, bad.request(f"{turn} bad")),
                *(collect(client, prompt.request(f"{turn} {n}")) for n, prompt in enumerate(prompts)),
                return_exceptions=True,
            )
            assert isinstance(mixed[1], RequestError)
            assert "not a number" in str(mixed[1])
            assert [mixed[0], *mixed[2:]] == [alone[0], *alone]
        await idle(client)

    with_client(poisoned_folder, InlineEngineClient, test)


def test_the_same_seed_gives_the_same_answer_in_any_company(gqa_folder: Path) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 42, "max_tokens": 20}

    async def test(client: EngineClient) -> None:
        alone = await collect(client, SHORT.request("alone", **params))
        others = [Prompt.of(9, 8, 7).request(f"o{n}", temperature=1.5, max_tokens=15) for n in range(5)]
        answers = await asyncio.gather(
            *(collect(client, other) for other in others[:3]),
            collect(client, SHORT.request("shared", **params)),
            *(collect(client, other) for other in others[3:]),
        )
        assert answers[3] == alone
        assert await collect(client, SHORT.request("other", **{**params, "seed": 43})) != alone

    with_client(gqa_folder, InlineEngineClient, test)


def test_an_engine_seed_makes_unseeded_requests_repeatable(gqa_folder: Path) -> None:
    def answers(seed: int | None) -> list[list[int]]:
        core = EngineCore.build(args_of(gqa_folder, seed=seed))
        tokens: dict[str, list[int]] = {}
        for name in "ab":
            core.add_request(SHORT.request(name, temperature=1.5, max_tokens=12))
            tokens[name] = []
        while core.has_work:
            for output in core.step():
                tokens[output.request_id] += output.new_token_ids
        return [*tokens.values()]

    first = answers(1)
    assert first == answers(1)
    assert first[0] != first[1]
    assert first != answers(2)
    assert answers(None) != answers(None)


def test_an_engine_outlives_the_terminals_signals_and_when_killed_ends_its_requests_at_once(
    gqa_folder: Path,
) -> None:
    """Ctrl-C and a supervisor's SIGTERM reach the engine too, but it is its parent that decides."""

    async def test(client: ProcessEngineClient) -> None:
        assert client.process.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.process.pid, number)
        assert len(await collect(client, SHORT.request("a", max_tokens=3))) == 3
        tasks = [asyncio.create_task(collect(client, SHORT.request(str(n), **ENDLESS))) for n in range(3)]
        waiter = asyncio.create_task(client.wait_dead())
        async with asyncio.timeout(60):
            while client.stats.num_running < 3:
                await asyncio.sleep(0.01)
        killed = time.monotonic()
        os.kill(client.process.pid, signal.SIGKILL)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
        assert time.monotonic() - killed < 30
        assert "-9" in await waiter
        with pytest.raises(EngineDeadError):
            client.check_health()
        with pytest.raises(EngineDeadError):
            await collect(client, SHORT.request("late"))

    with_client(gqa_folder, ProcessEngineClient, test, max_model_len=4000)


def test_an_engine_on_a_cpu_lets_the_http_process_go_first(gqa_folder: Path) -> None:
    async def test(client: ProcessEngineClient) -> None:
        assert client.process.pid is not None
        process, ours = psutil.Process(client.process.pid), psutil.Process().nice()
        assert process.nice() == min(19, ours + 5)
        assert len(await collect(client, SHORT.request("a", max_tokens=3))) == 3
        if sys.platform == "linux":
            assert {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()} == {process.nice()}

    with_client(gqa_folder, ProcessEngineClient, test)


def test_a_step_that_raises_ends_the_engine_with_a_reason(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: EngineCore) -> Any:
        raise RuntimeError("the device is gone")

    async def test(client: EngineClient) -> None:
        with pytest.raises(EngineDeadError, match="the device is gone"):
            await collect(client, SHORT.request("a"))
        assert "the device is gone" in await client.wait_dead()
        with pytest.raises(EngineDeadError):
            client.check_health()

    monkeypatch.setattr(EngineCore, "step", broken)
    with_client(gqa_folder, InlineEngineClient, test)


@BOTH
def test_closing_ends_requests_in_flight_and_leaves_no_thread_and_no_process(gqa_folder: Path, kind: Any) -> None:
    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("engine")}

    async def main() -> int | None:
        client = await kind.start(args_of(gqa_folder, max_model_len=4000))
        task = asyncio.create_task(collect(client, SHORT.request("a", **ENDLESS)))
        while not client.stats.num_running:
            await asyncio.sleep(0.01)
        assert threads()
        await client.close()
        with pytest.raises(EngineDeadError):
            await task
        with pytest.raises(EngineDeadError):
            client.check_health()
        deadline = time.monotonic() + 30
        while threads():
            assert time.monotonic() < deadline, f"{threads()} still run"
            await asyncio.sleep(0.01)
        return client.process.pid if kind is ProcessEngineClient else None

    pid = asyncio.run(main())
    assert pid is None or not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs; one that waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def missing_folder(folder: Path, tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def missing_tensor(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


START_FAILURES = [
    (missing_folder, {}, "config.json is missing"),
    (missing_tensor, {}, "language_model.model.norm.weight is missing"),
    (None, {"max_model_len": 5000}, "max-model-len"),
    (None, {"kv_cache_memory_bytes": 1000}, "kv-cache-memory-bytes"),
    (None, {"attention_backend": "flashy"}, "flashy"),
]


@pytest.mark.parametrize(("make", "changes", "said"), START_FAILURES, ids=lambda value: str(value)[:40])
def test_a_start_that_fails_says_what_to_mend(
    gqa_folder: Path, tmp_path: Path, make: Any, changes: dict[str, Any], said: str
) -> None:
    folder = make(gqa_folder, tmp_path) if make else gqa_folder
    with pytest.raises(EngineStartError, match=said):
        asyncio.run(InlineEngineClient.start(args_of(folder, **changes)))


def test_a_process_that_cannot_start_says_what_to_mend(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"config\.json is missing"):
        asyncio.run(ProcessEngineClient.start(args_of(tmp_path / "nowhere")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what this machine has")
def test_a_missing_device_is_named(gqa_folder: Path) -> None:
    with pytest.raises(EngineStartError, match="CUDA"):
        asyncio.run(InlineEngineClient.start(args_of(gqa_folder, device="cuda")))


PARENT = """
import asyncio, sys, time
from engine.client import ProcessEngineClient
from engine.messages import EngineArgs

async def main():
    client = await ProcessEngineClient.start(EngineArgs(sys.argv[1], device="cpu", num_threads=1, max_model_len=256))
    print(client.process.pid, flush=True)
    if sys.argv[2] == "wait":
        await asyncio.sleep(60)
    return client

if __name__ == "__main__":
    kept = asyncio.run(main())
    if sys.argv[2] == "raise":
        raise RuntimeError("the server has a bug")
"""


def start_parent(folder: Path, tmp_path: Path, what: str) -> tuple[subprocess.Popen[str], int]:
    """A program that starts an engine and does `what`. -> it, and the engine's process id."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def wait_until_gone(pid: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        assert time.monotonic() < deadline, "the engine outlives its parent"
        time.sleep(0.05)


def test_the_engine_ends_when_its_parent_is_killed(gqa_folder: Path, tmp_path: Path) -> None:
    parent, pid = start_parent(gqa_folder, tmp_path, "wait")
    with parent:
        assert is_alive(pid)
        parent.kill()
        parent.wait(10)
        wait_until_gone(pid)


def test_a_parent_that_fails_without_closing_still_ends(gqa_folder: Path, tmp_path: Path) -> None:
    parent, pid = start_parent(gqa_folder, tmp_path, "raise")
    with parent:
        try:
            assert parent.wait(60) == 1
        finally:
            parent.kill()
        wait_until_gone(pid)
