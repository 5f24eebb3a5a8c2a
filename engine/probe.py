"""What torch finds on this machine, asked in a process of its own so that nobody else has to load it."""

from __future__ import annotations

import platform
from multiprocessing.connection import Connection

import torch

from engine import channel
from engine.messages import DeviceReport, GpuReport


def main(connection: Connection) -> None:
    """Entry point of the child process: one report."""
    channel.send(connection, report())


def report() -> DeviceReport:
    """Versions, and the GPUs with what is free of their memory."""
    is_there = torch.cuda.is_available()
    return DeviceReport(
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        cpu=f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())) if is_there else (),
    )


def _gpu(index: int) -> GpuReport:
    free, total = torch.cuda.mem_get_info(index)
    return GpuReport(torch.cuda.get_device_name(index), total, free)
