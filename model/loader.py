"""Safetensors on disk -> a `Qwen2Audio` on the device. Every tensor exactly once, or an error that names it.

One table maps each published name (the hub's, as written by `save_pretrained` of transformers 4 and 5) to a
parameter of ours and, where we keep several published tensors as one (`qkv_proj`, `gate_up_proj`), to its rows.
Weights are read memory-mapped and copied straight into place: the peak is the model plus one tensor. Quantised ones
come as the numbers that they stand for (`model.quantization.stored`). A rank of several reads its part of a tensor
and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention.base import AttentionBackend
from model.config import AudioConfig, Qwen2AudioConfig, TextConfig
from model.errors import CheckpointError, ConfigError
from model.kv_scales import set_kv_scales
from model.linear import Linear
from model.parallel import WHOLE, Shard
from model.quantization.int4_linear import Int4Weight
from model.quantization.packing import GroupedWeight
from model.quantization.stored import StoredWeights
from model.quantization.stored import kv_scales as stored_kv_scales
from model.qwen2_audio import Qwen2Audio, unfilled
from model.weight_files import check_content, open_weights, tensor_files

LM_HEAD = "language_model.lm_head.weight"

Progress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a published tensor goes: rows `start` to `start + rows` of a parameter, or all of it (rows None)."""

    parameter: str
    start: int = 0
    rows: int | None = None
    split: int | None = None
    """The dimension of the tensor that the ranks divide; None: each reads all of it."""


def name_table(config: Qwen2AudioConfig) -> dict[str, Target]:
    """Published tensor name -> target, for every tensor that a checkpoint of this shape holds.

    config: its decoder is the rank's, as `Shard.share` gives it.
    """
    return dict(
        [
            *_decoder_names(config.text),
            *_encoder_names(config.audio),
            ("multi_modal_projector.linear.weight", Target("projector.weight")),
            ("multi_modal_projector.linear.bias", Target("projector.bias")),
        ]
    )


def load_model(
    folder: Path,
    config: Qwen2AudioConfig,
    backend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
    *,
    fp8_kv: bool = False,
    keep_int4: bool = False,
) -> Qwen2Audio:
    """Build a rank's part of the model and fill it from `folder`. Raises CheckpointError and ConfigError.

    fp8_kv: give its layers the scales that make its KV cache one of float8. keep_int4: leave weights of four bits of
    the decoder packed where the kernels take them; everything else is unpacked.
    """
    config = replace(config, text=shard.share(config.text))
    files = tensor_files(folder)
    stored = StoredWeights(set(files), config.quantization)
    if shard.size > 1 and (config.quantization or stored.kv_scale_names):
        what = f"is quantised by {config.quantization.method}" if config.quantization else "has scales of a KV cache"
        raise ConfigError(f"--tensor-parallel-size {shard.size}: this checkpoint {what}, and loads on one rank only")
    table = name_table(config)
    has_head = bool(stored.expected([LM_HEAD]) & set(files))
    if config.text.tie_word_embeddings and not has_head:
        del table[LM_HEAD]
    _check_names(set(files) - stored.kv_scale_names, stored.expected(table))
    model = _unfilled(config, backend, shard, dtype, device, has_head=has_head)
    kv_scales: dict[str, Tensor] = {}
    places = Places(model, keep_int4=keep_int4)
    own = {name for name, _ in model.named_parameters()}
    read = _read(folder, files, partial(_part, table=table, own=own, shard=shard))
    for done, (name, tensor) in enumerate(stored.assemble(read), start=1):
        if name in stored.kv_scale_names:
            assert isinstance(tensor, Tensor), "they are stored as they are"
            kv_scales[name] = tensor
        else:
            places.put(name, tensor, table[name])
        if progress is not None:
            progress(done, len(table) + len(stored.kv_scale_names))
    places.finish()
    if fp8_kv:
        set_kv_scales(model.decoder.layers, stored_kv_scales(kv_scales, config.text))
    return model


def _unfilled(
    config: Qwen2AudioConfig,
    backend: AttentionBackend,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_head: bool,
) -> Qwen2Audio:
    """has_head: a checkpoint that holds its own lm_head is right, whatever its config says of tying."""
    model = unfilled(config, backend, dtype, device, shard)
    if not has_head:  # each module has a parameter of its own
        model.lm_head.weight = model.decoder.embed_tokens.weight
    for layer in model.audio_tower.layers if shard.rank == 0 else ():
        layer.qkv_proj.bias.zero_()  # k has no bias: its rows stay zero
    return model


