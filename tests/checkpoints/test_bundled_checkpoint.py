"""The bundled checkpoint is complete, in the published layout, and small enough to ship."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from model.attention.reference import ReferenceBackend
from model.config import GenerationConfig, Qwen2AudioConfig
from model.loader import load_model, name_table

FOLDER = Path(__file__).parents[2] / "checkpoints" / "tympan-tiny"
FILES = (
    "README.md",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


@pytest.mark.parametrize("name", FILES)
def test_every_published_file_is_there(name):
    assert (FOLDER / name).stat().st_size > 0


def test_weights_are_half_precision_and_small():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 20_000_000
    with safe_open(path, framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float16"}  # noqa: SIM118


def test_tensors_carry_the_published_names():
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(name_table(Qwen2AudioConfig.from_folder(FOLDER)))


def test_special_tokens_are_single_ids_that_the_configs_agree_on():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = {token: tokenizer.encode(token, add_special_tokens=False).ids for token in SPECIAL_TOKENS}
    assert all(len(found) == 1 for found in ids.values())
    config = Qwen2AudioConfig.from_folder(FOLDER)
    assert [config.audio_token_id] == ids["<|AUDIO|>"]
    stops = GenerationConfig.from_folder(FOLDER).eos_token_ids
    assert sorted(stops) == sorted(ids["<|im_end|>"] + ids["<|endoftext|>"])
    assert tokenizer.get_vocab_size() <= config.text.vocab_size


def test_tokenizer_gives_text_back():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = "What does the person say? Ça va, 你好 🎧 42\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_transformers_loads_it_and_agrees_with_our_model():
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(FOLDER)
    ours = load_model(
        FOLDER, Qwen2AudioConfig.from_folder(FOLDER), ReferenceBackend(), torch.float32, torch.device("cpu")
    )
    clip = torch.randn(12_345, generator=torch.Generator().manual_seed(0)) * 0.1
    template = json.loads((FOLDER / "chat_template.json").read_text())["chat_template"]
    content = [{"type": "audio"}, {"type": "text", "text": "What does the person say?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert prompt.count("<|AUDIO|>") == 1
    inputs = processor(text=prompt, audio=[clip.numpy()], sampling_rate=16_000, return_tensors="pt")
    projected: list[torch.Tensor] = []
    theirs.model.multi_modal_projector.register_forward_hook(lambda *call: projected.append(call[-1]))
    with torch.inference_mode():
        theirs(**inputs)
        (rows,) = ours.encode_audio([clip.numpy()])
    assert len(rows) == int((inputs["input_ids"] == ours.config.audio_token_id).sum())
    torch.testing.assert_close(rows, projected[0].flatten(0, -2)[: len(rows)], atol=1e-4, rtol=1e-4)
