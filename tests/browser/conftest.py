"""The playground in Chromium with a microphone that hears a file; `make browser` installs what that takes.

A `Visitor` is one page of one visit. What it asks of any host, and what its console says, is checked at its end.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT, bundled_server
from tests.server.conftest import checkpoint, encoder, servers, tokenizer

__all__ = ["bundled_server", "checkpoint", "encoder", "servers", "tokenizer"]

SPEECH = ROOT / "tests" / "fixtures" / "speech"
SPOKEN = SPEECH / "digits_four_two_seven.wav"
"""What the microphone hears, once."""
WORDS = "four two seven"
TOOLS = ROOT / ".browser" / "node_modules"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    f"--use-file-for-fake-audio-capture={SPOKEN}%noloop",
)
WAIT_MS = 60_000


def chromium_path() -> str:
    """Fails the test where there is none."""
    found = os.environ.get("CHROME_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("Chromium is missing: `apt-get install chromium`, or name one in CHROME_PATH")
    return found


def tool(path: str) -> Path:
    """A file of the npm packages. Fails the test where it is missing."""
    if not (TOOLS / path).exists():
        pytest.fail(f"{path} is missing: run `make browser`")
    return TOOLS / path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Playwright's handle of one browser."""
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        pytest.fail("playwright is missing: run `make browser`")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Visitor:
    """One page, and what it did."""

    page: Any
    url: str
    urls: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of the chat requests."""
    complaints: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))

    def _note(self, request: Any) -> None:
        self.urls.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(json.loads(request.post_data))

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def add(self, *paths: Path) -> None:
        """Choose files for the turn, and wait until they are drawn."""
        before = self.page.locator("#clips .clip").count()
        self.page.locator("#files").set_input_files(list(paths))
        self.page.locator("#clips .clip.drawn").nth(before + len(paths) - 1).wait_for()

    def ask(self, question: str = "") -> str:
        """Send the turn. -> the answer, whole."""
        done = self.page.locator(".answer .actions").count()
        self.page.get_by_label("Question, if you have one").fill(question)
        self.button("Send").click()
        self.page.locator(".answer .actions").nth(done).wait_for()
        answer: str = self.page.locator(".answer .said").last.inner_text()
        return answer


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visitor]]:
    """Open a server's page. At the end: no request went elsewhere, and the console is silent but for `expected`."""
    visitors: list[tuple[Visitor, str]] = []

    def open_page(url: str, expected: str = "", **options: Any) -> Visitor:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        visitor = Visitor(context.new_page(), url)
        visitor.watch()
        visitors.append((visitor, expected))
        visitor.page.goto(f"{url}/")
        visitor.page.locator("#state[data-state]").wait_for()
        return visitor

    yield open_page
    for visitor, expected in visitors:
        visitor.page.context.close()
        assert visitor.urls
        assert [url for url in visitor.urls if not url.removeprefix("blob:").startswith(visitor.url)] == []
        assert [text for text in visitor.complaints if not expected or expected not in text] == []
