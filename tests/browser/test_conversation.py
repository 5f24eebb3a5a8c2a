"""Spoken and written turns, their answers, and what can be done with them, against the bundled checkpoint."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ServerProcess

from .conftest import SPEECH, SPOKEN, WORDS, Visitor

pytestmark = pytest.mark.browser


def record(visitor: Visitor, seconds: float = 2.5) -> None:
    visitor.button("Record").click()
    visitor.button("Stop recording").wait_for()
    visitor.page.wait_for_timeout(1000 * seconds)


def test_spoken_words_come_back(bundled_server: ServerProcess, visit: Callable[..., Visitor]) -> None:
    """Record, stop, send: the words are on the page. The next turn sends the recording again."""
    visitor = visit(bundled_server.url)
    assert "digits" in visitor.page.locator("#model-hint").inner_text()
    record(visitor)
    assert visitor.page.locator("#recording .time").inner_text() != "0:00"
    visitor.button("Stop recording").click()
    visitor.page.locator("#clips .clip.drawn").wait_for()
    assert WORDS in visitor.ask()
    part = visitor.bodies[0]["messages"][0]["content"]
    assert [piece["type"] for piece in part] == ["input_audio"]
    assert part[0]["input_audio"]["format"] == "webm"
    assert base64.b64decode(part[0]["input_audio"]["data"]).startswith(b"\x1aE\xdf\xa3")  # Matroska
    figures = visitor.page.locator(".stats").first.inner_text()
    assert "ms to the first token" in figures
    assert "tokens/s" in figures
    assert visitor.page.locator("#announcer").inner_text() == visitor.page.locator(".answer .said").inner_text()

    assert visitor.ask("What does the person say?")
    roles = [message["role"] for message in visitor.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert visitor.bodies[1]["messages"][0] == visitor.bodies[0]["messages"][0]


def test_stop_and_send_is_one_press(bundled_server: ServerProcess, visit: Callable[..., Visitor]) -> None:
    """A recording can also be thrown away."""
    visitor = visit(bundled_server.url)
    record(visitor, 0.5)
    visitor.button("Discard the recording").click()
    visitor.button("Record").wait_for()
    assert visitor.button("Send").is_disabled()
    visitor.button("Record your voice").click()
    visitor.page.wait_for_timeout(2500)
    visitor.button("Stop and send").click()
    visitor.page.locator(".answer .actions").wait_for()
    assert WORDS in visitor.page.locator(".answer .said").inner_text()


def test_files_questions_and_settings(bundled_server: ServerProcess, visit: Callable[..., Visitor]) -> None:
    """Two are chosen and one is dropped; one is taken away; what is set goes along, what is not does not."""
    visitor = visit(bundled_server.url)
    visitor.add(SPOKEN, SPEECH / "sound_bell.wav")
    handle = visitor.page.evaluate_handle(
        "data => { const files = new DataTransfer(); const bytes = Uint8Array.from(atob(data), c => c.charCodeAt());"
        " files.items.add(new File([bytes], 'dropped.wav', {type: 'audio/wav'})); return files; }",
        base64.b64encode((SPEECH / "command_stop.wav").read_bytes()).decode(),
    )
    visitor.page.dispatch_event("body", "drop", {"dataTransfer": handle})
    visitor.page.locator("#clips .clip.drawn").nth(2).wait_for()
    visitor.button("Remove sound_bell.wav").click()
    for name, value in (("Temperature", "0"), ("Seed", "7"), ("Max tokens", "20"), ("System prompt", "Listen.")):
        visitor.page.get_by_label(name, exact=True).fill(value)
    assert visitor.ask("What does the person say?")
    system, user = visitor.bodies[0].pop("messages")
    assert system == {"role": "system", "content": "Listen."}
    assert [part["type"] for part in user["content"]] == ["input_audio", "input_audio", "text"]
    sent = [base64.b64decode(part["input_audio"]["data"]) for part in user["content"][:2]]
    assert sent == [SPOKEN.read_bytes(), (SPEECH / "command_stop.wav").read_bytes()]
    assert visitor.bodies[0] == {
        "model": "tympan-tiny", "temperature": 0, "seed": 7, "max_tokens": 20,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    visitor.page.get_by_label("Temperature").fill("9")
    visitor.page.get_by_label("Question, if you have one").fill("More?")
    visitor.button("Send").click()
    assert visitor.page.locator(".question").count() == len(visitor.bodies) == 1
    visitor.button("New").click()
    assert visitor.page.locator(".turn").count() == 0
    assert visitor.page.locator("#welcome").is_visible()


def test_copied_code_runs(bundled_server: ServerProcess, visit: Callable[..., Visitor], tmp_path: Path) -> None:
    """Where the file lies, whatever it is called and the question says."""
    visitor = visit(bundled_server.url, permissions=["clipboard-read", "clipboard-write"])
    clip = tmp_path / "it's $HOME `x` \\.wav"
    shutil.copy(SPOKEN, clip)
    visitor.page.get_by_label("Temperature").fill("0")
    visitor.add(clip)
    answer = visitor.ask("What does the person say?")
    assert answer == WORDS
    plain = {name: os.environ[name] for name in ("PATH", "HOME")}
    for name, command in (("curl", ["bash"]), ("Python", [sys.executable, "-"])):
        visitor.page.locator("#toast").evaluate("toast => toast.textContent = ''")
        visitor.button(f"Copy as {name}").click()
        visitor.page.get_by_text(f"{name} {'command' if name == 'curl' else 'program'} copied.").wait_for()
        program = visitor.page.evaluate("() => navigator.clipboard.readText()")
        assert "base64" in program
        assert len(program) < 2000
        done = subprocess.run(
            command, input=program, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert WORDS in done.stdout, program


def test_a_small_screen_has_room_for_all(bundled_server: ServerProcess, visit: Callable[..., Visitor]) -> None:
    """360 px wide: nothing is cut off at the side, in either half, and each button keeps its name."""
    visitor = visit(bundled_server.url, viewport={"width": 360, "height": 640}, has_touch=True)
    visitor.add(SPOKEN)
    assert visitor.ask("What does the person say?") == WORDS
    visitor.add(SPEECH / "sound_bell.wav")
    visitor.button("Record").wait_for()
    visitor.button("New").wait_for()
    wide = "() => document.documentElement.scrollWidth"
    assert visitor.page.evaluate(wide) == 360
    visitor.page.get_by_text("Settings", exact=True).click()
    assert visitor.page.evaluate(wide) == 360
    visitor.page.get_by_role("tab", name="Transcribe").click()
    assert visitor.page.evaluate(wide) == 360


def test_transcripts_are_saved_as_subtitles(bundled_server: ServerProcess, visit: Callable[..., Visitor]) -> None:
    """Text as it comes, subtitles as a file, segments with times."""
    visitor = visit(bundled_server.url)
    page = visitor.page
    page.get_by_role("tab", name="Talk").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#file").set_input_files(SPOKEN)
    page.get_by_label("Language").select_option("en")

    def transcribe(kind: str) -> None:
        page.get_by_label("Format").select_option(kind)
        visitor.button("Transcribe").click()
        page.locator("#result .row").wait_for()

    transcribe("text")
    assert page.locator("#result pre").inner_text() == WORDS
    transcribe("srt")
    with page.expect_download() as event:
        visitor.button("Save digits_four_two_seven.srt").click()
    assert event.value.suggested_filename == "digits_four_two_seven.srt"
    saved = Path(event.value.path()).read_text(encoding="utf-8")
    assert saved.startswith("1\n00:00:00,000 --> 00:00:01,")
    assert WORDS in saved
    transcribe("verbose_json")
    assert WORDS in page.locator(".segments li").inner_text()
    page.get_by_label("Task").select_option("translations")
    transcribe("vtt")
    assert page.locator("#result pre").inner_text().startswith("WEBVTT")
