"""`LLM`: answers to lists of conversations or prompts, from Python, in one continuous batch.

Each item is a request to the server's own application in memory (tympan/session.py), so its parameters and its
errors are those of docs/api.md. Items are read when their turn comes; answers come in the order of the items.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal, Self, overload

import httpx

from configs.settings import Settings
from server.requests.parameters import IGNORED
from server.requests.schema import ChatRequest, CompletionRequest
from tympan.answer import Answer, AnswerError
from tympan.audio_parts import audio_part, inline_audio
from tympan.loop_thread import LoopThread
from tympan.pool import run_pool
from tympan.progress import Progress
from tympan.session import SERVER_SETTINGS, in_process, width_of

Conversation = Sequence[Mapping[str, Any]]
"""OpenAI's messages; see tympan/audio_parts.py for what their clips may be."""
Prompt = str | Sequence[int]
Errors = Literal["raise", "return"]
Body = Mapping[str, Any]

OFFLINE_DEFAULTS = {"max_audio_clip_mb": 1024, "max_body_mb": 64 * 1024}
"""The server's are for strangers."""
_OURS = frozenset({"messages", "prompt", "audio", "stream", "stream_options"})
"""Fields of the request that are no keyword arguments."""


class LLM:
    """A checkpoint in an engine process of its own, which ends with `close`, `with`, or the program.

    Settings are those of the command line (`LLM("Qwen/Qwen2-Audio-7B-Instruct", dtype="bfloat16")`); without a
    model, the bundled one. Raises TypeError and ValueError for wrong settings, ModelError and EngineStartError when
    the engine cannot start. Use from one thread.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        for name in settings:
            if name not in Settings.model_fields:
                raise TypeError(f"LLM has no setting {name!r}")
            if name in SERVER_SETTINGS:
                raise TypeError(f"LLM does not listen: the server's setting {name!r} has no meaning here")
        model = None if model is None else os.fspath(model)
        self._settings = Settings.model_validate({**OFFLINE_DEFAULTS, **settings, "model": model})
        self._loop = LoopThread()
        self._session = AsyncExitStack()
        self._finalizer = weakref.finalize(self, _end, self._loop, self._session)
        self._finalizer.atexit = False  # the client of the engine sees to that
        try:
            self._client = self._loop.run(self._session.enter_async_context(in_process(self._settings)))
        except BaseException:
            self.close()
            raise

    @overload
    def chat(
        self, conversations: Conversation, *, errors: Errors = ..., progress: bool = ..., **parameters: Any
    ) -> Answer: ...
    @overload
    def chat(
        self, conversations: Sequence[Conversation], *, errors: Errors = ..., progress: bool = ..., **parameters: Any
    ) -> list[Answer]: ...
    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        errors: Errors = "raise",
        progress: bool = True,
        **parameters: Any,
    ) -> Answer | list[Answer]:
        """The next turn of a conversation, or of each of a list.

        `parameters` are those of POST /v1/chat/completions, for all conversations. The first item that fails ends
        the call with its AnswerError, unless `errors` is "return": then its Answer holds it. A list shows a
        progress bar on stderr. Raises TypeError for parameters that do not exist.
        """
        _check_parameters(parameters, {*ChatRequest.model_fields, *ChatRequest.refusals})
        one = bool(conversations) and all(isinstance(message, Mapping) for message in conversations)
        items: Sequence[Any] = [conversations] if one else conversations

        def body(index: int) -> Body:
            return {**parameters, "messages": inline_audio(items[index])}

        return self._run("/chat/completions", len(items), body, errors, progress=progress, one=one)

    @overload
    def generate(
        self, prompts: Prompt, *, audio: Any = ..., errors: Errors = ..., progress: bool = ..., **parameters: Any
    ) -> Answer: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        audio: Sequence[Any] | None = ...,
        errors: Errors = ...,
        progress: bool = ...,
        **parameters: Any,
    ) -> list[Answer]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        audio: Any = None,
        errors: Errors = "raise",
        progress: bool = True,
        **parameters: Any,
    ) -> Answer | list[Answer]:
        """The continuation of a raw prompt, or of each of a list; control tokens count, as in POST /v1/completions.

        Each `<|AUDIO|>` takes one clip. `audio` is the clip of a prompt or a list of its clips; for a list of
        prompts, a list of those, with None where a prompt has no clip. Otherwise as `chat`.
        """
        _check_parameters(parameters, {*CompletionRequest.model_fields, *CompletionRequest.refusals})
        one = isinstance(prompts, str) or (bool(prompts) and all(isinstance(token, int) for token in prompts))
        items: Sequence[Any] = [prompts] if one else prompts
        audios: Sequence[Any] = [None] * len(items) if audio is None else [audio] if one else audio
        if len(audios) != len(items):
            raise ValueError(f"there are {len(items)} prompts, but audio for {len(audios)}")

        def body(index: int) -> Body:
            clips = audios[index] if isinstance(audios[index], list) else [audios[index]]
            parts = [audio_part(clip, f"audio[{at}]") for at, clip in enumerate(clips) if clip is not None]
            return {**parameters, "prompt": items[index], **({"audio": parts} if parts else {})}

        return self._run("/completions", len(items), body, errors, progress=progress, one=one)

    def close(self) -> None:
        """End the engine's process and wait for it. Closing again has no effect."""
        if self._finalizer.alive:
            self._finalizer()
            self._loop.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, path: str, count: int, body: Callable[[int], Body], errors: Errors, *, progress: bool, one: bool
    ) -> Answer | list[Answer]:
        if errors not in ("raise", "return"):
            raise ValueError(f"errors is 'raise' or 'return', not {errors!r}")
        if not self._finalizer.alive:
            raise RuntimeError("this LLM has been closed")
        bar = Progress(count, shown=progress and not one)
        try:
            ask = functools.partial(_ask, self._client, path)
            answers = self._loop.run(_answer_all(ask, count, body, errors, bar, width_of(self._settings)))
        finally:
            bar.close()
        return answers[0] if one else answers


