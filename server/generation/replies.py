"""The bodies of answers, whole and in chunks, as OpenAI writes them.

One reply object for one answer: id, time and model name are the same in all its chunks. Knows shapes only;
server/generation/streaming.py makes events of the chunks.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.messages import TokenLogprobs
from server.generation.generation import Delta, Usage
from server.prompt.tokenizer import Tokenizer
from server.tools.parser import CallDelta, joined_calls

Body = dict[str, Any]

LOWEST_LOGPROB = -9999.0
"""JSON has no -Infinity."""


def listed_logprobs(tokens: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> list[Body]:
    """Log-probabilities with the raw bytes of each token, as chat and responses list them."""

    def listed(token_id: int, logprob: float) -> Body:
        raw = tokenizer.bytes_of(token_id)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}

    return [
        {
            **listed(token.token_id, token.logprob),
            "top_logprobs": [listed(token_id, logprob) for token_id, logprob in token.top],
        }
        for token in tokens
    ]


class Reply(ABC):
    """What the answers of all endpoints have in common."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        n: int = 1,
        echoes: Sequence[str] = ("",),
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """n: choices for each prompt. echoes: what goes before the answers to each prompt.

        prompt_ids: the ids of each prompt, to be told with those of the answers; None: no ids are told.
        """
        self._head: Body = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer
        self._has_logprobs = logprobs
        self._n = n
        self._echoes = echoes
        self._prompt_ids = prompt_ids
        self._choice_indexes = range(n * len(echoes))

    def whole(self, answers: Sequence[Delta], usage: Usage) -> Body:
        """The answers in one body."""
        echoed = [replace(answer, text=self._echo(answer.index) + answer.text) for answer in answers]
        choices = [self._choice(answer, self._whole_text(answer)) for answer in echoed]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage.to_json()}

    @abstractmethod
    def openings(self) -> list[Body]:
        """The chunks that come before any generated text."""

    def chunk(self, delta: Delta) -> Body:
        """One piece of the answer."""
        return self._chunk([self._choice(delta, self._delta_text(delta))])

    def usage_chunk(self, usage: Usage) -> Body:
        """The chunk after the last piece, when asked for."""
        return {**self._chunk([]), "usage": usage.to_json()}

    def _chunk(self, choices: list[Body]) -> Body:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _choice(self, delta: Delta, text: Body) -> Body:
        logprobs = self._logprobs(delta) if self._has_logprobs and delta.logprobs else None
        choice = {"index": delta.index, **text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._prompt_ids is not None:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n]

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.bytes_of(token_id).decode(errors="replace")

    @abstractmethod
    def _whole_text(self, answer: Delta) -> Body: ...

    @abstractmethod
    def _delta_text(self, delta: Delta) -> Body: ...

    @abstractmethod
    def _logprobs(self, delta: Delta) -> Body: ...


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, answers: Sequence[Delta], usage: Usage) -> Body:
        return super().whole(answers, usage) | self._prompt_fields()

    def openings(self) -> list[Body]:
        role = {"role": "assistant", "content": "", "refusal": None}
        roles = [self._choice(Delta(index=index), {"delta": role}) for index in self._choice_indexes]
        echoes = [
            self._choice(Delta(index=index), {"delta": {"content": echo}})
            for index in self._choice_indexes
            if (echo := self._echo(index))
        ]
        prompt = self._prompt_fields()
        return [*(self._chunk([role]) | prompt for role in roles), *(self._chunk([echo]) for echo in echoes)]

    def _prompt_fields(self) -> Body:
        return {} if self._prompt_ids is None else {"prompt_token_ids": list(self._prompt_ids[0])}

    def _whole_text(self, answer: Delta) -> Body:
        calls = joined_calls(answer.calls)
        message = {"role": "assistant", "content": answer.text or (None if calls else ""), "refusal": None}
        return {"message": message | {"tool_calls": [self._call(call) for call in calls]} if calls else message}

    def _delta_text(self, delta: Delta) -> Body:
        content: Body = {"content": delta.text} if delta.text else {}
        if delta.calls:
            content["tool_calls"] = [{"index": call.index, **self._call(call)} for call in joined_calls(delta.calls)]
        return {"delta": content}

    def _call(self, call: CallDelta) -> Body:
        if not call.name:
            return {"function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": call.id, "type": "function", "function": function}

    def _logprobs(self, delta: Delta) -> Body:
        return {"content": listed_logprobs(delta.logprobs, self._tokenizer), "refusal": None}


class CompletionReply(Reply):
    """POST /v1/completions."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._text_offsets: dict[int, int] = defaultdict(int)
        """Of each choice: characters of the tokens listed so far."""

    def openings(self) -> list[Body]:
        if self._prompt_ids is None and not any(self._echoes):
            return []
        choices = (self._choice(Delta(index=i), {"text": self._echo(i)}) for i in self._choice_indexes)
        return [self._chunk([choice | self._prompt_fields(choice["index"])]) for choice in choices]

    def whole(self, answers: Sequence[Delta], usage: Usage) -> Body:
        body = super().whole(answers, usage)
        body["choices"] = [choice | self._prompt_fields(choice["index"]) for choice in body["choices"]]
        return body

    def _prompt_fields(self, index: int) -> Body:
        return {} if self._prompt_ids is None else {"prompt_token_ids": list(self._prompt_ids[index // self._n])}

    def _whole_text(self, answer: Delta) -> Body:
        return {"text": answer.text}

    def _delta_text(self, delta: Delta) -> Body:
        return {"text": delta.text}

    def _logprobs(self, delta: Delta) -> Body:
        tokens = delta.logprobs
        offsets = []
        for token in tokens:
            offsets.append(self._text_offsets[delta.index])
            self._text_offsets[delta.index] += len(self._token_text(token.token_id))
        return {
            "tokens": [self._token_text(token.token_id) for token in tokens],
            "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
            "top_logprobs": [self._alternatives(token.top) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, top: Sequence[tuple[int, float]]) -> Mapping[str, float]:
        return {self._token_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in top}
