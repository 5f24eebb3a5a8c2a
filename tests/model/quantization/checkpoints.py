"""Checkpoints as AWQ's, GPTQ's and float8's tools write them, packed integer by integer as their papers' code does.

Slow and plain on purpose: nothing here knows how the program unpacks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.weight_files import SINGLE_FILE

Ints = NDArray[np.int64]
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_along_rows(codes: Ints, bits: int) -> Tensor:
    """GPTQ's weights: [K, N] -> int32 [K * bits / 32, N], the first row in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), dtype=np.uint32)
    for row in range(codes.shape[0]):
        words[row // per_word] |= codes[row].astype(np.uint32) << np.uint32(bits * (row % per_word))
    return torch.from_numpy(words.view(np.int32).copy())


def pack_along_columns(codes: Ints, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Zero points, and AWQ's weights: [R, N] -> int32 [R, N * bits / 32]; place i of a word has column order[i]."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), dtype=np.uint32)
    for column in range(words.shape[1]):
        for place, source in enumerate(order or range(per_word)):
            words[:, column] |= codes[:, column * per_word + source].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def round_to_grid(weight: Tensor, bits: int, groups: Ints) -> tuple[Ints, Ints, Tensor]:
    """weight: [N, K], groups: [K] -> codes [K, N], zero points [G, N], at least 1, float16 scales [G, N]."""
    columns = weight.T.double().numpy()
    most = 2**bits - 1
    codes, zeros, scales = np.zeros(columns.shape, np.int64), [], []
    for group in range(int(groups.max()) + 1):
        part = columns[groups == group]
        low, high = np.minimum(part.min(0), -1e-3), np.maximum(part.max(0), 1e-3)
        scale = ((high - low) / most).astype(np.float16).astype(np.float64)
        zero = np.clip(np.round(-low / scale), 1, most).astype(np.int64)
        codes[groups == group] = np.clip(np.round(part / scale) + zero, 0, most).astype(np.int64)
        zeros.append(zero)
        scales.append(scale)
    return codes, np.stack(zeros), torch.from_numpy(np.stack(scales)).half()


def stands_for(codes: Ints, zeros: Ints, scales: Tensor, groups: Ints) -> Tensor:
    """The weight that quantised numbers mean. -> float32 [N, K]."""
    scale = scales.double().numpy()[groups]
    return torch.from_numpy(((codes - zeros[groups]) * scale).T.copy()).float()


def awq(weight: Tensor, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """-> tensors by part, and the weight that they mean."""
    groups = np.arange(weight.shape[1]) // group_size
    codes, zeros, scales = round_to_grid(weight, 4, groups)
    parts = {
        "qweight": pack_along_columns(codes, 4, AWQ_ORDER),
        "qzeros": pack_along_columns(zeros, 4, AWQ_ORDER),
        "scales": scales,
    }
    return parts, stands_for(codes, zeros, scales, groups)


def gptq(
    weight: Tensor, group_size: int, *, bits: int, v2: bool, act_order: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """-> tensors by part, and the weight that they mean."""
    groups = np.arange(weight.shape[1]) // (weight.shape[1] if group_size == -1 else group_size)
    if act_order:
        groups = np.random.default_rng(weight.shape[1]).permutation(groups)
    codes, zeros, scales = round_to_grid(weight, bits, groups)
    parts = {
        "qweight": pack_along_rows(codes, bits),
        "qzeros": pack_along_columns(zeros if v2 else zeros - 1, bits),
        "scales": scales,
        "g_idx": torch.from_numpy(groups).int(),
    }
    return parts, stands_for(codes, zeros, scales, groups)


def fp8(weight: Tensor, *, per_channel: bool) -> tuple[dict[str, Tensor], Tensor]:
    """-> tensors by part, and the weight that they mean."""
    largest = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax().reshape(1)
    scale = (largest / 448).float()
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def config_of(method: str, **options: Any) -> dict[str, Any]:
    """`quantization_config` as the tools write it."""
    if method == "awq":
        common = {"bits": 4, "version": "gemm", "zero_point": True, "modules_to_not_convert": ["audio_tower"]}
        return {"quant_method": "awq", **common, **options}
    return {"quant_method": method, **options}


def quantise(folder: Path, target: Path, method: str, group_size: int = 32, **options: Any) -> Path:
    """Copy a checkpoint twice: `target`/quantised, and `target`/dense with the weights that its numbers mean."""
    dense_folder = Path(shutil.copytree(folder, target / "dense"))
    packed_folder = Path(shutil.copytree(folder, target / "quantised"))
    dense, packed = load_file(folder / SINGLE_FILE), load_file(folder / SINGLE_FILE)
    for name in list(dense):
        module, _, part = name.rpartition(".")
        if part != "weight" or module.rpartition(".")[2] not in DECODER or not name.startswith("language_model"):
            continue
        weight = packed.pop(name)
        if method == "awq":
            parts, dense[name] = awq(weight, group_size)
        elif method == "gptq":
            parts, dense[name] = gptq(weight, group_size, **options)
        else:
            parts, dense[name] = fp8(weight, **options)
        packed |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(dense, dense_folder / SINGLE_FILE)
    save_file(packed, packed_folder / SINGLE_FILE)
    config = json.loads((folder / "config.json").read_text())
    if method == "awq":
        config["quantization_config"] = config_of("awq", group_size=group_size)
    elif method == "gptq":
        form = {"checkpoint_format": "gptq_v2"} if options["v2"] else {}
        config["quantization_config"] = config_of(
            "gptq", bits=options["bits"], group_size=group_size, desc_act=options["act_order"], **form
        )
    else:
        config["quantization_config"] = config_of("fp8", activation_scheme="dynamic")
    (packed_folder / "config.json").write_text(json.dumps(config))
    return target
