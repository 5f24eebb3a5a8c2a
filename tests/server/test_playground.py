"""The page under /: whole, open to read, closed to everything else, and bound to its own origin."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from server.playground import POLICY, WAVEFORM_STYLE
from server.transcription.languages import LANGUAGES

from .conftest import Served, Servers

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "server" / "static"
VENDOR = STATIC / "vendor"
MODULES = sorted(path.name for path in STATIC.glob("*.js"))
SOURCES = [path for path in STATIC.iterdir() if path.is_file()]


class Links(HTMLParser):
    """What a page loads, and what it has inside that a strict policy forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.urls += [url for name in ("src", "href") if (url := names.get(name)) and not url.startswith("#")]
        self.inline += [name for name in names if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)


@pytest.fixture(scope="module")
def closed(servers: Servers) -> Served:
    return servers.start(api_key=("secret",))


def test_page_and_all_that_it_loads_are_open(closed: Served) -> None:
    """Everything that the page names, or a module of it, is there, for a visitor without a key."""
    page = closed.client.get(f"{closed.url}/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    links = Links(page.text)
    assert links.inline == []
    wanted = {*links.urls, *(f"static/{name}" for name in MODULES)}
    imports = {f"static/{name}" for path in STATIC.glob("*.js") for name in re.findall(
        r'from "\./([\w./]+)"', path.read_text(encoding="utf-8"))}  # fmt: skip
    assert imports <= {f"static/{name}" for name in MODULES} | {"static/vendor/wavesurfer.esm.js"}
    types = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
    for url in wanted | imports:
        answer = closed.client.get(f"{closed.url}/{url}")
        assert answer.status_code == 200, url
        assert answer.headers["content-type"] == types[Path(url).suffix]
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_names_another_host(path: Path) -> None:
    """URLs are relative, so that a proxy may put the page under a prefix; namespaces are no links."""
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[\w-]+\.\w", text)
    assert not re.search(r"""(src|href)=["']/""", text)


def test_policy_binds_the_page_to_its_origin() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


def test_policy_allows_the_style_sheet_of_the_waveform() -> None:
    """It is in the library's text, but for the height, which is waveform.js's."""
    library = (VENDOR / "wavesurfer.esm.js").read_text(encoding="utf-8")
    height = re.search(r"const HEIGHT = (\d+);", (STATIC / "waveform.js").read_text(encoding="utf-8"))
    style = re.search(r"<style\$\{.*?\}>(.*?)</style>", library)
    assert height
    assert style
    text = re.sub(r"\$\{.*?\}px", f"{height[1]}px", style[1].encode().decode("unicode_escape"))
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"'sha256-{digest}'" == WAVEFORM_STYLE


def test_only_reading_the_files_needs_no_key(closed: Served) -> None:
    for method, path, status in (
        ("HEAD", "/", 200),
        ("POST", "/", 401),
        ("OPTIONS", "/static/app.js", 401),
        ("GET", "/static/nothing.js", 401),
        ("GET", "/static/", 401),
        ("GET", "/static/%2e%2e/v1/models", 401),
        ("GET", "/static/app.js/../../v1/models", 401),
        ("GET", "/static/index.html", 401),
        ("GET", "/static/playground.py", 401),
        ("GET", "/v1/models", 401),
    ):
        answer = closed.client.request(method, closed.url + path)
        assert answer.status_code == status, (method, path)
    head = closed.client.head(f"{closed.url}/")
    assert head.content == b""
    assert int(head.headers["content-length"]) > 1000


def test_a_browser_keeps_the_files_and_asks_whether_they_changed(served: Served) -> None:
    url = f"{served.url}/static/app.js"
    first = served.client.get(url)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        again = served.client.get(url, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert served.client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    refused = served.client.post(url)
    assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})
    assert served.client.get(f"{served.url}/static/nothing.js").status_code == 404


def test_metrics_name_the_page_and_its_files(served: Served) -> None:
    served.client.get(f"{served.url}/")
    served.client.get(f"{served.url}/static/app.js")
    metrics = served.client.get(f"{served.url}/metrics").text
    assert re.search(r'="/static/\{name\}"', metrics)
    assert re.search(r'="/"', metrics)
    assert "app.js" not in metrics


def test_the_page_can_be_left_out(servers: Servers) -> None:
    server = servers.start(playground=False)
    for path in ("/", "/static/app.js"):
        assert server.client.get(server.url + path).status_code == 404


def test_languages_are_the_server_s() -> None:
    text = (STATIC / "languages.js").read_text(encoding="utf-8")
    assert dict(re.findall(r'(\w+): "([^"]+)"', text)) == LANGUAGES


def vendored() -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((VENDOR / "vendored.json").read_text(encoding="utf-8"))
    return files


def test_vendored_files_are_those_that_were_published() -> None:
    files = vendored()
    known = {name for file in files for name in (file["file"], file["license_file"])}
    assert {path.name for path in VENDOR.iterdir()} == known | {"vendored.json"}
    for file in files:
        assert hashlib.sha256((VENDOR / file["file"]).read_bytes()).hexdigest() == file["sha256"]
        assert "Redistributions" in (VENDOR / file["license_file"]).read_text(encoding="utf-8")


def test_an_installed_server_has_the_files(tmp_path: Path) -> None:
    """The wheel holds them all. It is built from a copy: the build would leave files beside the sources."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("server", "engine", "model", "audio", "configs", "tympan"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "import setuptools.build_meta as build, sys; build.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=source, check=True, capture_output=True, timeout=120
    )
    wheel = next(tmp_path.glob("*.whl"))
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(ROOT).as_posix() for path in STATIC.rglob("*") if path.is_file()} <= packed