def _check_parameters(parameters: Mapping[str, Any], known: set[str]) -> None:
    """Over HTTP an unknown field is ignored, as clients add their own; in Python it is a slip of the pen."""
    for name in parameters:
        if name in _OURS or name not in known | IGNORED:
            raise TypeError(f"there is no parameter {name!r}")


async def _answer_all(
    ask: Callable[[bytes], Any], count: int, body: Callable[[int], Body], errors: Errors, bar: Progress, width: int
) -> list[Answer]:
    answers: dict[int, Answer] = {}

    async def work(index: int) -> None:
        try:
            answer = Answer(await ask(await asyncio.to_thread(_encode, body, index)))
        except AnswerError as error:
            error.index = index
            if errors == "raise":
                raise
            answer = Answer({}, error)
        answers[index] = answer
        bar.advance(answer.body)

    await run_pool(_indices(count), work, min(width, count))
    return [answers[index] for index in range(count)]


async def _indices(count: int) -> AsyncIterator[int]:
    for index in range(count):
        yield index


def _encode(body: Callable[[int], Body], index: int) -> bytes:
    """In a worker thread: reads files, and a body may hold megabytes of base64."""
    try:
        return json.dumps(body(index)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AnswerError(f"This cannot be sent as JSON: {error}.", code="invalid_type") from None


async def _ask(client: httpx.AsyncClient, path: str, body: bytes) -> Body:
    response = await client.post(path, content=body, headers={"Content-Type": "application/json"})
    answer: Body = response.json()
    if response.status_code != 200:
        raise AnswerError.from_body(response.status_code, answer)
    return answer


def _end(loop: LoopThread, session: AsyncExitStack) -> None:
    loop.end_with(session.aclose())
