"""The fetcher against origins that lie, stall, redirect inwards and answer DNS twice.

Names resolve through an injected table; only 127.0.0.1 is ever dialled.
"""

import asyncio
import gzip
import ssl

import pytest
import trustme

from audio import AudioError, AudioLimits, FetchPolicy
from audio.fetch import MediaFetcher
from tests.audio.origin import body_of, redirect, response, serving

LIMITS = AudioLimits(max_clip_bytes=100_000)
GOOD = "good.test"


class TableResolver:
    """Answers from a table; a list of lists is served one lookup at a time."""

    def __init__(self, table=None):
        self.table = {GOOD: ["127.0.0.1"], **(table or {})}
        self.lookups = []

    async def __call__(self, host, port):
        self.lookups.append(host)
        answer = self.table.get(host)
        if answer is None:
            raise OSError(f"secret resolver detail about {host}")
        return answer.pop(0) if isinstance(answer[0], list) else answer


def run(scripts, url, *, table=None, limits=LIMITS, resolver=None, **policy):
    """(body or AudioError, origin) for `url`, in which PORT stands for the origin's port."""

    async def scenario():
        async with serving(scripts) as origin:
            scripts.update(
                {
                    path: script.replace(b"PORT", str(origin.port).encode())
                    for path, script in scripts.items()
                    if isinstance(script, bytes)
                }
            )
            settings = {"allowed_private_hosts": {GOOD}} | policy
            fetcher = MediaFetcher(FetchPolicy(**settings), limits, resolver=resolver or TableResolver(table))
            try:
                return await body_of(fetcher, url.replace("PORT", str(origin.port))), origin
            except AudioError as error:
                return error, origin
            finally:
                await fetcher.aclose()

    return asyncio.run(scenario())


def code_of(outcome):
    """The refusal's code; and no refusal may repeat what only the inside knows."""
    assert isinstance(outcome, AudioError), f"fetched {outcome[:40]!r}"
    assert not any(word in outcome.message for word in ("127.0.0.1", "secret", "::1"))
    return outcome.code


def test_fetches_a_body_and_sends_the_name_it_was_given():
    body, origin = run({"/a.wav": response(b"sound")}, f"HTTP://{GOOD}:PORT/a.wav#part")
    assert body == b"sound"
    assert f"Host: {GOOD}:{origin.port}" in origin.requests[0]
    assert "identity" in origin.requests[0]


@pytest.mark.parametrize("exception", ["good.test:PORT", "[::1]:1"])
def test_private_exceptions_are_exact(exception):
    async def scenario():
        async with serving({"/": response(b"x")}) as origin:
            allowed = exception.replace("PORT", str(origin.port))
            policy = FetchPolicy(allowed_private_hosts=frozenset({allowed}))
            fetcher = MediaFetcher(policy, LIMITS, resolver=TableResolver({"other.test": ["127.0.0.1"]}))
            outcomes = []
            for host in (GOOD, "other.test", "127.0.0.1", f"x{GOOD}"):
                try:
                    outcomes.append(await body_of(fetcher, f"http://{host}:{origin.port}/"))
                except AudioError as error:
                    outcomes.append(error.code)
            await fetcher.aclose()
            return outcomes, origin.num_connections

    outcomes, num_connections = asyncio.run(scenario())
    is_match = exception.startswith(GOOD)
    assert outcomes[0] == (b"x" if is_match else "media_url_refused")
    assert outcomes[1:] == ["media_url_refused"] * 3
    assert num_connections == int(is_match)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://good.test/a",
        "file:///etc/passwd",
        "gopher://good.test/",
        "good.test/a.wav",
        "//good.test/a",
        "",
        "http://",
        "http:///a",
        "http://user@good.test/",
        "http://a:b@good.test/",
        "http://good.test@evil.test/",
        "http://good.test\\@evil.test/",
        "http://good.test/a b",
        "http://good.test/\r\nX: y",
        "http://\tgood.test",
        "http://good.test/\x7f",
        "http://good.test\x00/",
        "http://good.test\\.evil.test/",
        "http:\\\\good.test/",
        "http://①②⑦.⓪.⓪.①/",
        "http://%31%32%37.0.0.1/",
        "http://good.test%2f@evil.test/",
        "http://good.test:0/",
        "http://good.test:65536/",
        "http://good.test:99999/",
        "http://good.test:x/",
        "http://[fe80::1%25eth0]/",
        "http://[::1",
        "http://0177.0.0.1/",
        "http://good.test/" + "a" * 2048,
    ],
)
def test_malformed_links_never_reach_the_network(url):
    resolver = TableResolver()
    outcome, _ = run({}, url, resolver=resolver)
    assert code_of(outcome) == "invalid_audio_url"
    assert resolver.lookups == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost",
        "localhost.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "017700000001",
        "0",
        "127。0。0。1",
        "0.0.0.0",
        "127.0.0.1.",
        "0177.1",
        "0x7f.0x0.0x0.0x1",
        "[::]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "[::127.0.0.1]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::1]",
        "[fe80::1]",
        "[fd00::1]",
    ],
)
def test_spellings_of_loopback_get_no_packet(host):
    async def scenario():
        async with serving({"/": response(b"inside")}) as origin:
            fetcher = MediaFetcher(FetchPolicy(), LIMITS)  # the system's resolver: all are literals or local
            with pytest.raises(AudioError) as caught:
                await fetcher.fetch(f"http://{host}:{origin.port}/")
            await fetcher.aclose()
            return caught.value.code, origin.num_connections

    code, num_connections = asyncio.run(scenario())
    assert code in {"media_url_refused", "invalid_audio_url"}
    assert num_connections == 0


