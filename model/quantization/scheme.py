"""How a checkpoint's weights were quantised, as its config.json says. Torch-free.

Read are the two formats of int4 (and int8) weights that people publish, AWQ's and GPTQ's, and float8 as vLLM,
AutoFP8 and compressed-tensors write it. Which modules were left as they were the tensors' names tell better than any
list in the config: a module is quantised if the files hold its packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.errors import ConfigError

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QuantizationScheme:
    """The facts that unpacking needs."""

    method: Literal["awq", "gptq", "fp8"]
    bits: int
    group_size: int = -1
    """Inputs that share a scale; -1: all."""
    zero_offset: int = 0
    """What GPTQ's first format subtracts from zero points before it stores them."""


def parse_quantization(raw: Json | None) -> QuantizationScheme | None:
    """Read config.json's `quantization_config`. Raises ConfigError for what cannot be honoured, by name."""
    if not raw:
        return None
    method = raw.get("quant_method")
    if method == "awq":
        return _awq(raw)
    if method == "gptq":
        return _gptq(raw)
    if method == "fp8":
        _require(raw.get("weight_block_size") is None, "weight_block_size", "absent")
        return QuantizationScheme("fp8", 8)
    if method == "compressed-tensors":
        return _compressed_tensors(raw)
    _require(False, "quant_method", f"awq, gptq, fp8 or compressed-tensors, not {method!r}")
    return None


def _awq(raw: Json) -> QuantizationScheme:
    _require(raw.get("bits", raw.get("w_bit", 4)) == 4, "bits", "4 with awq")
    _require(str(raw.get("version", "gemm")).lower() == "gemm", "version", "gemm with awq")
    _require(raw.get("zero_point", True) is True, "zero_point", "true with awq")
    return QuantizationScheme("awq", 4, _group_size(raw, "q_group_size"))


def _gptq(raw: Json) -> QuantizationScheme:
    bits = raw.get("bits")
    _require(bits in (4, 8), "bits", "4 or 8 with gptq")
    _require(not raw.get("dynamic"), "dynamic", "absent: bits that differ by module are not read")
    layout = raw.get("checkpoint_format") or "gptq"
    _require(layout in ("gptq", "gptq_v2"), "checkpoint_format", "gptq or gptq_v2")
    return QuantizationScheme("gptq", int(bits or 0), _group_size(raw), 1 if layout == "gptq" else 0)


def _compressed_tensors(raw: Json) -> QuantizationScheme:
    groups = raw.get("config_groups")
    _require(isinstance(groups, dict) and len(groups) == 1, "config_groups", "one group")
    group = next(iter(groups.values())) if isinstance(groups, dict) else {}
    weights = group.get("weights") if isinstance(group, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    is_fp8 = weights.get("type") == "float" and weights.get("num_bits") == 8
    _require(is_fp8, "config_groups", "float weights of 8 bits: of compressed-tensors only float8 is read")
    _require(weights.get("strategy") in ("channel", "tensor"), "config_groups' strategy", "channel or tensor")
    _require(raw.get("sparsity_config") in (None, {}), "sparsity_config", "absent")
    return QuantizationScheme("fp8", 8)


def _group_size(raw: Json, other_name: str = "group_size") -> int:
    size = raw.get("group_size", raw.get(other_name, 128))
    valid = isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0)
    _require(valid, "group_size", "-1 or above 0")
    return int(size)


def _require(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"config.json: quantization_config.{name} must be {wanted}")
