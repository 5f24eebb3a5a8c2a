"""The decision on every request field that is not honoured: refused by name, or accepted and without effect.

A field is refused when ignoring it would change the meaning of the answer. Its harmless values (what leaves
the answer as it is) pass. Everything else that clients send is listed as ignored, or unknown and ignored as
well: SDKs and routers add fields of their own. Honoured fields are those of the models in schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue
from pydantic_core import PydanticCustomError

REFUSED: Final = "refused"
"""The type of our own validation errors. Their context holds param, message and code."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that only passes with a value that has no effect. `null` always passes."""

    why: str
    harmless: tuple[JsonValue, ...] = ()


_OLD_TOOLS = "functions were replaced by tools"
_GUIDED = "it was renamed: use structured_outputs"
_NO_OVERRIDE = "requests cannot override how the server renders prompts or reads media"
_NOT_HERE = "it is not supported by this server"

_REFUSED_EVERYWHERE: Mapping[str, Refusal] = {
    "add_special_tokens": Refusal(_NO_OVERRIDE, (False,)),
    "allowed_token_ids": Refusal(_NOT_HERE, ([],)),
    "bad_words": Refusal(_NOT_HERE, ([],)),
    "guided_choice": Refusal(_GUIDED),
    "guided_grammar": Refusal(_GUIDED),
    "guided_json": Refusal(_GUIDED),
    "guided_regex": Refusal(_GUIDED),
    "length_penalty": Refusal("beam search is not supported", (1,)),
    "logits_processors": Refusal(_NOT_HERE, ([],)),
    "media_io_kwargs": Refusal(_NO_OVERRIDE, ({},)),
    "mm_processor_kwargs": Refusal(_NO_OVERRIDE, ({},)),
    "prompt_logprobs": Refusal(_NOT_HERE),
    "return_tokens_as_token_ids": Refusal(_NOT_HERE, (False,)),
    "spaces_between_special_tokens": Refusal(_NOT_HERE, (True,)),
    "truncate_prompt_tokens": Refusal("nothing is ever truncated"),
    "use_beam_search": Refusal("beam search is not supported", (False,)),
}

_REFUSED_IN_CONVERSATIONS: Mapping[str, Refusal] = {
    **_REFUSED_EVERYWHERE,
    "audio": Refusal("the model writes text only"),
    "best_of": Refusal(_NOT_HERE, (1,)),
    "chat_template": Refusal(_NO_OVERRIDE),
    "chat_template_kwargs": Refusal(_NO_OVERRIDE, ({},)),
    "documents": Refusal(_NOT_HERE, ([],)),
    "function_call": Refusal(_OLD_TOOLS, ("none", "auto")),
    "functions": Refusal(_OLD_TOOLS, ([],)),
    "modalities": Refusal("the model writes text only", (["text"],)),
    "moderation": Refusal(_NOT_HERE),
    "prediction": Refusal(_NOT_HERE),
    "web_search_options": Refusal("the server reaches no web search"),
}

_NOT_STORED = "nothing is stored here: send the whole conversation"

REFUSED_IN_CHAT: Mapping[str, Refusal] = {
    **_REFUSED_IN_CONVERSATIONS,
    "instructions": Refusal("it is a system message here"),
    "max_output_tokens": Refusal("it is max_completion_tokens here"),
    "previous_response_id": Refusal(_NOT_STORED),
}

REFUSED_OF_RAW_PROMPTS: Mapping[str, Refusal] = {
    "add_generation_prompt": Refusal("a raw prompt has no messages", (True,)),
    "continue_final_message": Refusal("a raw prompt has no messages", (False,)),
    "tool_choice": Refusal("a raw prompt has no tools", ("none", "auto")),
    "tools": Refusal("a raw prompt has no tools", ([],)),
}

