"""How this process keeps the memory that it has freed. glibc's; nothing is done where there is another.

glibc maps large blocks one by one and gives them back when they are freed, but raises what it calls large, up to
32 MiB, each time that one is: after the first large body the next ones come from the heap, which grows by them for
good wherever something small lies behind. Setting the threshold ends that. Bodies, clips and samples are
few and large: what mapping them costs is nothing beside reading them.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""malloc.h's."""
LARGE_BYTES = 256 << 10


def give_large_blocks_back() -> None:
    """For the whole process, from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)
