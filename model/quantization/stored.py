"""A quantised checkpoint's tensors -> the weights that they stand for, under the names that others publish them by.

`X.qweight`, `X.qzeros` and `X.scales` become `X.weight`, as do a float8 `X.weight` and its `X.weight_scale`. Their
parts may lie in different shards. Scales of a KV cache, which some checkpoints bring beside their weights, are told
apart here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model.config import TextConfig
from model.errors import CheckpointError
from model.quantization.packing import GroupedWeight, unpack_awq, unpack_gptq
from model.quantization.scheme import QuantizationScheme

PARTS = {
    "awq": ({"qweight", "qzeros", "scales"}, set[str]()),
    "gptq": ({"qweight", "qzeros", "scales"}, {"g_idx"}),
    "fp8": ({"weight", "weight_scale"}, {"input_scale"}),
}
"""Of a quantised module: the parts that it must have, and may have."""
WITNESS = {"awq": "qweight", "gptq": "qweight", "fp8": "weight_scale"}
"""The part by which a quantised module is known."""
KV_SCALE = re.compile(r"language_model\.model\.layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale$")
"""As vLLM, compressed-tensors and ModelOpt name them."""


class StoredWeights:
    """What the files hold, by names."""

    def __init__(self, held: set[str], scheme: QuantizationScheme | None) -> None:
        self.scheme = scheme
        self.kv_scale_names = {name for name in held if KV_SCALE.match(name)}
        self._held = held
        self._witness = "" if scheme is None else "." + WITNESS[scheme.method]
        self._modules = {
            name.removesuffix(self._witness) for name in held if scheme and name.endswith(self._witness)
        }

    def expected(self, names: Iterable[str]) -> set[str]:
        """What a checkpoint like this one stores for weights of these names; KV scales are not among it."""
        expected = set()
        for name in names:
            module = name.removesuffix(".weight")
            expected |= self._parts(module) if module in self._modules and module != name else {name}
        return expected

    def assemble(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | GroupedWeight]]:
        """Weights under their plain names, each when its last part has come. Raises CheckpointError."""
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            module, _, part = name.rpartition(".")
            if module not in self._modules or name not in self._parts(module):
                yield name, tensor
                continue
            parts = waiting.setdefault(module, {})
            parts[part] = tensor
            if len(parts) == len(self._parts(module)):
                yield f"{module}.weight", self._unpack(module, waiting.pop(module))

    def _parts(self, module: str) -> set[str]:
        """Names of the tensors of a quantised module."""
        assert self.scheme is not None
        required, optional = PARTS[self.scheme.method]
        return {
            f"{module}.{part}"
            for part in required | optional
            if part in required or f"{module}.{part}" in self._held
        }

    def _unpack(self, module: str, parts: dict[str, Tensor]) -> Tensor | GroupedWeight:
        assert self.scheme is not None
        try:
            if self.scheme.method == "fp8":
                return dequantise_fp8(parts["weight"], parts["weight_scale"])
            if any(parts[part].dtype != torch.int32 for part in ("qweight", "qzeros")):
                raise ValueError("packed integers must be int32")
            if self.scheme.method == "awq":
                return unpack_awq(self.scheme, **parts)
            return unpack_gptq(self.scheme, **parts)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"tensors {module}.*: {error}") from None


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """weight: float8_e4m3fn [N, K]; scale: one, or one for each output, [N] or [N, 1] -> float32 [N, K]."""
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"a weight of {weight.dtype} with a scale; float8_e4m3fn is read")
    if scale.numel() not in (1, weight.shape[0]):
        raise ValueError(f"scales {list(scale.shape)} for a weight {list(weight.shape)}")
    return weight.float() * scale.float().reshape(-1, 1)


def kv_scales(tensors: dict[str, Tensor], config: TextConfig) -> dict[int, Tensor]:
    """Stored scales of a KV cache -> for each layer that has them float32 [2, 1] or [2, Hkv].

    Raises CheckpointError when a layer has one without the other, or not one or Hkv positive numbers.
    """
    num_heads = config.num_key_value_heads
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = KV_SCALE.match(name)
        assert match is not None
        index, kind = int(match[1]), match[2]
        if tensor.numel() not in (1, num_heads) or not (tensor.float() > 0).all() or tensor.isinf().any():
            raise CheckpointError(f"tensor {name} must be one positive number, or one for each of {num_heads} heads")
        if index >= config.num_hidden_layers or kind in layers.setdefault(index, {}):
            raise CheckpointError(f"tensor {name} is one too many")
        layers[index][kind] = tensor.float().flatten()
    stacked = {}
    for index, scales in layers.items():
        if scales.keys() != {"k", "v"}:
            raise CheckpointError(f"layer {index} has a scale for one of keys and values; both are needed")
        width = max(scales["k"].shape[0], scales["v"].shape[0])
        stacked[index] = torch.stack((scales["k"].expand(width), scales["v"].expand(width)))
    return stacked
