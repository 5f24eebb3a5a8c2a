"""From a checkpoint folder to one rank's model on its device: what every rank does when it starts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.device import resolve_device, resolve_dtype, resolve_token_budget
from engine.errors import EngineStartError
from engine.memory import num_kv_blocks, out_of_memory_means
from engine.messages import EngineArgs
from engine.precision import check_quantization, keeps_int4_packed, keeps_kv_in_fp8
from model.attention import AttentionBackend, select_backend
from model.config import Qwen2AudioConfig
from model.cpu import compile_kernels, prepare_for_cpu
from model.cuda import prepare_for_cuda
from model.dummy import load_dummy
from model.errors import ModelError
from model.loader import Progress, load_model
from model.parallel import Shard
from model.quantization.fp8_linear import round_to_fp8
from model.qwen2_audio import Qwen2Audio


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank's model and what was decided about it; but for the model, all ranks decide the same."""

    model: Qwen2Audio
    dtype_reason: str
    attention_reason: str
    max_model_len: int
    max_num_batched_tokens: int
    max_num_batched_tokens_reason: str
    block_size: int

    def num_kv_blocks(self, args: EngineArgs) -> int:
        """What fits on every rank: all of them have to call it. Raises EngineStartError when that is too little."""
        resolved = replace(args, max_num_batched_tokens=self.max_num_batched_tokens)
        return num_kv_blocks(resolved, self.model, self.block_size, self.max_model_len)


def load_rank(args: EngineArgs, shard: Shard, progress: Progress | None = None) -> LoadedRank:
    """Load one rank's part. Raises EngineStartError, ModelError and torch.OutOfMemoryError."""
    folder = Path(args.model_folder)
    config = Qwen2AudioConfig.from_folder(folder)
    device = resolve_device(args.device, shard)
    if args.num_threads or shard.size > 1:
        torch.set_num_threads(max(1, (args.num_threads or torch.get_num_threads()) // shard.size))
    dtype, dtype_reason = resolve_dtype(args.dtype, config.dtype, device)
    backend, attention_reason = _backend(args, config, device, dtype)
    token_budget, budget_reason = resolve_token_budget(args.max_num_batched_tokens, device)
    max_model_len = _context_length(args, config)
    check_quantization(args, device, dtype)
    fp8_kv = keeps_kv_in_fp8(args, backend)
    if args.load_format == "dummy" and shard.size > 1:
        raise EngineStartError("--load-format dummy is for one rank; leave out --tensor-parallel-size")
    with ThreadPoolExecutor(1) as compiler, out_of_memory_means("while loading: the weights need a larger GPU"):
        if device.type == "cpu":
            compiled = compiler.submit(compile_kernels, config.text.head_dim, backend.block_sizes[0], dtype)
        if args.load_format == "dummy":
            model = load_dummy(folder, config, backend, dtype, device, progress, fp8_kv=fp8_kv)
        else:
            int4 = keeps_int4_packed(args, device)
            model = load_model(
                folder, config, backend, dtype, device, progress, shard, fp8_kv=fp8_kv, keep_int4=int4
            )
    if device.type == "cpu":
        compiled.result()
        prepare_for_cpu(model, int8=args.quantization == "int8")
    else:
        if args.quantization == "fp8":
            round_to_fp8(model.decoder)
        prepare_for_cuda(model)
    return LoadedRank(
        model=model,
        dtype_reason=dtype_reason,
        attention_reason=attention_reason,
        max_model_len=max_model_len,
        max_num_batched_tokens=token_budget,
        max_num_batched_tokens_reason=budget_reason,
        block_size=backend.block_sizes[0],
    )


@contextmanager
def start_errors() -> Iterator[None]:
    """What goes wrong while a rank starts becomes an EngineStartError that says what to mend."""
    try:
        yield
    except ModelError as error:
        raise EngineStartError(str(error)) from error


def _backend(
    args: EngineArgs, config: Qwen2AudioConfig, device: torch.device, dtype: torch.dtype
) -> tuple[AttentionBackend, str]:
    head_dims = config.text.head_dim, config.audio.head_dim
    fp8_kv = args.kv_cache_dtype != "auto"
    return select_backend(args.attention_backend, device, dtype=dtype, head_dims=head_dims, fp8_kv=fp8_kv)


def _context_length(args: EngineArgs, config: Qwen2AudioConfig) -> int:
    longest = config.text.max_position_embeddings
    if args.max_model_len is not None and args.max_model_len > longest:
        raise EngineStartError(
            f"--max-model-len {args.max_model_len}: the checkpoint was made for {longest} at most"
        )
    return args.max_model_len or longest
