"""What an H200 would run: the attention kernels compiled for it, from the launches of the real shapes.

Without a GPU this is what can be known of speed: nothing spills, enough fits beside each other, reads are 16 bytes
wide and under way while tensor cores multiply.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from model.triton_kernels import encoder_attention, paged_decode, paged_prefill, rotate_and_write
from tests.model.aot import MAX_SHARED_BYTES, MachineCode, compile_for_h200, record

ASYNCHRONOUS_READ = r"LDGSTS\.E\.BYPASS\.LTC128B\.128|LDGSTS\.E\S*\.128"
MMA = r"HMMA\.16816\.F32"
WARP_GROUP_MMA = r"HGMMA\.64x\d+x16\.F32"
SM_SHARED_BYTES = 228 * 1024
SM_REGISTERS = 64 * 1024
SHAPES = {"7B": (32, 32, 128), "bundled": (8, 8, 64), "grouped": (32, 8, 128)}
CACHES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def step_of(num_tokens: int, num_sequences: int, shape: str, cache: str) -> tuple[torch.Tensor, ...]:
    """Tensors of a step, on the CPU and of the right shapes: query, kv_layer, block_table, lengths, starts, out."""
    num_heads, num_kv_heads, head_dim = SHAPES[shape]
    query = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.bfloat16)
    kv_layer = torch.zeros(2, 4, 16, num_kv_heads, head_dim).to(CACHES[cache])
    integers = torch.zeros(num_sequences * 70, dtype=torch.int32)
    table = integers[: num_sequences * 63].view(num_sequences, 63)
    return query, kv_layer, table, integers[:num_sequences], integers[: num_sequences + 1], query.clone()


def scales_of(shape: str, cache: str) -> torch.Tensor | None:
    return torch.ones(2, SHAPES[shape][1]) if cache == "float8" else None


def programs_at_once(code: MachineCode, num_warps: int) -> int:
    """Of one multiprocessor; each program has 1 KiB of shared memory besides its own."""
    by_memory = SM_SHARED_BYTES // (code.shared_bytes + 1024)
    return min(by_memory, SM_REGISTERS // (-(-code.registers // 8) * 8 * 32 * num_warps))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 64])
def test_decodes_read_ahead_and_multiply_on_tensor_cores(
    batch: int, shape: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record(monkeypatch, paged_decode, "_kernel")
    record(monkeypatch, paged_decode, "_reduce_kernel")
    paged_decode.paged_decode(*step_of(batch, batch, shape, cache), batch, batch, scales_of(shape, cache))
    (launch,) = launches
    code = compile_for_h200(launch)
    assert not code.spills
    assert code.count(ASYNCHRONOUS_READ) >= 8
    assert code.count(r"LDG\S*\.128") >= 1, "the queries"
    assert code.count(MMA) >= 16
    assert programs_at_once(code, launch.options["num_warps"]) >= 2
    assert launch.grid == (SHAPES[shape][1], batch, paged_decode.num_shares(batch, SHAPES[shape][1]))


def test_shares_are_added_up_in_wide_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    record(monkeypatch, paged_decode, "_kernel")
    launches = record(monkeypatch, paged_decode, "_reduce_kernel")
    paged_decode.paged_decode(*step_of(1, 1, "7B", "bfloat16"), 1, 1)
    code = compile_for_h200(launches[0])
    assert not code.spills
    assert code.count(r"LDG\S*\.128") >= 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_run_on_warp_group_products(shape: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(monkeypatch, paged_prefill, "_kernel")
    paged_prefill.paged_prefill(*step_of(512, 1, shape, cache), 0, 0, scales_of(shape, cache))
    code = compile_for_h200(launches[0])
    assert not code.spills
    assert code.shared_bytes < MAX_SHARED_BYTES
    assert code.count(ASYNCHRONOUS_READ) >= 8
    assert code.count(WARP_GROUP_MMA) >= 8


def test_the_encoder_runs_on_warp_group_products(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(monkeypatch, encoder_attention, "_kernel")
    packed = torch.zeros(1500, 3 * 20 * 64, dtype=torch.bfloat16)
    query, key, value = (x.unflatten(-1, (20, 64)) for x in packed.chunk(3, dim=-1))
    encoder_attention.encoder_attention(query, key, value, torch.zeros(2, dtype=torch.int32))
    (launch,) = launches
    code = compile_for_h200(launch)
    assert not code.spills
    assert code.count(ASYNCHRONOUS_READ) >= 8
    assert code.count(WARP_GROUP_MMA) >= 8
    assert programs_at_once(code, launch.options["num_warps"]) >= 2
    assert launch.grid[0] * launch.grid[1] <= 2 * 132, "a clip of 30 s is one wave"


@pytest.mark.parametrize(("module", "names"), [
    (paged_decode, {"stride_table", "block_table", "seq_lens", "query_starts"}),
    (paged_prefill, {"stride_table", "block_table", "seq_lens", "query_starts", "first_sequence", "num_sequences"}),
    (encoder_attention, {"num_clips", "starts"}),
    (rotate_and_write, {"slot_mapping"}),
])  # fmt: skip
def test_what_changes_from_step_to_step_compiles_nothing_anew(module: ModuleType, names: set[str]) -> None:
    """A table's width, the number of sequences and where a tensor begins in another: Triton would look at each for
    being 1 or a multiple of 16, and compile once more for a second in the middle of the service."""
    parameters = {parameter.name: parameter for parameter in module._kernel.params}
    for name in names:
        assert parameters[name].do_not_specialize or parameters[name].do_not_specialize_on_alignment
