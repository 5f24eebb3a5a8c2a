"""Which attention backend is chosen where, and what is said of those that cannot run."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from model.attention import select as selection
from model.attention import select_backend
from model.attention.cpu import CpuBackend
from model.attention.flash_attn import FlashAttentionBackend
from model.attention.flash_attn_3 import FlashAttention3Backend
from model.attention.reference import ReferenceBackend
from model.attention.torch_varlen import TorchVarlenBackend
from model.attention.triton import TritonBackend
from model.errors import ConfigError
from tests.model.fake_flash import fake_flash_attn, fake_flash_attn_3

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Machine:
    """A machine with a GPU of some capability, some packages and some torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.gpu(9, 0)
        self.torch("2.13.0+cu130")
        self.packages()

    def gpu(self, *capability: int) -> None:
        self._monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def torch(self, version: str) -> None:
        self._monkeypatch.setattr(torch, "__version__", version)

    def packages(self, **packages: ModuleType) -> None:
        for name in ("flash_attn", "flash_attn_interface"):
            self._monkeypatch.setitem(sys.modules, name, packages.get(name))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With a Hopper GPU, torch 2.13 and no package."""
    return Machine(monkeypatch)


def choose(name: str, device: torch.device = CUDA, **needs: Any) -> tuple[Any, str]:
    return select_backend(name, device, **{"dtype": torch.bfloat16, "head_dims": (128, 64), **needs})


def refusal(name: str, device: torch.device = CUDA, **needs: Any) -> str:
    """What an explicit request is told."""
    with pytest.raises(ConfigError) as refused:
        choose(name, device, **needs)
    return str(refused.value)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    assert refusal("flashy", CPU) == (
        "attention backend 'flashy' is not known; choose auto, triton, flash_attn, torch_varlen, cpu, reference"
    )


def test_a_cpu_takes_its_own_kernel() -> None:
    backend, reason = select_backend("auto", CPU)
    assert (type(backend), reason) == (CpuBackend, "compiled for this CPU")
    assert select_backend("cpu", CPU)[1] == "asked for; compiled for this CPU"


def test_without_the_runtime_of_its_kernel_a_cpu_falls_back_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "parallel_region", lambda: 0)
    backend, reason = select_backend("auto", CPU)
    assert type(backend) is ReferenceBackend
    assert reason == ("plain torch; cpu is not available: this build of torch does not use GCC's OpenMP runtime")


@pytest.mark.parametrize("name", ["triton", "flash_attn", "torch_varlen"])
def test_what_is_made_for_cuda_says_so_on_a_cpu(name: str) -> None:
    assert refusal(name, CPU) == f"attention backend '{name}' is not available: it runs on CUDA, not on cpu"


def test_the_cpu_kernel_says_where_it_runs(machine: Machine) -> None:
    assert refusal("cpu").endswith("it runs on a CPU, not on cuda")


def test_own_kernels_come_first_on_cuda(machine: Machine) -> None:
    machine.packages(flash_attn=fake_flash_attn(), flash_attn_interface=fake_flash_attn_3())
    backend, reason = choose("auto")
    assert (type(backend), reason) == (TritonBackend, "own kernels")


def test_the_next_best_says_what_the_better_ones_lack(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "IS_INSTALLED", False)
    machine.packages(flash_attn=fake_flash_attn())
    backend, reason = choose("auto")
    assert type(backend) is FlashAttentionBackend
    assert reason == (
        "flash-attn 2.8.3; FlashAttention 3 is not installed; "
        "triton is not available: the package triton is not installed"
    )
    machine.packages()
    assert type(choose("auto")[0]) is TorchVarlenBackend
    machine.torch("2.11.0+cu130")
    backend, reason = choose("auto")
    assert type(backend) is ReferenceBackend
    assert [part.partition(" is not available")[0] for part in reason.split("; ")] == [
        "plain torch", "triton", "flash_attn", "torch_varlen",
    ]  # fmt: skip


def test_hopper_takes_flash_attention_3_where_it_is_installed(machine: Machine) -> None:
    both = {"flash_attn": fake_flash_attn(), "flash_attn_interface": fake_flash_attn_3()}
    machine.packages(**both)
    backend, reason = choose("flash_attn")
    assert (type(backend), reason) == (FlashAttention3Backend, "asked for; made for this GPU")
    machine.gpu(8, 9)
    assert choose("flash_attn")[1] == "asked for; flash-attn 2.8.3"


@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({"dtype": torch.float32}, "its kernels compute in float16 and bfloat16, not in float32"),
        ({"head_dims": (128, 68)}, "its kernels take heads of a multiple of 8 up to 256, not of 68"),
        ({"head_dims": (288,)}, "its kernels take heads of a multiple of 8 up to 256, not of 288"),
        ({"fp8_kv": True}, "its kernels read no float8 cache with scales of its own; triton does"),
    ],
    ids=str,
)
def test_what_the_kernels_of_flash_attention_cannot_is_said(
    machine: Machine, name: str, needs: dict[str, Any], said: str
) -> None:
    machine.packages(flash_attn=fake_flash_attn())
    assert refusal(name, **needs).endswith(said)


@pytest.mark.parametrize("name", ["triton", "flash_attn", "torch_varlen"])
def test_an_old_gpu_is_named(machine: Machine, name: str) -> None:
    machine.gpu(7, 5)
    assert refusal(name).endswith("it needs compute capability 8.0, this GPU has 7.5")
    assert type(choose("auto")[0]) is ReferenceBackend


def test_a_package_that_is_missing_or_broken_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("flash_attn").endswith("flash-attn is not installed: pip install --no-build-isolation .[flash]")

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(selection.importlib, "import_module", broken)
    assert refusal("flash_attn").endswith("flash-attn cannot be imported: undefined symbol: _ZN3c10")


def test_a_torch_without_paging_is_named(machine: Machine) -> None:
    machine.torch("2.12.1")
    assert "torch 2.12.1 it could serve the encoder alone" in refusal("torch_varlen")
    machine.torch("2.14.0a0+git123")
    assert type(choose("torch_varlen")[0]) is TorchVarlenBackend


def test_with_a_cache_in_float8_own_kernels_read_it(machine: Machine) -> None:
    machine.packages(flash_attn=fake_flash_attn())
    assert type(choose("auto", fp8_kv=True)[0]) is TritonBackend
