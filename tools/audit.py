"""Known vulnerabilities of everything that is locked: `make audit`, by pip-audit.

Where the database cannot be reached nothing has been audited: that fails too, and says so, unless `--or-say-so` asks
for the words alone, for machines that have an index of packages and no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.locked import DEV, ROOT, RUNTIME, TOOLS, TORCH

PIP_AUDIT = str(Path(sys.executable).with_name("pip-audit"))
COMMAND = [PIP_AUDIT, "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--requirement"]
UNREACHABLE = 3


def ask(path: Path) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package of a file; None where it cannot say anything."""
    answer = subprocess.run([*COMMAND, str(path)], capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        print(answer.stderr.strip().splitlines()[-1:] or "pip-audit said nothing", file=sys.stderr)
        return None
    return found if any("skip_reason" not in one for one in found) else None


def findings(packages: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each that is vulnerable, or that the database does not know."""
    lines = []
    for one in packages:
        if "skip_reason" in one:
            lines.append(f"{one['name']}: {one['skip_reason']}")
        for found in one.get("vulns", ()):
            fixed = ", ".join(found["fix_versions"]) or "no version"
            lines.append(f"{one['name']} {one['version']}: {found['id']}, fixed in {fixed}")
    return lines


def main(arguments: list[str]) -> int:
    """-> exit status: 1 for findings, 3 where there is no telling."""
    status = 0
    for path in (RUNTIME, TORCH, DEV, TOOLS):
        name = path.relative_to(ROOT)
        packages = ask(path)
        if packages is None:
            print(f"{name}: NOT AUDITED, the database of vulnerabilities cannot be reached from here")
            status = status or (0 if "--or-say-so" in arguments else UNREACHABLE)
            continue
        lines = findings(packages)
        print("\n".join([f"{name}: {len(packages)} packages, {len(lines)} findings", *lines]))
        status = 1 if lines else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
