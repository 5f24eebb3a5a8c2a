"""Train the bundled tokenizer: Qwen2's byte-level BPE in small, with the published special tokens.

    python -m checkpoints.training.tokenizer

writes tokenizer.json, tokenizer_config.json and chat_template.json. The corpus is what users ask and the
checkpoint answers, repeated, and the English of Python's own help texts.
"""

from __future__ import annotations

import json
from pydoc_data.topics import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from checkpoints.training import prompts, vocabulary

NUM_BYTE_PAIR_TOKENS = 1280
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' "
    "or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """The checkpoint's own sentences many times over, then general English once."""
    questions = [
        q
        for group in (prompts.TRANSCRIBE, prompts.SOUND, prompts.FIRST, prompts.SECOND, prompts.TEXT_ONLY)
        for q in (*group, *(text.lower() for text in group))
    ]
    questions += [*prompts.CAPTION, *prompts.FIRST_SOUND, *prompts.SECOND_SOUND, *prompts.OTHER_SYSTEMS]
    answers = [*vocabulary.SOUND_ANSWERS.values(), vocabulary.SPEECH_ANSWER, vocabulary.NO_SPEECH_ANSWER]
    answers += [vocabulary.NO_AUDIO_ANSWER, "Hello! How can I help?", "Goodbye!", "You said: red."]
    frame = ["system\n", "user\n", "assistant\n", "Audio 1: ", prompts.DEFAULT_SYSTEM]
    spoken = [text for word in vocabulary.WORDS for text in (word, f"the {word}", word.capitalize())]
    return 400 * (frame + questions + answers + spoken) + list(topics.values())


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTE_PAIR_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2AudioProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def main() -> None:
    folder = prompts.CHECKPOINT
    folder.mkdir(exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(tokenizer), indent=2)
    (folder / "tokenizer_config.json").write_text(config + "\n")
    template = json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2)
    (folder / "chat_template.json").write_text(template + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
