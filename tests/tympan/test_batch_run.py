"""A batch at work against servers that answer, refuse, are busy, or go away."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Servers
from tympan import batch, batch_run
from tympan.batch_files import ResultFile
from tympan.batch_run import BatchStopped, Outcome, Target, run_batch

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Twenty lines, and one that is none."""
    return write_requests(tmp_path / "in.jsonl", 20)


def write_requests(path: Path, count: int) -> Path:
    bodies = [{"messages": [{"role": "user", "content": f"number {index}"}]} for index in range(count)]
    lines = [
        json.dumps({"custom_id": f"r{index}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        for index, body in enumerate(bodies)
    ]
    path.write_text("\n".join([*lines, "no request"]) + "\n")
    return path


def run(requests: Path, handler: Handler, *, patience_s: float = 0.0) -> tuple[Outcome, list[dict[str, Any]]]:
    output = requests.with_name("out.jsonl")
    results = ResultFile.open(output)

    async def main() -> Outcome:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://host/v1") as client:
            return await run_batch(Target(client, 4, 1 << 20, patience_s), requests, results, shown=False)

    try:
        outcome = asyncio.run(main())
    finally:
        results.close()
    return outcome, results_of(output)


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(request: httpx.Request) -> httpx.Response:
    assert request.url == "http://host/v1/chat/completions"
    said = json.loads(request.content)["messages"][0]["content"]
    return httpx.Response(200, json={"said": said}, headers={"x-request-id": "q"})


def test_every_line_has_its_result(requests: Path) -> None:
    outcome, results = run(requests, answer)
    assert (outcome.num_answered, outcome.num_failed) == (20, 1)
    for result in results:
        if result["custom_id"] is None:
            assert result["error"]["line"] == 21
        else:
            body = {"said": f"number {result['custom_id'][1:]}"}
            assert result["response"] == {"status_code": 200, "request_id": "q", "body": body}
    outcome, again = run(requests, lambda _: pytest.fail("asked again"))
    assert (outcome.num_answered, outcome.num_failed) == (0, 1)
    assert sorted(map(str, again[:-1])) == sorted(str(result) for result in results if result["custom_id"])


def test_failures_are_done_anew(requests: Path) -> None:
    def every_third_fails(request: httpx.Request) -> httpx.Response:
        number = int(json.loads(request.content)["messages"][0]["content"].split()[1])
        return answer(request) if number % 3 else httpx.Response(500, text="<html>proxy</html>")

    outcome, results = run(requests, every_third_fails)
    assert outcome.num_failed == 7 + 1
    failed = next(result for result in results if result["custom_id"] == "r3")
    assert failed["response"]["status_code"] == 500
    assert failed["response"]["body"]["error"]["message"] == "<html>proxy</html>"
    outcome, results = run(requests, answer)
    assert (outcome.num_answered, outcome.num_failed) == (7, 1)
    assert sorted(str(result["custom_id"]) for result in results) == sorted([f"r{n}" for n in range(20)] + ["None"])


@pytest.mark.parametrize("failure", [429, 503, httpx.ConnectError("refused"), httpx.ReadError("reset")])
def test_a_server_that_is_busy_or_away_is_asked_again(failure: int | Exception, requests: Path) -> None:
    asked: set[bytes] = set()

    def second_time(request: httpx.Request) -> httpx.Response:
        if request.content in asked:
            return answer(request)
        asked.add(request.content)
        if isinstance(failure, Exception):
            raise failure
        return httpx.Response(failure, headers={"Retry-After": "0"})

    outcome, _ = run(requests, second_time, patience_s=5)
    assert (outcome.num_answered, outcome.num_failed) == (20, 1)


@pytest.mark.parametrize("failure", [503, httpx.ConnectError("refused")])
def test_a_server_that_stays_away_stops_the_run(failure: int | Exception, requests: Path) -> None:
    num_asked = 0

    def five_answers(request: httpx.Request) -> httpx.Response:
        nonlocal num_asked
        num_asked += 1
        if num_asked <= 5:
            return answer(request)
        if isinstance(failure, Exception):
            raise failure
        return httpx.Response(failure)

    with pytest.raises(BatchStopped):
        run(requests, five_answers, patience_s=0.05)
    kept = results_of(requests.with_name("out.jsonl"))
    assert 1 <= len(kept) <= 5
    assert all(result["response"]["status_code"] == 200 for result in kept)
    outcome, results = run(requests, answer)
    assert outcome.num_answered == 20 - len(kept)
    assert len(results) == 21


def test_a_server_that_stays_busy_fails_the_line(requests: Path) -> None:
    outcome, results = run(requests, lambda _: httpx.Response(429, json={"error": {}}), patience_s=0.05)
    assert outcome.num_failed == 21
    assert {result["response"]["status_code"] for result in results if result["custom_id"]} == {429}


def test_against_a_server(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = servers.start(api_key=("secret",))
    served.say("Hello there!")
    requests, output = write_requests(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    arguments = ["batch", "-i", str(requests), "-o", str(output), "--url", f"{served.url}/v1", "--concurrency", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert batch.main() == 1
    assert {result["response"]["status_code"] for result in results_of(output) if result["response"]} == {401}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert batch.main() == 1  # for the line that is no request
    answers = [result["response"]["body"] for result in results_of(output) if result["response"]]
    assert [body["choices"][0]["message"]["content"] for body in answers] == ["Hello there!"] * 5
    requests.write_text("".join(requests.read_text().splitlines(keepends=True)[:5]))
    assert batch.main() == 0


def test_links_to_inside_addresses_are_refused_in_their_lines(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-34753: a batch fetches by the server's own rules, and what it may not reach gets no packet."""
    served = servers.start()
    served.say("Hello there!")
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as inside:
        port = inside.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}/a.wav", f"http://[::ffff:127.0.0.1]:{port}/a.wav",
                f"http://localhost:{port}/a.wav", "http://169.254.169.254/latest", "file:///etc/passwd"]  # fmt: skip
        lines = []
        for index, url in enumerate([None, *urls, None]):
            part = {"type": "audio_url", "audio_url": {"url": url}} if url else {"type": "text", "text": "Hi"}
            body = {"messages": [{"role": "user", "content": [part]}]}
            line = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.append(json.dumps(line) + "\n")
        requests.write_text("".join(lines))
        arguments = ["batch", "-i", str(requests), "-o", str(output), "--url", f"{served.url}/v1"]
        monkeypatch.setattr(sys, "argv", arguments)
        assert batch.main() == 1
        inside.settimeout(0.2)
        with pytest.raises(TimeoutError):
            inside.accept()
    answers = {result["custom_id"]: result["response"] for result in results_of(output)}
    statuses = [answers[f"r{index}"]["status_code"] for index in range(len(lines))]
    assert statuses == [200, *[400] * len(urls), 200]
    codes = {answers[f"r{index + 1}"]["body"]["error"]["code"] for index in range(len(urls))}
    assert codes == {"media_url_refused"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-i {in} -o {out} --port 8000", "--port"),
        ("-i {in} -o {out} --temprature 0", "--temprature"),
        ("-i {in} -o {out} --max-num-seqs 0", "max-num-seqs"),
        ("-i {in} -o {out} --url ftp://host", "--url"),
        ("-i {in} -o {out} --url http://host/v1 --dtype float32", "--dtype"),
        ("-i {in} -o {out} --concurrency 0", "--concurrency"),
        ("-i {in}.no -o {out}", "no file"),
        ("-i {in} -o {in}", "the file of the requests"),
        ("-i {in} -o {folder}", "directory"),
        ("-i {in} -o {folder}/no/out", "No such file"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: str,
    words: str,
    requests: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = arguments.format_map({"in": requests, "out": tmp_path / "out", "folder": tmp_path})
    monkeypatch.setattr(sys, "argv", ["batch", *named.split()])
    before = requests.read_bytes()
    assert batch.main() == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1
    assert requests.read_bytes() == before


def test_help_is_quick_and_complete() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tympan.batch", "--help"], capture_output=True, text=True, timeout=30, check=True
    )
    for flag in ("--input", "--output", "--url", "--concurrency", "--no-progress"):
        assert flag in done.stdout
