"""A response in the making: its output items, and the events that tell of them, as OpenAI writes both.

    created, in_progress, (item added, part added, text delta..., text done, part done, item done)...,
    (item added, arguments delta..., arguments done, item done)..., completed | incomplete | failed

Whole responses are built by the same steps; nobody reads the events then. One item is open at a time. Sequence
numbers rise by one from 0.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from engine.messages import FinishReason
from server.generation.generation import Delta, Usage
from server.generation.replies import Body, listed_logprobs
from server.prompt.tokenizer import Tokenizer
from server.tools.parser import CallDelta


class ResponseBuilder:
    """Takes the deltas of one answer, in order, and gives events."""

    def __init__(self, head: Body, tokenizer: Tokenizer, usage: Usage) -> None:
        """`head`: what the response repeats of its request."""
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), **head}
        self._tokenizer = tokenizer
        self._usage = usage
        self._output: list[Body] = []
        self._is_open = False
        """Whether the last item still grows."""
        self._num_events = 0
        self._ending: Body = {"status": "in_progress"}

    def begin(self) -> list[Body]:
        """The events before any output."""
        return [self._event("response.created", response=self.response()),
                self._event("response.in_progress", response=self.response())]  # fmt: skip

    def take(self, delta: Delta) -> list[Body]:
        """The events of a delta, the final one included when it is the last."""
        events: list[Body] = []
        if delta.text:
            events += self._take_text(delta)
        for call in delta.calls:
            events += self._take_call(call)
        if delta.finish_reason:
            events += self._finish(is_complete=delta.finish_reason != FinishReason.LENGTH)
        return events

    def fail(self, message: str) -> list[Body]:
        """The event of a failure after the beginning."""
        self._ending = {"status": "failed", "error": {"code": "server_error", "message": message}}
        return [self._event("response.failed", response=self.response())]

    def response(self) -> Body:
        """The response as it stands."""
        is_over = self._ending["status"] in ("completed", "incomplete")
        usage = _usage_json(self._usage) if is_over else None
        body = {**self._head, "error": None, "incomplete_details": None, **self._ending}
        return {**body, "output": [dict(item) for item in self._output], "usage": usage}

    def _finish(self, *, is_complete: bool) -> Iterator[Body]:
        if not self._output:
            yield from self._open_message()
        yield from self._close("completed" if is_complete else "incomplete")
        if is_complete:
            self._ending = {"status": "completed"}
            yield self._event("response.completed", response=self.response())
        else:
            self._ending = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            yield self._event("response.incomplete", response=self.response())

    def _take_text(self, delta: Delta) -> Iterator[Body]:
        if not (self._is_open and self._output[-1]["type"] == "message"):
            yield from self._close("completed")
            yield from self._open_message()
        logprobs = listed_logprobs(delta.logprobs, self._tokenizer)
        part = self._output[-1]["content"][0]
        part["text"] += delta.text
        part["logprobs"] += logprobs
        yield self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs)

    def _take_call(self, call: CallDelta) -> Iterator[Body]:
        if call.name:
            yield from self._close("completed")
            item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
            yield self._open({"id": f"fc_{uuid.uuid4().hex}", **item})
        if call.arguments:
            self._output[-1]["arguments"] += call.arguments
            yield self._item_event("response.function_call_arguments.delta", delta=call.arguments)

    def _open_message(self) -> Iterator[Body]:
        part: Body = {"type": "output_text", "annotations": [], "text": "", "logprobs": []}
        yield self._open({"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": []})
        self._output[-1]["content"] = [part]
        yield self._part_event("response.content_part.added", part={**part, "logprobs": []})

    def _open(self, item: Body) -> Body:
        self._output.append({**item, "status": "in_progress"})
        self._is_open = True
        added = dict(self._output[-1])
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=added)

    def _close(self, status: str) -> Iterator[Body]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part_event("response.content_part.done", part=part)
        else:
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield self._item_event("response.function_call_arguments.done", **arguments)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=dict(item))

    def _part_event(self, kind: str, **fields: Any) -> Body:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> Body:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> Body:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def _usage_json(usage: Usage) -> Body:
    details: Body = {
        "cached_tokens": usage.cached_tokens,
        "cache_write_tokens": 0,
        "audio_tokens": usage.audio_tokens,
    }
    if usage.truncated_audio_s:
        details["truncated_audio_seconds"] = round(usage.truncated_audio_s, 3)
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": details,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
