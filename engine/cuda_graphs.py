"""Decode steps as CUDA graphs: the host launches one thing instead of hundreds.

A graph repeats what was queued while it was captured: the same kernels, shapes and addresses, whatever the host has
learned since. So a captured step reads static buffers only, which one copy fills before each replay, and its
attention finds all lengths there (`AttentionBackend.supports_graphs`). Batches are padded to the next of a few sizes
with rows of length 0 that write nothing. Graphs of all sizes share the buffers and one pool of memory, as one runs
at a time; their logits stay until the next replay.

Which steps replay is one rule, `DecodeGraphs.takes`: one token for each sequence, none of them audio. Steps with
prompts or drafts run eagerly: they compute long enough for the host to keep up. How a graph is captured is an
argument, so that this is tested where no CUDA is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.device import copy_into, free_bytes
from engine.input_batch import InputBatch, decode_section, pad_decodes
from engine.messages import SequenceId
from model.attention import AttentionMetadata
from model.qwen2_audio import Qwen2Audio


class Graph(Protocol):
    """What was queued while it was captured."""

    def replay(self) -> None:
        """Queue it again."""
        ...


Capture = Callable[[Callable[[], None]], Graph]
"""Runs a function that reads and writes static buffers only, at least once, and makes a graph of what it queued."""


class CudaCapture:
    """Captures on a stream of its own; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Graph:
        """The warm-up compiles kernels and makes handles and workspaces, none of which may happen in a capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph


def graph_capture(model: Qwen2Audio, enforce_eager: bool) -> tuple[Capture | None, str]:
    """-> (how to capture, or None: nothing is, and why not)."""
    device = model.device
    if enforce_eager:
        return None, "--enforce-eager"
    if device.type != "cuda":
        return None, f"{device.type} has none"
    if not model.backend.supports_graphs:
        return None, f"attention {model.backend.name} reads lengths on the host"
    if model.shard.size > 1:
        return None, "--tensor-parallel-size: all ranks would have to replay together"
    return CudaCapture(device), ""


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Sequences of the captured steps: 1, 2, 4, then every eighth, and the most that run at once."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


class DecodeGraphs:
    """One graph for each bucket. `capture` makes one, `replay` runs the one that fits."""

    def __init__(
        self,
        model: Qwen2Audio,
        kv_cache: Tensor,
        max_num_seqs: int,
        max_model_len: int,
        capture: Capture,
    ) -> None:
        """kv_cache: [L, 2, N, P, Hkv, D], whose address the graphs keep."""
        device = model.device
        self._model = model
        self._kv_cache = kv_cache
        self._capture = capture
        self._max_model_len = max_model_len
        self._width = -(-max_model_len // kv_cache.shape[3])
        self.sizes = bucket_sizes(max_num_seqs)
        self._graphs: dict[int, Graph] = {}
        num_inputs = 5 * decode_section(max_num_seqs) + max_num_seqs * self._width
        self._inputs = torch.zeros(num_inputs, dtype=torch.int32, device=device)
        """What `pad_decodes` gives."""
        self._query_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """The tokens of the step before, which the host may not know yet."""
        self._logits = torch.zeros(max_num_seqs, model.config.text.vocab_size, device=device)
        self.num_bytes = 0
        """Of the device's memory, that the graphs have taken."""
        self.seconds = 0.0
        """That all captures took."""

    @torch.inference_mode()
    def capture(self, *sizes: int) -> None:
        """Make the graphs of these buckets, or of all: the largest first, whose memory the others reuse."""
        started, free = time.monotonic(), free_bytes(self._logits.device)
        for size in sorted(sizes or self.sizes, reverse=True):
            section = decode_section(size)
            self._inputs.zero_()
            self._inputs[2 * section : 3 * section].fill_(-1)  # no row writes to the cache
            self._graphs[size] = self._capture(lambda size=size: self._step(size))  # type: ignore[misc]
        self.num_bytes += free - free_bytes(self._logits.device)
        self.seconds += time.monotonic() - started

    def __str__(self) -> str:
        size = f"{self.num_bytes / 2**30:.2f} GiB"
        return f"{len(self._graphs)} of decode steps, up to {self.sizes[-1]} sequences: {size}, {self.seconds:.1f} s"

    def takes(self, batch: InputBatch) -> bool:
        """Whether a batch can be replayed."""
        return batch.num_decodes == len(batch.query_lens) <= self.sizes[-1] and not batch.audio_rows

    def replay(self, batch: InputBatch, rows_before: Mapping[SequenceId, int], sampled: Tensor | None) -> Tensor:
        """Compute a batch that it takes. -> float32 [B, V], to be used, or overwritten, before the next replay.

        rows_before: of each sequence with a pending token, its row in `sampled`, int64 [B'].
        """
        num_rows = len(batch.query_lens)
        size = next(size for size in self.sizes if size >= num_rows)
        inputs = pad_decodes(batch, size, self._width, rows_before)
        copy_into(self._inputs[: len(inputs)], inputs)
        if sampled is not None:
            self._sampled[: len(sampled)].copy_(sampled)
        self._graphs[size].replay()
        return self._logits[:num_rows]

    def _step(self, size: int) -> None:
        """What a graph repeats: from the inputs to the logits, for `size` rows."""
        section = decode_section(size)
        sections = self._inputs[: 5 * section].view(5, section)[:, :size]
        token_ids, positions, slot_mapping, seq_lens, sources = sections
        pending = self._sampled.index_select(0, sources.clamp(min=0))
        token_ids = torch.where(sources < 0, token_ids, pending.int())
        metadata = AttentionMetadata(
            query_lens=(1,) * size,
            seq_lens=(self._max_model_len,) * size,
            num_decodes=size,
            first_blocks=(None,) * size,
            block_table=self._inputs[5 * section :][: size * self._width].view(size, self._width),
            slot_mapping=slot_mapping,
            seq_lens_device=seq_lens,
            query_starts=self._query_starts[: size + 1],
        )
        hidden = self._model(self._model.embed(token_ids), positions, self._kv_cache, metadata)
        self._logits[:size].copy_(self._model.compute_logits(hidden))
