"""Everybody can use it: axe finds nothing in any state of the page, Lighthouse little, the keyboard reaches all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.lighthouse import audit
from tests.integration.conftest import ServerProcess
from tests.server.conftest import Servers

from .conftest import SPOKEN, Visitor, chromium_path, tool

pytestmark = pytest.mark.browser


def check(visitor: Visitor) -> None:
    """No rule of axe's is broken, best practices included."""
    visitor.page.evaluate(tool("axe-core/axe.min.js").read_text(encoding="utf-8"))
    visitor.page.wait_for_timeout(300)  # colours fade in
    result = visitor.page.evaluate("() => axe.run()")
    found = [
        (rule["id"], node["html"], node["failureSummary"]) for rule in result["violations"] for node in rule["nodes"]
    ]
    assert found == []
    assert len(result["passes"]) > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(bundled_server: ServerProcess, visit: Callable[..., Visitor], scheme: str) -> None:
    visitor = visit(bundled_server.url, color_scheme=scheme)
    page = visitor.page
    paper = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, paper.strip("rgb()").split(","))) < 382) == (scheme == "dark")
    check(visitor)
    visitor.add(SPOKEN)
    visitor.button("Record").click()
    visitor.button("Stop recording").wait_for()
    check(visitor)
    visitor.button("Discard the recording").click()
    assert visitor.ask("What does the person say?")
    check(visitor)
    page.get_by_role("tab", name="Transcribe").click()
    page.locator("#file").set_input_files(SPOKEN)
    visitor.button("Transcribe").click()
    page.locator("#result .row").wait_for()
    check(visitor)
    page.set_viewport_size({"width": 360, "height": 640})
    check(visitor)
    visitor.button("Light colours" if scheme == "dark" else "Dark colours").click()
    assert page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor") != paper
    check(visitor)


def test_axe_finds_nothing_where_something_is_wrong(servers: Servers, visit: Callable[..., Visitor]) -> None:
    server = servers.start(api_key=("right",))
    visitor = visit(server.url, "401 (Unauthorized)")
    visitor.page.get_by_text("You didn't provide an API key.").wait_for()
    visitor.ask("Hi")
    check(visitor)


def test_the_keyboard_reaches_all_in_order(bundled_server: ServerProcess, visit: Callable[..., Visitor]) -> None:
    visitor = visit(bundled_server.url)
    reached = []
    for _ in range(14):
        visitor.page.keyboard.press("Tab")
        name = (
            "() => document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
        )
        reached.append(visitor.page.evaluate(name))
    assert reached == [
        *("skip", "tab-chat", "theme", "thread", "hero", "question", "record", "attach", "SUMMARY"),
        *("model", "system", "temperature", "top_p", "max_tokens"),
    ]


def test_lighthouse(bundled_server: ServerProcess) -> None:
    scores = audit(f"{bundled_server.url}/", str(tool("lighthouse/cli/index.js")), chromium_path())
    assert scores["accessibility"] >= 95, scores
    assert scores["best-practices"] >= 95, scores
