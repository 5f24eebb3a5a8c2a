"""A CUDA graph in software: the operators that a function queued, repeated on the very tensors it queued them on.

Python is not run again, so nothing that the host has learned since can reach a replay; before each one all
intermediate results are spoilt, so nothing of the replay before can either; and what would make a capture fail on
CUDA, reading a tensor back, fails here. `DeviceBackend` is attention that takes all lengths from tensors, as a
kernel that can be captured does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention import AttentionMetadata, EncoderMetadata
from model.attention.reference import quantise_kv, rotate
from model.fp8 import movable

SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()  # packed weights hide theirs


@dataclass
class Call:
    """An operator as it was queued."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @cached_property
    def fresh(self) -> list[tuple[int, Tensor]]:
        """Its results that are neither views of its arguments nor arguments themselves."""
        given = {address(tensor) for tensor in tensors((self.args, self.kwargs))}
        return [(k, out) for k, out in enumerate(tensors(self.out)) if address(out) not in given]

    def replay(self) -> None:
        if not self.fresh and not self.function._schema.is_mutable:
            return  # a view: its place in memory has not changed
        again = tensors(self.function(*self.args, **self.kwargs))
        for k, out in self.fresh:
            out.copy_(again[k])


class NoReading(TorchFunctionMode):
    """Refuses what brings a tensor to the host without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in ("tolist", "numpy", "cpu", "__array__"), f"{func} waits"
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Keeps what is queued inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in SYNCS, f"{name} waits for the device"
        assert not (name == "aten::index" and any(t.dtype == torch.bool for t in tensors(args[1]))), "waits too"
        out = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, args, kwargs or {}, out))
        return out


@dataclass
class Tape:
    """Stands for a torch.cuda.CUDAGraph."""

    calls: list[Call]
    num_replays: int = 0

    @torch.inference_mode()
    def replay(self) -> None:
        self.num_replays += 1
        for call in self.calls:
            for _, out in call.fresh:
                out.fill_(float("nan") if out.is_floating_point() else 1 if out.dtype == torch.bool else 77)
        for call in self.calls:
            call.replay()


@dataclass
class TapeCapture:
    """Stands for `engine.cuda_graphs.CudaCapture`."""

    tapes: list[Tape] = field(default_factory=list)

    def __call__(self, run: Callable[[], None]) -> Tape:
        run()
        with NoReading(), Recorder() as recorder:
            run()
        self.tapes.append(Tape(recorder.calls))
        return self.tapes[-1]


class DeviceBackend:
    """Attention of one query for each sequence, or of prompts, with every length read from tensors."""

    name = "device"
    block_sizes = (16,)
    supports_graphs = True
    supports_fp8_kv = True

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        return weights

    def decode(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """Each token looks at all places of its sequence's blocks; those past its own are masked."""
        query, key, value = rotate(heads, cos, sin, kv_layer.shape[3])
        stored = (key, value) if kv_scales is None else quantise_kv(key, value, kv_scales)
        slots = movable(kv_layer.flatten(1, 2))
        places = metadata.slot_mapping.long()
        skipped = (places < 0)[:, None, None]
        for cache, new in zip(slots, stored, strict=True):
            at = places.clamp(min=0)
            cache.index_copy_(0, at, torch.where(skipped, cache.index_select(0, at), movable(new)))
        rows = torch.arange(query.shape[0], dtype=torch.int32)
        sequence = torch.searchsorted(metadata.query_starts[1:].contiguous(), rows, right=True)
        ends = metadata.query_starts.index_select(0, sequence + 1)
        visible = metadata.seq_lens_device.index_select(0, sequence) - (ends - 1 - rows)
        table = metadata.block_table.index_select(0, sequence)
        num_places = table.shape[1] * kv_layer.shape[2]
        keys, values = (
            layer.index_select(0, table.flatten()).view(kv_layer.dtype).view(-1, num_places, *kv_layer.shape[3:])
            for layer in movable(kv_layer)
        )
        if kv_scales is not None:
            keys, values = (x.float() * scales[:, None] for x, scales in zip((keys, values), kv_scales, strict=True))
        group = query.shape[1] // keys.shape[2]
        keys, values = (x.repeat_interleave(group, dim=2) for x in (keys, values))
        hidden = torch.arange(num_places) >= visible[:, None]
        scores = (query[:, None] * keys).sum(-1) / query.shape[2] ** 0.5  # [T, S, H]
        weights = scores.masked_fill(hidden[..., None], float("-inf")).softmax(1).nan_to_num(0.0)
        values = values.masked_fill(hidden[..., None, None], 0.0)  # unused places may hold anything, NaN too
        return (weights[..., None] * values).sum(1).masked_fill((visible <= 0)[:, None, None], 0.0)

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """Dense, and masked to each frame's own clip, where NaN stays."""
        assert metadata.starts is not None
        frames = torch.arange(query.shape[0], dtype=torch.int32)
        clip = torch.searchsorted(metadata.starts[1:].contiguous(), frames, right=True)
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
        own = clip[:, None] == clip[None]
        weights = scores.masked_fill(~own, float("-inf")).softmax(-1).nan_to_num(0.0)
        out = torch.einsum("hqk,khd->qhd", weights, value.nan_to_num(0.0))
        broken = own.float() @ value.isnan().flatten(1).any(1).float() > 0
        return out.masked_fill(broken[:, None, None], float("nan"))