def test_a_name_with_one_inside_address_is_refused():
    outcome, origin = run({}, "http://mixed.test:PORT/", table={"mixed.test": ["8.8.8.8", "127.0.0.1"]})
    assert code_of(outcome) == "media_url_refused"
    assert origin.num_connections == 0


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "::ffff:127.0.0.1", "2002:7f00:1::1", "64:ff9b::7f00:1", "100.64.0.1", "fd00::1", "::1"],
)
def test_a_name_for_an_inside_address_is_refused(address):
    started = asyncio.new_event_loop().time()
    outcome, _ = run({}, "http://inside.test/", table={"inside.test": [address]})
    assert code_of(outcome) == "media_url_refused"
    assert asyncio.new_event_loop().time() - started < 1  # nobody was dialled and waited for


def test_unknown_and_inside_names_look_the_same():
    table = {"inside.test": ["10.0.0.1"]}
    unknown, _ = run({}, "http://unknown.test/", table=table)
    inside, _ = run({}, "http://inside.test/", table=table)
    assert (unknown.code, unknown.message) == (inside.code, inside.message)


def test_rebinding_name_is_resolved_once_per_connection_and_checked_each_time(monkeypatch):
    monkeypatch.setattr("audio.transport.is_public", lambda address: str(address) == "127.0.0.1")
    resolver = TableResolver({"flip.test": [["127.0.0.1"], ["127.0.0.2"]]})

    async def scenario():
        async with serving({"/": response(b"first")}) as origin:
            fetcher = MediaFetcher(FetchPolicy(), LIMITS, resolver=resolver)
            url = f"http://flip.test:{origin.port}/"
            assert await body_of(fetcher, url) == b"first"
            assert resolver.lookups == ["flip.test"]
            with pytest.raises(AudioError) as caught:
                await fetcher.fetch(url)
            await fetcher.aclose()
            return caught.value.code, origin.num_connections

    assert asyncio.run(scenario()) == ("media_url_refused", 1)


@pytest.mark.parametrize("location", ["/b", "b", f"http://{GOOD}:PORT/b", f"//{GOOD}:PORT/b"])
def test_good_redirects_are_followed(location):
    body, _ = run({"/a": redirect(location), "/b": response(b"there")}, f"http://{GOOD}:PORT/a")
    assert body == b"there"


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1:PORT/b", "media_url_refused"),
        ("http://evil.test:PORT/b", "media_url_refused"),
        ("//evil.test:PORT/b", "media_url_refused"),
        ("http://169.254.169.254/latest", "media_url_refused"),
        ("http://[::1]:PORT/b", "media_url_refused"),
        ("http://[::ffff:127.0.0.1]:PORT/b", "media_url_refused"),
        ("file:///etc/passwd", "invalid_audio_url"),
        ("gopher://good.test/", "invalid_audio_url"),
        (f"http://user:pass@{GOOD}:PORT/b", "invalid_audio_url"),
        (f"http://{GOOD}:PORT\\@evil.test/b", "invalid_audio_url"),
    ],
)
def test_evil_redirects_are_refused(location, code):
    scripts = {"/a": redirect(location), "/b": response(b"inside")}
    outcome, origin = run(scripts, f"http://{GOOD}:PORT/a", table={"evil.test": ["127.0.0.1"]})
    assert code_of(outcome) == code
    assert origin.num_connections == 1