REFUSED_IN_COMPLETIONS: Mapping[str, Refusal] = {
    **_REFUSED_EVERYWHERE,
    **REFUSED_OF_RAW_PROMPTS,
    "max_completion_tokens": Refusal("it is max_tokens here"),
    "max_output_tokens": Refusal("it is max_tokens here"),
    "messages": Refusal("it is prompt here"),
    "prompt_embeds": Refusal(_NOT_HERE),
    "suffix": Refusal("the model does not fill in the middle", ("",)),
    "top_logprobs": Refusal("it is logprobs here", (0,)),
}

REFUSED_IN_RESPONSES: Mapping[str, Refusal] = {
    **_REFUSED_IN_CONVERSATIONS,
    "add_generation_prompt": Refusal("an answer is always a turn of its own", (True,)),
    "background": Refusal("answers are not kept for later", (False,)),
    "context_management": Refusal(_NOT_HERE, ([],)),
    "continue_final_message": Refusal("an answer is always a turn of its own", (False,)),
    "conversation": Refusal(_NOT_STORED),
    "logprobs": Refusal("include message.output_text.logprobs instead", (False,)),
    "max_completion_tokens": Refusal("it is max_output_tokens here"),
    "messages": Refusal("it is input here"),
    "previous_response_id": Refusal(_NOT_STORED),
    "prompt": Refusal("there are no stored prompts"),
    "truncation": Refusal("nothing is ever truncated", ("disabled",)),
}

REFUSED_IN_TOKENIZE: Mapping[str, Refusal] = {
    "chat_template": Refusal(_NO_OVERRIDE),
    "chat_template_kwargs": Refusal(_NO_OVERRIDE, ({},)),
    "mm_processor_kwargs": Refusal(_NO_OVERRIDE, ({},)),
}

REFUSED_IN_MESSAGES: Mapping[str, Refusal] = {
    "audio": Refusal("earlier answers have no audio here"),
    "function_call": Refusal(_OLD_TOOLS),
    "tool_calls": Refusal("only assistant messages have them", ([],)),
}

_NO_SPEAKERS = "the model does not tell speakers apart"

REFUSED_IN_TRANSCRIPTIONS: Mapping[str, Refusal] = {
    "hotwords": Refusal("write them into 'prompt'"),
    "include[]": Refusal("nothing more than the text can be included"),
    "keywords[]": Refusal("write them into 'prompt'"),
    "known_speaker_names[]": Refusal(_NO_SPEAKERS),
    "known_speaker_references[]": Refusal(_NO_SPEAKERS),
    "languages[]": Refusal("name one in 'language'"),
    "length_penalty": Refusal("beam search is not supported", ("1", "1.0")),
    "n": Refusal(_NOT_HERE, ("1",)),
    "to_language": Refusal("translations are into English"),
    "use_beam_search": Refusal("beam search is not supported", ("false", "False")),
    "vllm_xargs": Refusal(_NOT_HERE, ("{}",)),
}
"""Form fields, whose values are text."""

IGNORED: frozenset[str] = frozenset(
    {
        "include_reasoning",
        "max_tool_calls",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "user",
        "verbosity",
    }
)
"""Known, and without effect on the answer's text. For the documentation: code need not look at them."""


def check_refused(given: Mapping[str, JsonValue] | None, table: Mapping[str, Refusal]) -> None:
    """Raise PydanticCustomError that names the first field of `given` that the table refuses."""
    for name, value in (given or {}).items():
        refusal = table.get(name)
        if refusal and value is not None and not any(_same(value, harmless) for harmless in refusal.harmless):
            raise refused(name, f"Unsupported parameter: '{name}' ({refusal.why}).")


def refused(param: str, message: str, code: str = "unsupported_parameter") -> PydanticCustomError:
    """An error for validators of whole models, where pydantic does not know which field is meant."""
    return PydanticCustomError(REFUSED, "{message}", {"param": param, "message": message, "code": code})


def _same(value: JsonValue, harmless: JsonValue) -> bool:
    """Equal as JSON: Python finds 1 == True and 0 == False, JSON does not."""
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
