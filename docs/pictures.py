"""The playground's pictures in docs/images: `python -m docs.pictures --url URL`, after `make browser`.

Of a server with the bundled checkpoint: a conversation in light and dark, and the same on a telephone.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT / "tests" / "fixtures" / "speech"
SPOKEN = SPEECH / "digits_four_two_seven.wav"
IMAGES = ROOT / "docs" / "images"
FLAGS = [
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    f"--use-file-for-fake-audio-capture={SPOKEN}%noloop",
]
DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 760}}
TELEPHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "has_touch": True}


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    url = parser.parse_args().url
    path = os.environ.get("CHROME_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for name, options in (
            ("light", {**DESKTOP, "color_scheme": "light"}),
            ("dark", {**DESKTOP, "color_scheme": "dark"}),
            ("mobile", {**TELEPHONE, "color_scheme": "light"}),
        ):
            page = converse(browser, url, options)
            page.screenshot(path=IMAGES / f"playground-{name}.png")
            page.close()
        browser.close()


def converse(browser: Browser, url: str, options: dict[str, Any]) -> Page:
    """A page with two turns: one spoken, one about a file. -> it."""
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.locator("#state[data-state]").wait_for()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1700)
    page.get_by_role("button", name="Stop and send").click()
    page.locator(".answer .actions").wait_for()
    page.locator("#files").set_input_files(SPEECH / "command_open_the_door.wav")
    page.locator("#clips .clip.drawn").wait_for()
    page.get_by_label("Question, if you have one").fill("What does the person say?")
    page.get_by_role("button", name="Send", exact=True).click()
    page.locator(".answer .actions").nth(1).wait_for()
    page.wait_for_timeout(500)
    return page


if __name__ == "__main__":
    main()
