"""Compile kernels for an H200 where none is, as the real code launches them.

    launches = record(monkeypatch, paged_decode, "_kernel")   # the module's kernel keeps its launches from now on
    paged_decode.paged_decode(...)                            # with tensors of the CPU: nothing is computed
    code = compile_for_h200(launches[0])
    assert not code.spills and code.shared_bytes < MAX_SHARED_BYTES

Arguments are specialised as Triton does it at a launch: integers of 1 become constants, pointers and integers that
are multiples of 16 are known to be. It needs no device, and takes about a second for each kernel.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

MAX_SHARED_BYTES = 227 * 1024
"""That one program can have on compute capability 9.0."""

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


@dataclass(frozen=True)
class Launch:
    """What a kernel was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By the names of the kernel's parameters."""
    options: dict[str, int]


@dataclass
class Recorder:
    """Stands in for a kernel."""

    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        assert arguments.keys() == set(self.kernel.arg_names), "every parameter is given, and no other"
        self.launches.append(Launch(self.kernel, grid, arguments, options))


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[Launch]:
    """Replace a kernel, a name in a module, by one that keeps its launches. -> the list that they go to."""
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    return recorder.launches


@dataclass(frozen=True)
class MachineCode:
    """A kernel for compute capability 9.0."""

    cubin: bytes
    shared_bytes: int

    @cached_property
    def sass(self) -> str:
        """The instructions, one a line."""
        return _run(triton.knobs.nvidia.nvdisasm.path, self.cubin)

    @cached_property
    def _usage(self) -> dict[str, int]:
        text = _run(triton.knobs.nvidia.cuobjdump.path, self.cubin, "-res-usage")
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self._usage["REG"]

    @property
    def spills(self) -> bool:
        """Whether anything is kept in local memory, which is slow."""
        return bool(self._usage["STACK"] or self._usage["LOCAL"] or re.search(r"\b(LDL|STL)\b", self.sass))

    def count(self, instruction: str) -> int:
        """Instructions whose name, with its suffixes, matches a regular expression from its beginning."""
        return len(re.findall(rf"^\s*(?:/\*\w+\*/)?\s*(?:@!?\w+ )?\s*(?:{instruction})", self.sass, re.MULTILINE))


def compile_for_h200(launch: Launch) -> MachineCode:
    """The kernel as this launch needs it."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        elif _is_aligned(value) and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
    return MachineCode(compiled.asm["cubin"], compiled.metadata.shared)


def _kind(value: Any, as_it_is: bool) -> str:
    """A parameter's type in a signature."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and not as_it_is):
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _run(program: str, cubin: bytes, *flags: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([program, *flags, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
