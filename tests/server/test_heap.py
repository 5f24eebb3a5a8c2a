"""Large blocks go back to the system when they are freed: in a process of its own, as history matters."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from server.heap import give_large_blocks_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "set":
    give_large_blocks_back()
before = resident()
first = bytearray(b"x") * (24 << 20)
del first  # glibc now takes 24 MiB for small
large, small = [], []
for _ in range(4):
    large.append(bytearray(b"x") * (16 << 20))
    small.append(bytearray(100_000))
del large
print(resident() - before)
"""


def test_large_blocks_are_given_back() -> None:
    kept = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True).stdout)
        for how in ("set", "unset")
    }
    assert kept["set"] < 4 << 20
    assert kept["unset"] > kept["set"]
