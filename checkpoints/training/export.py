"""Write a training run as a checkpoint folder in the published layout.

    python -m checkpoints.training.export --name main

config.json, generation_config.json, preprocessor_config.json and model.safetensors (float16, the published
tensor names, without the CTC head) go beside the tokenizer that `checkpoints.training.tokenizer` wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from checkpoints.training.network import NetworkSizes
from checkpoints.training.prompts import CHECKPOINT
from checkpoints.training.train import RUNS

MAX_BYTES = 20_000_000


def config(sizes: NetworkSizes, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: the published keys, with every size written out."""
    end_of_text, end_of_turn = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": sizes.num_mel_bins,
            "encoder_layers": sizes.encoder_layers,
            "encoder_attention_heads": sizes.encoder_width // sizes.head_dim,
            "encoder_ffn_dim": sizes.encoder_ffn,
            "d_model": sizes.encoder_width,
            "activation_function": "gelu",
            "scale_embedding": False,
            "max_source_positions": sizes.max_positions,
        },
        "audio_token_index": tokenizer.token_to_id("<|AUDIO|>"),
        "ignore_index": -100,
        "model_type": "qwen2_audio",
        "text_config": {
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_turn,
            "hidden_act": "silu",
            "hidden_size": sizes.width,
            "intermediate_size": sizes.ffn,
            "max_position_embeddings": 8192,
            "model_type": "qwen2",
            "num_attention_heads": sizes.width // sizes.head_dim,
            "num_hidden_layers": sizes.layers,
            "num_key_value_heads": sizes.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "torch_dtype": "float16",
            "use_sliding_window": False,
            "vocab_size": sizes.vocab_size,
        },
        "torch_dtype": "float16",
        "vocab_size": sizes.vocab_size,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: greedy, and both ends of an answer."""
    end_of_text, end_of_turn = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    return {
        "chat_format": "chatml",
        "do_sample": False,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
    }


def preprocessor_config() -> dict[str, Any]:
    """preprocessor_config.json, as published."""
    return {
        "chunk_length": 30,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "Qwen2AudioProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }


def published_tensors(network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained tensors that belong to the checkpoint, in float16."""
    kept = {name: tensor for name, tensor in network.items() if not name.startswith("ctc_")}
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in kept.items()}
    for name, tensor in half.items():
        assert torch.isfinite(tensor).all(), f"{name} overflows float16"
    return half


def export(run: Path, folder: Path) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    sizes = NetworkSizes(**state["sizes"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = {
        "config.json": config(sizes, tokenizer),
        "generation_config.json": generation_config(tokenizer),
        "preprocessor_config.json": preprocessor_config(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = folder / "model.safetensors"
    save_file(published_tensors(state["network"]), weights, metadata={"format": "pt"})
    size = weights.stat().st_size
    assert size <= MAX_BYTES, f"{size} bytes are more than {MAX_BYTES}"
    print(f"step {state['step']}, {state['elapsed'] / 60:.0f} min of training, {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="main")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    export(RUNS / args.name, args.folder)


if __name__ == "__main__":
    main()
