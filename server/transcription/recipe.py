"""What the model is asked about one window of audio: a recipe's wording, filled in with the request's fields.

Recipes come from configs/recipes/transcription.yaml. The request's `prompt` is the caller's text: it can never
become a control token, in raw prompts neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import ApiError, bad_request
from server.prompt.builder import Prompt, PromptBuilder
from server.prompt.chat_template import AUDIO, Span, Turn
from server.transcription.form import TranscriptionForm
from server.transcription.languages import LANGUAGES


@dataclass(frozen=True, slots=True)
class Recipe:
    """The wordings for one kind of checkpoint. {language}, {code} and {prompt} are filled in."""

    is_raw: bool
    """A raw prompt with its placeholder, for base checkpoints; else the text of a user's turn."""
    transcribe: str
    transcribe_in: str
    """With a language."""
    translate: str
    translate_from: str
    context: str | None
    """Appended when the request has a `prompt`; None: there is no place for one."""

    def check(self, form: TranscriptionForm) -> None:
        """Raise ApiError for what this recipe has no place for."""
        if form.prompt and self.context is None:
            message = "Unsupported parameter: 'prompt' (this checkpoint's prompts have no place for it)."
            raise bad_request(message, "prompt", "unsupported_parameter")

    def prompt(self, prompts: PromptBuilder, form: TranscriptionForm, num_audio_tokens: int) -> Prompt:
        """The prompt of one window. Raises ApiError when it is too long: the request's `prompt`, or the window."""
        context = self.context.format(prompt=form.prompt) if form.prompt and self.context else ""
        text = self._wording(form)
        try:
            if self.is_raw:
                return prompts.spans([Span(text, trusted=True), Span(context, trusted=False)], [num_audio_tokens])
            return prompts.chat([Turn("user", (AUDIO, text + context))], [num_audio_tokens])
        except ApiError as error:
            param = "prompt" if context else "file"
            what = (
                "The 'prompt' does not fit beside a window of audio" if context else "A window of audio does not fit"
            )
            raise bad_request(f"{what}: {error.message}", param, error.code) from None

    def _wording(self, form: TranscriptionForm) -> str:
        is_translation = form.task == "translate"
        if form.language is None:
            return self.translate if is_translation else self.transcribe
        wording = self.translate_from if is_translation else self.transcribe_in
        return wording.format(language=LANGUAGES[form.language], code=form.language)