def test_nothing_of_ours_or_the_clients_goes_out():
    """Not to the first host and not to the next: no credentials, no cookies, not even where we come from."""
    hop = response(b"", "302 Found", "Location: http://next.test:PORT/b?x=1", "Set-Cookie: a=b; Domain=test")
    _, origin = run(
        {"/a": hop, "/b?x=1": response(b"x")},
        f"http://{GOOD}:PORT/a",
        table={"next.test": ["127.0.0.1"]},
        allowed_private_hosts={GOOD, "next.test"},
    )
    assert len(origin.requests) == 2
    for request in origin.requests:
        names = {line.split(":")[0].lower() for line in request.splitlines()[1:] if line}
        assert names == {"host", "accept", "accept-encoding", "connection", "user-agent"}


def test_a_redirect_with_an_endless_body_is_not_read():
    num_sent = 0

    async def endless(writer):
        nonlocal num_sent
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /b\r\nTransfer-Encoding: chunked\r\n\r\n")
        while num_sent < 100_000_000:
            writer.write(b"2710\r\n" + bytes(10_000) + b"\r\n")
            await writer.drain()
            num_sent += 10_000

    body, _ = run({"/a": endless, "/b": response(b"there")}, f"http://{GOOD}:PORT/a")
    assert body == b"there"
    assert num_sent < 20_000_000


def test_redirect_loops_end():
    outcome, origin = run({"/a": redirect("/a")}, f"http://{GOOD}:PORT/a", max_redirects=2)
    assert code_of(outcome) == "media_fetch_failed"
    assert origin.num_connections == 3


@pytest.mark.parametrize(
    "status",
    [
        "201 Created",
        "204 No Content",
        "206 Partial Content",
        "300 Multiple Choices",
        "302 Found",
        "304 Not Modified",
        "401 Unauthorized",
        "407 Proxy Authentication Required",
        "418 secret",
        "500 Internal Server Error",
        "999 secret",
        "099 secret",
        "2000 OK",
    ],
)
@pytest.mark.parametrize("body", [b"", b"secret origin words"])
def test_only_a_plain_200_will_do(status, body):
    outcome, _ = run({"/": response(body, status)}, f"http://{GOOD}:PORT/")
    assert code_of(outcome) == "media_fetch_failed"


