"""What is shipped has a licence in THIRD_PARTY.md, and the page is about what is locked."""

from __future__ import annotations

import json
import re

from tools.locked import ROOT, RUNTIME, TORCH, read

ROWS = dict(re.findall(r"^\| (\S+) \| (.+) \|$", (ROOT / "THIRD_PARTY.md").read_text(), re.MULTILINE)[2:])


def test_every_package_that_is_shipped_has_a_licence_and_no_other() -> None:
    shipped = {one.name for path in (RUNTIME, TORCH) for one in read(path) if one.is_here}
    assert ROWS.keys() == shipped, "run `make licences`"


def test_nothing_is_under_terms_that_bind_tympan_itself() -> None:
    for name, licence in ROWS.items():
        assert not re.search(r"(?<!L)GPL|SSPL|BUSL|Commons-Clause", licence), name
        assert ("NVIDIA" in licence) <= name.startswith(("nvidia-", "cuda-")), name


def test_the_notice_names_what_is_vendored() -> None:
    folder = ROOT / "server/static/vendor"
    notice = (ROOT / "NOTICE").read_text()
    for entry in json.loads((folder / "vendored.json").read_text()):
        assert entry["package"] in notice
        assert (folder / entry["license_file"]).exists()
