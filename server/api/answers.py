"""The bodies of answers as pydantic models: what the OpenAPI document promises, and what tests hold answers to.

Nothing is built from them: server/generation/replies.py and its like write the bodies, and a body may hold more
than is promised here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, JsonValue, RootModel


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error there is."""

    error: Error


class PromptTokensDetails(BaseModel):
    audio_tokens: int
    cached_tokens: int
    truncated_audio_seconds: float = 0.0
    """Only there when audio was truncated."""


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]
    refusal: None


class CalledFunctionAnswer(BaseModel):
    name: str
    arguments: str
    """JSON."""


class ToolCallAnswer(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] | None = None
    """Only there when there are some."""


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] = []
    """Only there when asked for, as `prompt_token_ids`."""


class ChatChoice(Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatAnswer(BaseModel):
    """POST /v1/chat/completions, whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] = []


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = []


class CompletionAnswer(BaseModel):
    """POST /v1/completions, whole."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ResponseInputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int
    audio_tokens: int
    truncated_audio_seconds: float = 0.0
    """Only there when audio was truncated."""


class ResponseOutputDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ResponseOutputDetails
    total_tokens: int


class ResponseAnswer(BaseModel):
    """POST /v1/responses, whole. Its output holds messages and function calls."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, JsonValue]]
    usage: ResponseUsage


class InputTokenDetails(BaseModel):
    audio_tokens: int
    text_tokens: int


class TokenUsage(BaseModel):
    type: Literal["tokens"]
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: InputTokenDetails


class DurationUsage(BaseModel):
    type: Literal["duration"]
    seconds: int


class Transcript(BaseModel):
    text: str
    usage: TokenUsage


class Translation(BaseModel):
    text: str


class TranscriptSegment(BaseModel):
    """A window that has text."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class VerboseTranscript(BaseModel):
    task: Literal["transcribe", "translate"]
    language: str | None
    duration: float
    text: str
    segments: list[TranscriptSegment]
    usage: DurationUsage


class TranscriptionAnswer(RootModel[VerboseTranscript | Transcript]):
    """POST /v1/audio/transcriptions, in json and verbose_json."""


class TranslationAnswer(RootModel[VerboseTranscript | Translation]):
    """POST /v1/audio/translations, likewise."""


class ModelAnswer(BaseModel):
    """One name of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelAnswer]


class FileAnswer(BaseModel):
    """One uploaded clip."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["user_data"]
    status: Literal["processed"]


class FileList(BaseModel):
    object: Literal["list"]
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class TokenizeAnswer(BaseModel):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    audio_tokens: int
    audio_tokens_per_clip: list[int]


class DetokenizeAnswer(BaseModel):
    """POST /detokenize."""

    prompt: str


class VersionAnswer(BaseModel):
    """GET /version."""

    version: str


class LoadAnswer(BaseModel):
    """GET /load, as vLLM has it."""

    server_load: int