@pytest.mark.parametrize(
    "answer",
    [
        response(gzip.compress(b"x" * 1_000), "200 OK", "Content-Encoding: gzip"),
        response(gzip.compress(bytes(20_000_000)), "200 OK", "Content-Encoding: identity, gzip"),
        response(b"x", "200 OK", "Content-Encoding: br"),
        response(b"x", "200 OK", "X-Bomb: " + "y" * 2_000_000),
        response(b"x", "200 OK", *(f"X-{number}: y" for number in range(100_000))),
        response(b"x", "200 OK", "Content-Length: 5"),
        response(b"x", "200 OK", "Transfer-Encoding: gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"x" * 2_000_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"secret: not HTTP at all\r\n\r\n",
        b"",
    ],
    ids=[
        *("gzip", "gzip-bomb", "brotli", "header-bomb", "many-headers", "two-lengths", "transfer-gzip"),
        *("chunk-extension", "chunk-overflow", "negative-chunk", "length-of-5000-digits", "continue", "upgrade"),
        *("short", "negative-length", "wordy-length", "not-http", "hang-up"),
    ],
)
def test_bad_answers_fail_cleanly(answer):
    outcome, _ = run({"/": answer}, f"http://{GOOD}:PORT/")
    assert code_of(outcome) == "media_fetch_failed"


def test_bytes_behind_the_announced_length_are_not_read():
    body, _ = run({"/": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsoundHTTP/1.1 200 OK"}, f"http://{GOOD}:PORT/")
    assert body == b"sound"


def test_announced_size_is_refused_before_the_body():
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n"
    outcome, _ = run({"/": answer}, f"http://{GOOD}:PORT/")
    assert code_of(outcome) == "audio_too_large"


def test_endless_body_is_cut_at_the_limit():
    num_sent = 0

    async def endless(writer):
        nonlocal num_sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while num_sent < 100_000_000:
            writer.write(b"2710\r\n" + bytes(10_000) + b"\r\n")
            await writer.drain()
            num_sent += 10_000

    outcome, _ = run({"/": endless}, f"http://{GOOD}:PORT/")
    assert code_of(outcome) == "audio_too_large"
    assert num_sent < 20_000_000  # the limit, and what socket buffers hold


async def slow_body(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    await drip(writer)


async def slow_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    await drip(writer)


async def drip(writer):
    for _ in range(100):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def slow_informational(writer):
    for _ in range(100):
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


async def slow_chunks(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        writer.write(b"1\r\nx\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("script", [slow_body, slow_headers, slow_chunks, slow_informational])
def test_dripping_origins_meet_the_total_timeout(script):
    started = asyncio.new_event_loop().time()
    outcome, _ = run({"/": script}, f"http://{GOOD}:PORT/", read_timeout_s=2.0, total_timeout_s=0.4)
    assert code_of(outcome) == "media_fetch_failed"
    assert asyncio.new_event_loop().time() - started < 2


def test_an_origin_that_says_nothing_to_a_handshake_is_not_waited_for():
    async def silent(host, port):
        return ["127.0.0.1"]

    async def scenario():
        async def never(reader, writer):
            await reader.read(1)
            await asyncio.sleep(3)

        server = await asyncio.start_server(never, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        policy = FetchPolicy(allowed_private_hosts=frozenset({GOOD}), connect_timeout_s=0.2)
        fetcher = MediaFetcher(policy, LIMITS, resolver=silent)
        with pytest.raises(AudioError) as caught:
            await fetcher.fetch(f"https://{GOOD}:{port}/")
        await fetcher.aclose()
        server.close()
        return caught.value.code

    started = asyncio.new_event_loop().time()
    assert asyncio.run(scenario()) == "media_fetch_failed"
    assert asyncio.new_event_loop().time() - started < 2


@pytest.mark.parametrize(
    ("name", "is_known", "outcome"),
    [(GOOD, True, b"sound"), ("other.test", True, "media_fetch_failed"), (GOOD, False, "media_fetch_failed")],
)
def test_certificates_are_those_of_the_name_and_not_of_the_address(name, is_known, outcome):
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(theirs)
    if is_known:
        authority.configure_trust(ours)
    asked_for = []
    theirs.sni_callback = lambda connection, asked, context: asked_for.append(asked)

    async def scenario():
        async with serving({"/": response(b"sound")}, theirs) as origin:
            policy = FetchPolicy(allowed_private_hosts=frozenset({GOOD}))
            fetcher = MediaFetcher(policy, LIMITS, resolver=TableResolver(), verify=ours)
            try:
                return await body_of(fetcher, f"https://{GOOD}:{origin.port}/")
            except AudioError as error:
                return code_of(error)
            finally:
                await fetcher.aclose()

    assert asyncio.run(scenario()) == outcome
    assert asked_for == [GOOD]


def test_slow_names_meet_the_connect_timeout():
    async def never(host, port):
        await asyncio.sleep(60)

    outcome, _ = run({}, "http://slow.test/", resolver=never, connect_timeout_s=0.2)
    assert code_of(outcome) == "media_fetch_failed"


def test_cookies_are_not_carried_from_one_user_to_the_next():
    async def scenario():
        async with serving({"/": response(b"x", "200 OK", "Set-Cookie: who=alice; Path=/")}) as origin:
            policy = FetchPolicy(allowed_private_hosts=frozenset({GOOD}))
            fetcher = MediaFetcher(policy, LIMITS, resolver=TableResolver())
            for _ in range(2):
                await fetcher.fetch(f"http://{GOOD}:{origin.port}/")
            await fetcher.aclose()
            return origin.requests

    requests = asyncio.run(scenario())
    assert len(requests) == 2
    assert "cookie" not in requests[1].lower()


def test_proxies_in_the_environment_are_ignored(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    body, _ = run({"/": response(b"direct")}, f"http://{GOOD}:PORT/")
    assert body == b"direct"


@pytest.mark.parametrize(
    ("domains", "is_allowed"),
    [
        ({"good.test"}, True),
        ({"GOOD.test"}, True),
        ({".test"}, True),
        ({".good.test"}, False),
        ({"ood.test"}, False),
        ({"other.test"}, False),
    ],
)
def test_domain_list(domains, is_allowed):
    outcome, _ = run({"/": response(b"x")}, f"http://{GOOD}:PORT/", allowed_domains=domains)
    assert outcome == b"x" if is_allowed else code_of(outcome) == "media_url_refused"


def test_one_host_cannot_take_every_connection():
    num_open = most_open = 0

    async def counting(writer):
        nonlocal num_open, most_open
        num_open += 1
        most_open = max(most_open, num_open)
        await asyncio.sleep(0.05)
        writer.write(response(b"x"))
        num_open -= 1

    async def scenario():
        async with serving({"/": counting}) as origin:
            policy = FetchPolicy(allowed_private_hosts=frozenset({GOOD}), max_connections_per_host=2)
            fetcher = MediaFetcher(policy, LIMITS, resolver=TableResolver())
            url = f"http://{GOOD}:{origin.port}/"
            bodies = await asyncio.gather(*(body_of(fetcher, url) for _ in range(8)))
            await fetcher.aclose()
            return bodies

    assert asyncio.run(scenario()) == [b"x"] * 8
    assert most_open == 2
