"""The environment that an engine process starts with. Some libraries read theirs once, as they load. Torch-free.

On a CPU:
- Threads that wait for each other sleep soon (`GOMP_SPINCOUNT`). GCC's OpenMP runtime would spin for milliseconds,
  on a core that the thread it waits for needs whenever anything else runs: the HTTP process, say. A step then takes
  up to fifty times as long; sleeping sooner costs a few per cent on an idle machine.
- Memory is kept rather than returned (`MALLOC_*`, glibc). Activations are large and as short-lived as an operator:
  returned, each is mapped and zeroed anew by the kernel.
- Memory asks for huge pages (`GLIBC_TUNABLES`): weights are read whole for every token, and a tenth of that
  time goes into looking up pages of 4 KiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

CPU_ENGINE = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@contextmanager
def engine_environment(device: str) -> Iterator[None]:
    """Processes spawned meanwhile get the settings for `--device`; what the operator has set stays."""
    added = {} if device == "cuda" else {name: value for name, value in CPU_ENGINE.items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:
        added.pop("GOMP_SPINCOUNT", None)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
