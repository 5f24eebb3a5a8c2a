"""The bodies of answers, whole and in chunks, as OpenAI writes them.

One reply object for one answer: id, time and model name are the same in all its chunks. Knows shapes only;
server/streaming.py makes events of the chunks.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.messages import TokenLogprobs
from server.generation import Delta, Usage
from server.tokenizer import Tokenizer
from server.tool_parser import CallDelta, joined_calls

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

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head: Body = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer
        self._has_logprobs = logprobs

    def whole(self, answer: Delta, usage: Usage) -> Body:
        """The answer in one body."""
        choice = self._choice(answer, self._whole_text(answer))
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": usage.to_json()}

    def opening(self) -> Body | None:
        """The chunk that comes before any text, if there is one."""
        return None

    def chunk(self, delta: Delta) -> Body:
        """One piece of the answer."""
        return self._chunk([self._choice(delta, self._delta_text(delta))])

    def usage_chunk(self, usage: Usage) -> Body:
        """The chunk after the last piece, when asked for."""
        return {**self._chunk([]), "usage": usage.to_json()}

    def _chunk(self, choices: list[Body]) -> Body:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _choice(self, delta: Delta, text: Body) -> Body:
        logprobs = self._logprobs(delta.logprobs) if self._has_logprobs and delta.logprobs else None
        choice = {"index": 0, **text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        return choice | {"stop_reason": delta.stop_reason} if delta.finish_reason else choice

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.bytes_of(token_id).decode(errors="replace")

    @abstractmethod
    def _whole_text(self, answer: Delta) -> Body: ...

    @abstractmethod
    def _delta_text(self, delta: Delta) -> Body: ...

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Body: ...


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Body:
        opening = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([self._choice(Delta(), {"delta": opening})])

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

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Body:
        return {"content": listed_logprobs(tokens, self._tokenizer), "refusal": None}


class CompletionReply(Reply):
    """POST /v1/completions."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    _text_offset = 0
    """Characters of the tokens listed so far."""

    def _whole_text(self, answer: Delta) -> Body:
        return {"text": answer.text}

    def _delta_text(self, delta: Delta) -> Body:
        return {"text": delta.text}

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Body:
        offsets = []
        for token in tokens:
            offsets.append(self._text_offset)
            self._text_offset += len(self._token_text(token.token_id))
        return {
            "tokens": [self._token_text(token.token_id) for token in tokens],
            "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
            "top_logprobs": [self._alternatives(token.top) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, top: Sequence[tuple[int, float]]) -> Mapping[str, float]:
        return {self._token_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in top}
