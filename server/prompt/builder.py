"""From messages, or a raw prompt, to token ids in which every clip has its place.

Nobody can write control tokens into a chat: special tokens are only looked for inside text of the template's
own, and everything between two of them, whoever wrote it, is encoded together by a tokenizer that has none. So
"<|AUD" in one part and "IO|>" in the next stay text, and an honest prompt gives exactly the ids that the
checkpoint's tokenizer gives for the whole string. In raw prompts (POST /v1/completions) all text is trusted.

Each audio placeholder becomes as many ids as the encoder will give embeddings. Knows token counts of clips,
not the clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from jinja2 import TemplateError

from server.errors import ApiError, bad_request
from server.prompt.chat_template import AUDIO, ChatTemplate, PromptEnd, Span, Turn
from server.prompt.tokenizer import Tokenizer
from server.prompt.tools import fold_tools
from server.tools.plan import Function

AUDIO_BOS, AUDIO_EOS = "<|audio_bos|>", "<|audio_eos|>"
"""What Qwen2-Audio's prompts write round a placeholder."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads."""

    token_ids: tuple[int, ...]
    clip_offsets: tuple[int, ...]
    """Where each clip's first placeholder stands."""
    num_audio_tokens: int
    truncated_audio_s: float = 0.0
    """Seconds that were asked to be left out."""


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Builds prompts for one checkpoint. Safe to call from several threads; long texts take a while."""

    tokenizer: Tokenizer
    template: ChatTemplate
    audio_token_id: int
    max_model_len: int

    def chat(
        self,
        turns: Sequence[Turn],
        clip_tokens: Sequence[int],
        functions: Sequence[Function] = (),
        *,
        end: PromptEnd = PromptEnd.ANSWER,
        param: str = "messages",
    ) -> Prompt:
        """Render a conversation whose AUDIO parts are clips of so many tokens each, in order.

        `functions` are what the answer may call. Raises ApiError, which names `param`: too long, or the template
        refuses the conversation.
        """
        folded = fold_tools(turns, functions)
        self._check_size(sum(map(_num_chars, folded)), param)
        try:
            spans = (
                self.template.render(turns, functions, end=end)
                if self.template.has_tools
                else self.template.render(folded, end=end)
            )
        except TemplateError as error:
            message = f"The chat template refuses these messages: {str(error)[:200]}"
            raise bad_request(message, param, "invalid_value") from None
        return self._expand(self._encode(spans), clip_tokens, param)

    def raw(self, prompt: str | Sequence[int], recordings: Sequence[Sequence[int]]) -> Prompt:
        """Take a prompt as it is, control tokens included. Each recording is the token counts of its clips.

        Raises ApiError: too long, ids out of the vocabulary, or not one placeholder for each recording.
        """
        return self.raw_all([prompt], recordings)[0]

    def raw_all(self, prompts: Sequence[str | Sequence[int]], recordings: Sequence[Sequence[int]]) -> list[Prompt]:
        """The same for several prompts: each takes as many recordings as it has placeholders, in order."""
        encoded = []
        for prompt in prompts:
            self._check_size(len(prompt), "prompt")
            encoded.append(self._encode([Span(prompt, trusted=True)]) if isinstance(prompt, str) else list(prompt))
        counts = [ids.count(self.audio_token_id) for ids in encoded]
        if (found := sum(counts)) != len(recordings):
            message = f"The prompt has {found} audio placeholders, but 'audio' has {len(recordings)} clips."
            raise bad_request(message, "audio", "audio_count_mismatch")
        rest = iter(recordings)
        return [self._fill(ids, list(islice(rest, count))) for ids, count in zip(encoded, counts, strict=True)]

    def _fill(self, ids: list[int], recordings: Sequence[Sequence[int]]) -> Prompt:
        spread = self._spread(ids, [len(clips) for clips in recordings])
        return self._expand(spread, [count for clips in recordings for count in clips], "prompt")

    def spans(self, spans: Sequence[Span], clip_tokens: Sequence[int]) -> Prompt:
        """A raw prompt in pieces, of which only the trusted ones may hold control tokens. Raises as `raw`."""
        return self._expand(self._encode(spans), clip_tokens, "prompt")

    def _encode(self, spans: Iterable[Span]) -> list[int]:
        tokenizer = self.tokenizer
        ids: list[int] = []
        plain = ""
        for span in spans:
            start = 0
            for match in tokenizer.special_pattern.finditer(span.text) if span.trusted else ():
                ids += tokenizer.encode(plain + span.text[start : match.start()])
                ids.append(tokenizer.special[match.group()])
                plain, start = "", match.end()
            plain += span.text[start:]
        return ids + tokenizer.encode(plain)

    def _spread(self, ids: list[int], num_clips: Sequence[int]) -> list[int]:
        """Repeat each placeholder as often as its recording has clips, with its markers if it stands in them."""
        special, counts = self.tokenizer.special, iter(num_clips)
        markers = (special.get(AUDIO_BOS), special.get(AUDIO_EOS))
        spread: list[int] = []
        for index, token_id in enumerate(ids):
            spread.append(token_id)
            if token_id != self.audio_token_id:
                continue
            is_marked = 0 < index < len(ids) - 1 and (ids[index - 1], ids[index + 1]) == markers
            again = [ids[index + 1], ids[index - 1], token_id] if is_marked else [token_id]
            spread += again * (next(counts) - 1)
        return spread

    def _expand(self, ids: Sequence[int], clip_tokens: Sequence[int], param: str) -> Prompt:
        if ids.count(self.audio_token_id) != len(clip_tokens):
            message = "The chat template has no place for the audio of these messages."
            raise bad_request(message, param, "invalid_value")
        clips = iter(clip_tokens)
        expanded: list[int] = []
        offsets = []
        for token_id in ids:
            if token_id == self.audio_token_id:
                offsets.append(len(expanded))
                expanded += [token_id] * next(clips)
            else:
                expanded.append(token_id)
        if len(expanded) >= self.max_model_len:
            raise self._too_long(str(len(expanded)), param)
        return Prompt(tuple(expanded), tuple(offsets), sum(clip_tokens))

    def _check_size(self, num_chars: int, param: str) -> None:
        """Refuse at once what cannot fit even if every token were the longest: encoding megabytes takes seconds."""
        at_least = num_chars // self.tokenizer.max_token_bytes
        if at_least >= self.max_model_len:
            raise self._too_long(f"more than {at_least}", param)

    def _too_long(self, num_tokens: str, param: str) -> ApiError:
        message = (
            f"This model's maximum context length is {self.max_model_len} tokens. "
            f"However, your {param} resulted in {num_tokens} tokens. Please reduce the length of the {param}."
        )
        return bad_request(message, param, "context_length_exceeded")


def _num_chars(turn: Turn) -> int:
    texts = [turn.content] if isinstance(turn.content, str) else turn.content
    return sum(len(text) for text in texts if text is not AUDIO)
