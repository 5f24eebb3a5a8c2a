"""What an engine on a CPU leaves out when it starts."""

from __future__ import annotations

import subprocess
import sys

from tests.reference import BUNDLED

BUILD = f"""
import sys
from engine.core import EngineCore
from engine.messages import EngineArgs

EngineCore.build(EngineArgs({str(BUNDLED)!r}, device="cpu"))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "transformers") if name in sys.modules])
"""


def test_torchs_compiler_stays_out_it_would_take_a_second_and_75_mb() -> None:
    found = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == "[]"
