"""The environment that an engine process starts with. Some libraries read theirs once, as they load. Torch-free.

On a CPU:
- Threads that wait for each other sleep soon (`GOMP_SPINCOUNT`). GCC's OpenMP runtime would spin for milliseconds,
  on a core that the thread it waits for needs whenever anything else runs: the HTTP process, say. A step then takes
  up to fifty times as long; sleeping sooner costs a few per cent on an idle machine.
- Memory is kept rather than returned (`MALLOC_*`, glibc). Activations are large and as short-lived as an operator:
  returned, each is mapped and zeroed anew by the kernel.
- Memory asks for huge pages (`GLIBC_TUNABLES`): weights are read whole for every token, and a tenth of that
  time goes into looking up pages of 4 KiB.
- Threads are no more than a container's CPU limit allows (`OMP_NUM_THREADS`, see engine/cores.py); without one
  OpenMP counts the cores. What is left of a core is the HTTP process's.
- Generated code is forgotten (`ONEDNN_*`, and `LRU_CACHE_CAPACITY` of the layer above it). oneDNN generates code for
  every size of a product that it meets, about 0.5 MB each, and would keep 1,024 of them twice: a server that meets
  prompts of all lengths grows by a gigabyte. Generating one anew takes 0.3 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from engine.cores import affine_cores, usable_cores

CPU_ENGINE = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "256",
}


@contextmanager
def engine_environment(device: str) -> Iterator[None]:
    """Processes spawned meanwhile get the settings for `--device`; what the operator has set stays."""
    wanted = {} if device == "cuda" else CPU_ENGINE | _threads()
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:
        added.pop("GOMP_SPINCOUNT", None)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _threads() -> dict[str, str]:
    cores = usable_cores()
    return {"OMP_NUM_THREADS": str(cores)} if cores < affine_cores() else {}
