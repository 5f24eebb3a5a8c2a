"""Write a Qwen2-Audio of random weights, in the published file format, to measure speed with.

    python -m benchmarks.make_checkpoint FOLDER [--size small|mid] [--dtype bfloat16|float32] [--seed 0]
    python -m benchmarks.make_checkpoint FOLDER --size 7b --no-weights

`small` has about 60 M parameters, `mid` about 530 M: the sizes at which a CPU still tells servers apart. `7b` has
the shape of Qwen2-Audio-7B, for a server with `--load-format dummy`; `tiny` tries out what is meant for `7b`. The
tokenizer is the bundled checkpoint's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.attention.reference import ReferenceBackend
from model.config import Qwen2AudioConfig
from model.loader import LM_HEAD, name_table
from model.qwen2_audio import Qwen2Audio

BUNDLED = Path(__file__).parent.parent / "checkpoints" / "tympan-tiny"
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json")

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "audio": {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 256},
        "text": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vocab_size": 1536,
    },
    "small": {
        "audio": {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048},
        "text": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
        "vocab_size": 16384,
    },
    "mid": {
        "audio": {"d_model": 1024, "encoder_layers": 16, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096},
        "text": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 13, "num_attention_heads": 10},
        "vocab_size": 32768,
    },
    "7b": {
        "audio": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "vocab_size": 156032,
    },
}


def write_checkpoint(folder: Path, size: str, dtype: str, seed: int = 0) -> int:
    """Write all files of a checkpoint. -> number of parameters."""
    config, special = write_configuration(folder, size, dtype)
    tensors = _random_tensors(Qwen2AudioConfig.from_json(config), getattr(torch, dtype), seed, min(special.values()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def write_configuration(folder: Path, size: str, dtype: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Write all but the weights. -> config.json, ids of the special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {token["content"]: token["id"] for token in _json(BUNDLED / "tokenizer.json")["added_tokens"]}
    shape = SIZES[size]
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, **shape["audio"]},
        "text_config": {
            "model_type": "qwen2",
            **shape["text"],
            "num_key_value_heads": shape["text"]["num_attention_heads"],
            "vocab_size": shape["vocab_size"],
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "eos_token_id": special["<|im_end|>"],
        },
        "audio_token_index": special["<|AUDIO|>"],
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    eos = [special["<|im_end|>"], special["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": eos}))
    for name in COPIED_FILES:
        shutil.copy(BUNDLED / name, folder / name)
    return config, special


def _random_tensors(
    config: Qwen2AudioConfig, dtype: torch.dtype, seed: int, num_text_tokens: int
) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen2Audio(config, ReferenceBackend()).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, target in name_table(config).items():
        shape = shapes[target.parameter]
        shape = shape if target.rows is None else torch.Size((target.rows, *shape[1:]))
        is_norm = "norm" in name and name.endswith("weight")
        noise = torch.randn(shape, generator=generator) * (0.02 if len(shape) == 1 else 0.5 / shape[-1] ** 0.5)
        tensors[name] = (noise + 1.0 if is_norm else noise).to(dtype)
    tensors[LM_HEAD][num_text_tokens:] = 0.0  # never the largest logit: answers are text, so that streams show it
    return tensors


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-weights", action="store_true", help="for a server with --load-format dummy")
    args = parser.parse_args()
    if args.no_weights:
        write_configuration(args.folder, args.size, args.dtype)
        print(f"{args.folder}: the files of {args.size} without weights")
        return
    count = write_checkpoint(args.folder, args.size, args.dtype, args.seed)
    print(f"{args.folder}: {count / 1e6:.2f} M parameters, {args.dtype}")


if __name__ == "__main__":
    main()
