"""Whether tokenizer and chat template of a checkpoint are those of its model, as far as files tell."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError

from model.config import GenerationConfig, Qwen2AudioConfig
from model.errors import ConfigError
from server.prompt.chat_template import AUDIO, ChatTemplate, Turn
from server.prompt.tokenizer import Tokenizer

REMEDY = "take tokenizer.json from where the weights came from"


def check_folder(folder: Path) -> None:
    """Raises ConfigError that says which file to exchange."""
    check_tokenizer(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), folder)


def check_tokenizer(tokenizer: Tokenizer, template: ChatTemplate, folder: Path) -> None:
    """The same for what has been read from `folder` already."""
    config = Qwen2AudioConfig.from_folder(folder)
    if config.audio_token_id not in tokenizer.special_ids:
        raise _wrong(f"audio token, {config.audio_token_id} in config.json, is no control token of it")
    if len(tokenizer.token_bytes) > config.text.vocab_size:
        raise _wrong(
            f"{len(tokenizer.token_bytes)} tokens are more than the {config.text.vocab_size} of config.json"
        )
    for end in GenerationConfig.from_folder(folder).eos_token_ids:
        if not tokenizer.bytes_of(end):
            raise _wrong(f"tokens lack {end}, which ends answers in generation_config.json")
    placeholder = tokenizer.token_bytes[config.audio_token_id].decode()
    if placeholder not in _rendered(template):
        raise _wrong(f"audio token, {config.audio_token_id} in config.json, is {placeholder} in it and in no prompt")


def _rendered(template: ChatTemplate) -> str:
    """What the template makes of a clip."""
    try:
        spans = template.render([Turn("user", (AUDIO, "?"))])
    except TemplateError as error:
        raise ConfigError(f"the chat template cannot write a message with audio: {error}") from None
    return "".join(span.text for span in spans if span.trusted)


def _wrong(reason: str) -> ConfigError:
    return ConfigError(f"tokenizer.json is not this checkpoint's: its {reason}; {REMEDY}")
