"""Lighthouse's judgement of the playground: `python -m benchmarks.lighthouse --url URL`, after `make browser`.

Prints the scores, 0 to 100, and with --output writes them with the versions and all audits that did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CATEGORIES = ("accessibility", "best-practices", "performance")
TOOL = Path(".browser/node_modules/lighthouse/cli/index.js")
FLAGS = "--headless --no-sandbox"  # a container's root cannot have Chromium's own sandbox


def audit(url: str, tool: str, chromium: str) -> dict[str, Any]:
    """The scores of the page, and what lowered them. Raises CalledProcessError."""
    node = Path(tool).parents[3] / "bin" / "node"
    command = [
        *(str(node), tool, url, "--quiet", "--output=json", f"--chrome-flags={FLAGS}", "--preset=desktop"),
        f"--only-categories={','.join(CATEGORIES)}",
    ]
    environment = {**os.environ, "CHROME_PATH": chromium}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    report = json.loads(done.stdout)
    audits = report["audits"]
    lowering = {
        reference["id"]: audits[reference["id"]]["title"]
        for name in CATEGORIES[:2]
        for reference in report["categories"][name]["auditRefs"]
        if reference["weight"] and audits[reference["id"]]["score"] not in (None, 1)
    }
    return {
        **{name: round(100 * report["categories"][name]["score"]) for name in CATEGORIES},
        "lighthouse": report["lighthouseVersion"],
        "chromium": report["environment"]["hostUserAgent"].split("Chrome/")[-1].split()[0],
        "not_passed": lowering,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    chromium = os.environ.get("CHROME_PATH") or shutil.which("chromium") or "google-chrome"
    scores = audit(arguments.url, str(TOOL.absolute()), chromium)
    text = json.dumps({"command": "python -m benchmarks.lighthouse", **scores}, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
