"""The README's figures are the comparison's."""

from __future__ import annotations

import json

from benchmarks.readme import BEGIN, COMMAND, END, NOT_MEASURED, table, with_figures
from benchmarks.servers import ROOT
from tests.benchmarks.documents import comparison

PAGE = f"# A\n{BEGIN}old\n{END}rest\n"


def test_the_readme_shows_the_kept_comparison() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    document = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "compare.json").read_text(encoding="utf-8"))
    assert readme == with_figures(readme, document), f"run `{COMMAND}`"


def test_rows_hold_what_was_measured() -> None:
    document = {**comparison(), "versions": {"transformers": "5.24.0"}, "peers": {"vllm": "0.32.0+cpu"}}
    lines = list(table(document))
    assert lines[0] == "| | Tympan | vLLM 0.32.0+cpu | transformers 5.24.0, static batch |"
    assert "| 16 at once, 10 s of audio: requests/s | 6.0 | 3.0 | 1.0 |" in lines
    assert "| 1 at once, 2 s of audio: median seconds to the first token | 0.05 | 0.20 | 2.0 |" in lines
    assert f"| 1 at once, 10 s of audio: milliseconds a token | 5.0 | 8.0 | {NOT_MEASURED} |" in lines
    assert "| memory under load, GB | 1.1 | 5.4 | |" in lines
    assert lines[-1].startswith("63 M random weights in bfloat16, the same requests of 64 output tokens")
    for cell in document["cells"]:
        del cell["vllm"]
    del document["servers"]["vllm"], document["peers"]
    assert f"| 16 at once, 10 s of audio: requests/s | 6.0 | {NOT_MEASURED} | 1.0 |" in list(table(document))


def test_only_what_stands_between_the_marks_is_written() -> None:
    document = {**comparison(), "versions": {"transformers": "5.24.0"}}
    once = with_figures(PAGE, document)
    assert once.startswith(f"# A\n{BEGIN}\n| | Tympan |")
    assert once.endswith(f"\n\n{END}rest\n")
    assert with_figures(once, document) == once
