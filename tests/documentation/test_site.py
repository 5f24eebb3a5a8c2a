"""The site builds without a warning, links lead through it, and its generated pages are what they are made from."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.reference import settings_page
from configs.settings import Settings
from docs import site
from docs.fields import fields_page
from server.api.openapi import operations
from server.api.routes import router

from .code_blocks import PAGES

ROOT = Path(__file__).parents[2]
ROOMS = (
    *("server", "engine", "model", "audio", "configs", "tympan"),
    *("tests", "tools", "deploy", "docs", "benchmarks", "checkpoints"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it: a link, an anchor or an image that leads nowhere fails here."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_repositorys_own_links_lead_through_the_site(built: Path) -> None:
    home = (built / "index.html").read_text(encoding="utf-8")
    assert 'href="files/benchmarks/results/cpu/compare.json"' in home
    assert 'href="security.html"' in home
    assert 'src="images/cpu.png"' in home
    for copied in ("files/benchmarks/results/cpu/compare.json", "images/cpu.png", "images/gpu.png"):
        assert (built / copied).stat().st_size > 1000


def test_every_route_and_field_has_its_row() -> None:
    rows = [line for line in fields_page().splitlines() if line.startswith("| `")]
    for route, operation in operations(router.routes):
        (method,) = route.methods
        assert any(row.startswith(f"| `{method} {route.path.replace(':path', '')}` |") for row in rows)
        for model in (operation.body, operation.form):
            for name, field in (model.model_fields if model else {}).items():
                assert any(row.startswith(f"| `{field.alias or name}` |") for row in rows), name
    assert "| `temperature` | number, ≥ 0, ≤ 2 |  |" in rows
    assert any(row.startswith("| `messages` | list of [Message](#message) or ") for row in rows)


def test_the_settings_page_is_fresh() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run `python -m configs.reference > docs/configuration.md`"
    for name in Settings.model_fields:
        assert f"`TYMPAN_{name.upper()}`" in page


def test_defaults_that_pages_name_are_those_of_the_settings() -> None:
    """Where they are written as `--max-num-seqs` (64)."""
    written = re.compile(r"`--([a-z-]+)`,? \(([\d,.]+)[;)]")
    found = [(page, *one) for page in PAGES for one in written.findall((ROOT / page).read_text(encoding="utf-8"))]
    assert len(found) > 10
    for page, name, shown in found:
        default = Settings.model_fields[name.replace("-", "_")].default
        assert default == pytest.approx(float(shown.replace(",", ""))), f"{page}: --{name}"


def test_sources_that_pages_name_exist() -> None:
    """By their path in the repository, or the end of it."""
    sources = [f"/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    named = re.compile(r"`([\w/]+\.py)`")
    found = {(page, name) for page in PAGES for name in named.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert len(found) > 100
    assert not [one for one in found if not any(source.endswith(f"/{one[1]}") for source in sources)]


def test_the_reading_order_is_as_long_as_it_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", page, re.MULTILINE)
    assert len(rows) > 10
    lengths = [len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file, _ in rows]
    for (file, said), length in zip(rows, lengths, strict=True):
        assert length == pytest.approx(int(said), abs=30), f"{file} has {length} lines"
    (total,) = re.findall(r"in this order, about ([\d,]+) lines", page)
    assert sum(lengths) == pytest.approx(int(total.replace(",", "")), rel=0.1)


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ("<img alt=x src=//cdn.example/x.png>", True),
        ('<link rel="stylesheet" href="https://fonts.example/css">', True),
        ("a { background: url('https://cdn.example/x.png') }", True),
        ('<a href="https://example.com">elsewhere</a>', False),
        ('<script src="assets/x.js"></script><link href="assets/x.css">', False),
    ],
)
def test_what_would_ask_another_host_fails_the_build(text: str, asks: bool) -> None:
    assert (site.request_in(text) is not None) is asks


def test_pipes_in_the_code_of_tables() -> None:
    text = "| `<\\|AUDIO\\|>` | a \\| b |\n`<\\|x`\n```\n| `\\|` |\n```\n"
    assert site.plain_pipes(text) == "| `<|AUDIO|>` | a \\| b |\n`<\\|x`\n```\n| `\\|` |\n```\n"


def test_links_in_code_stay() -> None:
    text = "[the API](docs/api.md#tools)\n```\n[the API](docs/api.md#tools)\n```\n[none](docs/none.md)"
    turned = "[the API](api.md#tools)\n```\n[the API](docs/api.md#tools)\n```\n[none](docs/none.md)"
    assert site.turn_links("index.md", text) == turned