class Places:
    """A model's parameters while they are filled."""

    def __init__(self, model: Qwen2Audio, *, keep_int4: bool) -> None:
        self._model = model
        self._keep_int4 = keep_int4
        self._parameters = dict(model.named_parameters())
        self._packed: dict[str, dict[int, GroupedWeight]] = {}
        """By the parameter, then by the first row, what waits for the rest of a fused weight."""

    def put(self, name: str, weight: Tensor | GroupedWeight, target: Target) -> None:
        """Raises CheckpointError when the shape is not the place's."""
        place = self._place(target)
        shape = list(weight.shape if isinstance(weight, Tensor) else reversed(weight.codes.shape))
        if list(place.shape) != shape:
            raise CheckpointError(f"tensor {name} has shape {shape}; config.json calls for {list(place.shape)}")
        if isinstance(weight, Tensor):
            place.copy_(weight)
        elif not (self._keep_int4 and target.parameter.startswith("decoder.layers.")):
            place.copy_(weight.dense())
        else:
            parts = self._packed.setdefault(target.parameter, {})
            parts[target.start] = weight
            if sum(part.codes.shape[1] for part in parts.values()) == self._parameters[target.parameter].shape[0]:
                self._fuse(target.parameter, self._packed.pop(target.parameter))

    def finish(self) -> None:
        """Unpack what has no whole weight to be part of: its neighbours are not quantised."""
        for parameter, parts in self._packed.items():
            self._unpack(parameter, parts)

    def _fuse(self, parameter: str, parts: dict[int, GroupedWeight]) -> None:
        ordered = [parts[start] for start in sorted(parts)]
        if not Int4Weight.fits(ordered):
            self._unpack(parameter, parts)
            return
        layer = self._model.get_submodule(parameter.removesuffix(".weight"))
        assert isinstance(layer, Linear)
        layer.replace_weight(Int4Weight(ordered, self._parameters.pop(parameter).device))

    def _unpack(self, parameter: str, parts: dict[int, GroupedWeight]) -> None:
        for start, part in parts.items():
            self._place(Target(parameter, start, part.codes.shape[1])).copy_(part.dense())

    def _place(self, target: Target) -> Tensor:
        parameter = self._parameters[target.parameter]
        return parameter if target.rows is None else parameter[target.start : target.start + target.rows]


def _part(file: Any, name: str, *, table: dict[str, Target], own: set[str], shard: Shard) -> Tensor | None:
    """What a rank, with parameters of its `own`, has of a tensor. None: nothing."""
    if shard.size == 1:
        return file.get_tensor(name)
    target = table[name]
    if target.parameter not in own:
        return None
    piece = file.get_slice(name)
    shape = piece.get_shape()
    wanted = [slice(None)] * len(shape)
    if target.split is not None:
        if shape[target.split] % shard.size:
            raise CheckpointError(f"tensor {name} has shape {shape}, which {shard.size} ranks cannot share")
        part = shape[target.split] // shard.size
        wanted[target.split] = slice(part * shard.rank, part * (shard.rank + 1))
    return piece[tuple(wanted)]


def _read(
    folder: Path, files: dict[str, str], part: Callable[[Any, str], Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """`part` of each tensor, shard by shard. Raises CheckpointError when index and shard disagree."""
    for shard in sorted(set(files.values())):
        wanted = {name for name, file in files.items() if file == shard}
        with open_weights(folder / shard, "pt") as file:
            check_content(shard, set(file.keys()), files)
            for name in sorted(wanted):
                if (tensor := part(file, name)) is not None:
                    yield name, tensor


def _check_names(held: set[str], wanted: set[str]) -> None:
    for problem, names in (("is missing", wanted - held), ("is not part of the model", held - wanted)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"tensor {sorted(names)[0]}{more} {problem}")


_UNCHANGED = {
    "self_attn.o_proj": 1,
    "mlp.down_proj": 1,
    "input_layernorm": None,
    "post_attention_layernorm": None,
}
"""Of a layer, what keeps its name, and the dimension that the ranks divide."""


def _decoder_names(config: TextConfig) -> Iterator[tuple[str, Target]]:
    yield LM_HEAD, Target("lm_head.weight", split=0)
    yield "language_model.model.embed_tokens.weight", Target("decoder.embed_tokens.weight", split=0)
    yield "language_model.model.norm.weight", Target("decoder.norm.weight")
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for index in range(config.num_hidden_layers):
        theirs, ours = f"language_model.model.layers.{index}", f"decoder.layers.{index}"
        for kind in ("weight", "bias"):
            fused = f"{ours}.self_attn.qkv_proj.{kind}"
            yield f"{theirs}.self_attn.q_proj.{kind}", Target(fused, 0, q, split=0)
            yield f"{theirs}.self_attn.k_proj.{kind}", Target(fused, q, kv, split=0)
            yield f"{theirs}.self_attn.v_proj.{kind}", Target(fused, q + kv, kv, split=0)
        fused = f"{ours}.mlp.gate_up_proj.weight"
        yield f"{theirs}.mlp.gate_proj.weight", Target(fused, 0, config.intermediate_size, split=0)
        yield (
            f"{theirs}.mlp.up_proj.weight",
            Target(fused, config.intermediate_size, config.intermediate_size, split=0),
        )
        for name, split in _UNCHANGED.items():
            yield f"{theirs}.{name}.weight", Target(f"{ours}.{name}.weight", split=split)


def _encoder_names(config: AudioConfig) -> Iterator[tuple[str, Target]]:
    yield "audio_tower.embed_positions.weight", Target("audio_tower.embed_positions.weight")
    for kind in ("weight", "bias"):
        for name in ("conv1", "conv2", "layer_norm"):
            yield f"audio_tower.{name}.{kind}", Target(f"audio_tower.{name}.{kind}")
        for index in range(config.encoder_layers):
            layer = f"audio_tower.layers.{index}"
            for shard, name in enumerate(("q_proj", "k_proj", "v_proj")):
                if (name, kind) != ("k_proj", "bias"):
                    target = Target(f"{layer}.qkv_proj.{kind}", shard * config.d_model, config.d_model)
                    yield f"{layer}.self_attn.{name}.{kind}", target
            yield f"{layer}.self_attn.out_proj.{kind}", Target(f"{layer}.out_proj.{kind}")
            for name in ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"):
                yield f"{layer}.{name}.{kind}", Target(f"{layer}.{name}.{kind}")
