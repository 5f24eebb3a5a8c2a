"""THIRD_PARTY.md: the licences of what is shipped. `make licences` writes it; an unknown licence fails.

A package's own SPDX expression counts, then what `STATED` has, read in its licence file where its metadata is vague,
then the classifiers that leave no doubt.
"""

from __future__ import annotations

import sys

from license_expression import ExpressionError, get_spdx_licensing

from tools.locked import ROOT, Locked
from tools.metadata import Metadata, ask, shipped

ALLOWED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "LGPL-2.1-or-later",
    "LLVM-exception", "MIT", "MIT-0", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
NVIDIA = "LicenseRef-NVIDIA-Proprietary"  # allowed for NVIDIA's own libraries: NOTICE says what that means
STATED = {
    "cuda-toolkit": NVIDIA,  # no more than a list of the others
    "jinja2": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "numba": "BSD-2-Clause",
    "nvidia-cusparselt-cu13": NVIDIA,
    "nvidia-nvtx": "Apache-2.0",
    "soundfile": "BSD-3-Clause",
    "protobuf": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause AND BSD-3-Clause AND BSL-1.0 AND MIT",
}
CLASSIFIERS = {
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
FILE = ROOT / "THIRD_PARTY.md"
HEADING = """# What is installed beside Tympan

The packages that the image for CUDA has, with the licences they declare; versions and hashes are in `requirements/`.
An image for a CPU and `make setup` with a CPU's torch have the same without NVIDIA's, `cuda-*` and Triton. `NOTICE`
says more of what some bring inside. Written by `make licences`, which fails where a licence is not known or allowed.

| package | licence |
| --- | --- |
"""


def licence_of(name: str, metadata: Metadata | None) -> str:
    """An SPDX expression whose every part is allowed. ValueError otherwise."""
    classified = {CLASSIFIERS.get(one, "") for one in metadata.classifiers} - {""} if metadata else set()
    said = (metadata.licence_expression or _parsed(metadata.licence_text)) if metadata else ""
    expression = said or STATED.get(name) or (classified.pop() if len(classified) == 1 else "")
    allowed = ALLOWED | {NVIDIA} if name.startswith(("nvidia-", "cuda-")) else ALLOWED
    parts = set(get_spdx_licensing().license_keys(expression)) if expression else set()
    if not parts or parts - allowed:
        found = expression or (metadata.licence_text[:80] if metadata else "")
        raise ValueError(f"{name}: licence {found!r} is not known or not allowed: see tools/licences.py")
    return expression


def _parsed(text: str) -> str:
    """What older metadata says, where it is an SPDX expression, or what NVIDIA writes in place of one."""
    if text == NVIDIA:
        return text
    try:
        get_spdx_licensing().parse(text, validate=True, strict=True)
    except ExpressionError:
        return ""
    return text


def metadata_of(packages: list[Locked]) -> dict[str, Metadata]:
    """Torch's is not asked for: which of its builds an index has differs."""
    return ask(one for one in packages if one.name != "torch")


def page(packages: list[Locked]) -> str:
    """The whole of THIRD_PARTY.md."""
    known = metadata_of(packages)
    rows = [f"| {one.name} | {licence_of(one.name, known.get(one.name))} |\n" for one in packages]
    return HEADING + "".join(rows)


def main(arguments: list[str]) -> int:
    """Write the page; with --check, say whether it is what would be written. -> exit status."""
    text = page(shipped())
    if "--check" not in arguments:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        print("THIRD_PARTY.md is out of date: run `make licences`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
