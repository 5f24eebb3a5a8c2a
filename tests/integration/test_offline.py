"""`LLM` with the bundled checkpoint: the server's answers without a server, and an engine that always ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import soundfile

from tests.integration.conftest import ROOT, ServerProcess, data_url, text
from tests.integration.test_bundled import ASKED, CLIPS, DIGITS, SIREN, SPEECH, ask, clip, user
from tympan import LLM

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
START = "from tympan import LLM\nllm = LLM()\n"
MARK = "TYMPAN_TEST_MARK"
HI = '[{"role": "user", "content": "Hi"}]'
CHAT = f'print(llm.chat({HI}, max_tokens=4, ignore_eos=True).usage["completion_tokens"])\n'


@pytest.fixture
def mark() -> str:
    """In the environment of a program and of all that it starts."""
    return uuid.uuid4().hex


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        llm = LLM()
    with llm:
        yield llm


def test_the_fixtures_in_one_batch_get_the_servers_answers(llm: LLM, bundled_server: ServerProcess) -> None:
    asked = [
        [{"type": "audio", "audio": SPEECH / name}, text(question)][: 1 + bool(question)] for name, question in ASKED
    ]
    answers = llm.chat([[user(*parts)] for parts in asked], progress=False, temperature=0)
    assert [answer.text for answer in answers] == [CLIPS[name]["answers"][question] for name, question in ASKED]
    for (name, question), answer in list(zip(ASKED, answers, strict=True))[::5]:
        over_http = bundled_server.openai.chat.completions.create(
            model="tympan-tiny",
            messages=[user(*([clip(name), text(question)] if question else [clip(name)]))],
            temperature=0,
        ).model_dump()
        assert over_http["choices"][0]["message"]["content"] == answer.text
        assert over_http["usage"]["prompt_tokens"] == answer.usage["prompt_tokens"]
        assert (
            over_http["usage"]["prompt_tokens_details"]["audio_tokens"]
            == (answer.usage["prompt_tokens_details"]["audio_tokens"])
        )


def test_the_seeds_batch(llm: LLM, bundled_server: ServerProcess) -> None:
    """The Transformers example: two conversations, one of several turns, as it spells them."""
    siren, digits = (data_url((SPEECH / name).read_bytes()) for name in (SIREN, DIGITS))
    conversation1: list[dict[str, Any]] = [
        user({"type": "audio", "audio_url": siren}, text("What's that sound?")),
        {"role": "assistant", "content": "It is the sound of a siren."},
        user({"type": "audio", "audio_url": digits}, text("What does the person say?")),
    ]
    conversation2 = [user({"type": "audio", "audio_url": digits}, text("What does the person say?"))]
    response = [answer.text for answer in llm.chat([conversation1, conversation2], progress=False)]
    assert response == [ask(bundled_server, *conversation1), ask(bundled_server, *conversation2)]
    assert response[1] == "four two seven"


def test_a_clip_may_be_a_file_bytes_an_array_or_a_url(llm: LLM) -> None:
    file = SPEECH / DIGITS
    clips = [file, str(file), file.read_bytes(), soundfile.read(file), data_url(file.read_bytes())]
    conversations = [[user({"type": "audio", "audio": clip}, text("What does the person say?"))] for clip in clips]
    assert {answer.text for answer in llm.chat(conversations, progress=False)} == {"four two seven"}
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
    assert "siren" in llm.generate(prompt, audio=SPEECH / SIREN).text


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        (START + CHAT, 0, "4"),  # at top level, without a `__main__` guard, never closed
        (START + CHAT + "1 / 0\n", 1, "4"),
        ("from tympan import LLM\nwith LLM() as llm:\n    1 / 0\n", 1, ""),
    ],
)
def test_the_engine_ends_with_the_program(program: str, status: int, words: str, tmp_path: Path, mark: str) -> None:
    done = run(program, tmp_path, mark)
    assert done.returncode == status
    assert done.stdout.strip() == words
    assert not left_behind(mark)
    complaints = [line for line in done.stderr.splitlines() if "INFO engine" not in line]
    assert (not complaints) if status == 0 else (complaints[-1] == "ZeroDivisionError: division by zero")


@pytest.mark.parametrize("moment", ["starting", "answering"])
def test_ctrl_c_ends_program_and_engine(moment: str, mark: str) -> None:
    endless = f"llm.chat([{HI}] * 4000, ignore_eos=True, max_tokens=200)\n"
    program = "print('starting', flush=True)\n" + START + "print('answering', flush=True)\n" + endless
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=ENVIRONMENT | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != moment:
        assert process.poll() is None
    time.sleep(1.0)  # anywhere in the middle of it
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, told = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT or process.returncode == 1
    assert "KeyboardInterrupt" in told
    assert not left_behind(mark)


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path, mark: str) -> None:
    done = run(f"from tympan import LLM\nLLM({str(tmp_path)!r})\n", tmp_path, mark)
    assert done.returncode == 1
    assert "config.json" in done.stderr.splitlines()[-1]
    assert not left_behind(mark)


def run(program: str, folder: Path, mark: str) -> subprocess.CompletedProcess[str]:
    """Run a script from a file, as users do: only then has it a main module that could run twice."""
    script = folder / "script.py"
    script.write_text(program, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=ENVIRONMENT | {MARK: mark},
        capture_output=True,
        text=True,
        timeout=120,
    )


def left_behind(mark: str) -> list[int]:
    """Processes of an ended program that go on. Its engine may take a moment to notice."""
    deadline = time.monotonic() + 10
    while found := [process.pid for process in psutil.process_iter() if is_marked(process, mark)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
