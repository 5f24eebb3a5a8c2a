"""The cache by itself, and behind the fetcher against origins that confirm, change and forbid."""

import asyncio

import httpx
import pytest

from audio import AudioError, AudioLimits, FetchPolicy
from audio.fetch import MediaFetcher
from audio.media_cache import MAX_AGE_S, MediaCache
from tests.audio.origin import body_of, redirect, response, serving

URL = httpx.URL("http://good.test/a.wav")
LIMITS = AudioLimits(max_clip_bytes=100_000)


class Clock:
    """Stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(clock):
    return MediaCache(100_000, num_scopes=lambda: 1, clock=clock)


def fresh_for(cache, clock, headers, url=URL):
    """Seconds that an answer may be used unasked; -1: it is not kept."""
    cache.put("", url, headers, b"x")
    answer = cache.get("", url)
    return -1 if answer is None else max(0.0, answer.fresh_until - clock.now)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, -1),
        ({"cache-control": "max-age=60"}, 60),
        ({"cache-control": "public, Max-Age=60, immutable"}, 60),
        ({"cache-control": "max-age=60", "age": "20"}, 40),
        ({"cache-control": "max-age=60", "age": "80"}, -1),
        ({"cache-control": "max-age=60", "age": "80", "etag": '"1"'}, 0),
        ({"cache-control": "max-age=60", "age": "soon"}, 60),
        ({"cache-control": "max-age=99999999"}, MAX_AGE_S),
        ({"cache-control": "max-age=60, max-age=5"}, 5),
        ({"cache-control": "max-age=-1"}, -1),
        ({"cache-control": "max-age=" + "9" * 5_000}, -1),
        ({"cache-control": "no-cache, max-age=60"}, -1),
        ({"cache-control": "no-cache, max-age=60", "etag": '"1"'}, 0),
        ({"cache-control": "no-store, max-age=60", "etag": '"1"'}, -1),
        ({"cache-control": "private, max-age=60", "etag": '"1"'}, -1),
        ({"cache-control": "max-age=60", "vary": "*"}, -1),
        ({"etag": 'W/"1"'}, 0),
        ({"last-modified": "Tue, 24 Nov 2026 10:00:00 GMT"}, 0),
        ({"etag": "x" * 513}, -1),
        ({"etag": '"\x85"'}, -1),
    ],
)
def test_how_long_an_answer_is_used(cache, clock, headers, seconds):
    assert fresh_for(cache, clock, headers) == seconds


@pytest.mark.parametrize(
    ("query", "is_kept"),
    [
        ("", True),
        ("?download=1&name=a", True),
        ("?X-Amz-Signature=abc", False),
        ("?X-Goog-Credential=abc", False),
        ("?sv=2022&sig=abc", False),
        ("?Expires=1&Key-Pair-Id=2", False),
        ("?access_token=abc", False),
        ("?api_key=abc", False),
    ],
)
def test_links_with_credentials_are_never_kept(cache, clock, query, is_kept):
    url = URL.join(query) if query else URL
    assert (fresh_for(cache, clock, {"cache-control": "max-age=60", "etag": '"1"'}, url) > 0) == is_kept


def test_an_answer_that_forbids_it_takes_the_one_before_along(cache, clock):
    assert fresh_for(cache, clock, {"cache-control": "max-age=60"}) == 60
    assert fresh_for(cache, clock, {"cache-control": "no-store"}) == -1


def test_what_is_not_renewed_is_dropped(cache, clock):
    cache.put("", URL, {"etag": '"1"'}, b"x")
    clock.now += MAX_AGE_S
    assert cache.get("", URL) is None
    cache.put("a", URL, {"etag": '"1"'}, b"x")
    assert cache.num_held_bytes("") == 0


def test_scopes_are_apart_and_have_equal_shares(clock):
    cache = MediaCache(100_000, num_scopes=lambda: 2, clock=clock)
    headers = {"cache-control": "max-age=60"}
    cache.put("alice", URL, headers, bytes(30_000))
    assert cache.get("bob", URL) is None
    for number in range(20):
        cache.put("bob", URL.join(f"/{number}"), headers, bytes(15_000))
        assert cache.num_held_bytes("bob") <= 50_000
    assert cache.get("alice", URL) is not None
    kept = [number for number in range(20) if cache.get("bob", URL.join(f"/{number}"))]
    assert kept == [17, 18, 19]
    cache.put("bob", URL, headers, bytes(60_000))  # more than a share
    assert cache.get("bob", URL) is None


def test_the_longest_unused_goes_first(cache):
    headers = {"cache-control": "max-age=60"}
    for name in "abc":
        cache.put("", URL.join(name), headers, bytes(30_000))
    cache.get("", URL.join("a"))
    cache.put("", URL.join("d"), headers, bytes(30_000))
    assert [name for name in "abcd" if cache.get("", URL.join(name))] == ["a", "c", "d"]


def fetches(scripts, urls, *, clock=None, change=None, scopes=("",) * 9, max_bytes=1_000_000):
    """The bodies or codes of several fetches by one fetcher, and the requests that the origin saw."""

    async def resolve(host, port):
        return ["127.0.0.1"]

    async def scenario():
        async with serving(scripts) as origin:
            cache = MediaCache(max_bytes, clock=clock or Clock())
            policy = FetchPolicy(allowed_private_hosts=frozenset({"good.test"}))
            fetcher = MediaFetcher(policy, LIMITS, cache=cache, resolver=resolve)
            outcomes = []
            for number, url in enumerate(urls):
                try:
                    outcomes.append(await body_of(fetcher, f"http://good.test:{origin.port}{url}", scopes[number]))
                except AudioError as error:
                    outcomes.append(error.code)
                if change is not None:
                    change(number)
            await fetcher.aclose()
            return outcomes, origin.requests

    return asyncio.run(scenario())


def test_a_fresh_answer_asks_nobody():
    scripts = {"/a": response(b"one", "200 OK", "Cache-Control: max-age=60")}
    clock = Clock()

    def change(number):
        clock.now += 25

    bodies, requests = fetches(scripts, ["/a", "/a#part", "/a", "/a"], clock=clock, change=change)
    assert bodies == [b"one"] * 4
    assert len(requests) == 2  # the third came after 50 seconds, the fourth after 75


def test_a_stale_answer_is_confirmed_or_replaced():
    scripts = {"/a": response(b"one", "200 OK", 'ETag: "1"', "Last-Modified: yesterday")}
    answers = iter(
        [
            response(b"", "304 Not Modified"),
            response(b"two", "200 OK", 'ETag: "2"'),
            response(b"", "304 Not Modified"),
        ]
    )

    def change(number):
        scripts["/a"] = next(answers, b"")

    bodies, requests = fetches(scripts, ["/a"] * 4, change=change)
    assert bodies == [b"one", b"one", b"two", b"two"]
    conditions = ["", 'if-none-match: "1"', 'if-none-match: "1"', 'if-none-match: "2"']
    assert all(wanted in head.lower() for wanted, head in zip(conditions, requests, strict=True))
    assert "if-modified-since: yesterday" in requests[1].lower()
    assert "if-" not in requests[0].lower()


def test_a_304_that_was_not_asked_for_is_no_answer():
    outcomes, _ = fetches({"/a": response(b"", "304 Not Modified")}, ["/a"])
    assert outcomes == ["media_fetch_failed"]


def test_nobody_is_shown_what_another_fetched():
    scripts = {"/a": response(b"one", "200 OK", "Cache-Control: max-age=60")}
    _, requests = fetches(scripts, ["/a"] * 4, scopes=("alice", "bob", "alice", "bob"))
    assert len(requests) == 2


def test_each_hop_is_kept_by_itself_and_redirects_are_asked_again():
    scripts = {"/a": redirect("/b"), "/b": response(b"one", "200 OK", "Cache-Control: max-age=60")}

    def change(number):
        scripts["/a"] = redirect("/c") if number == 1 else scripts["/a"]

    scripts["/c"] = response(b"two")
    bodies, requests = fetches(scripts, ["/a"] * 3, change=change)
    assert bodies == [b"one", b"one", b"two"]
    assert [head.split(" ")[1] for head in requests] == ["/a", "/b", "/a", "/a", "/c"]


def test_a_cut_body_is_not_kept():
    short = b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 50\r\nConnection: close\r\n\r\nshort"
    scripts = {"/a": short}

    def change(number):
        scripts["/a"] = response(b"whole", "200 OK", "Cache-Control: max-age=60")

    bodies, _ = fetches(scripts, ["/a", "/a"], change=change)
    assert bodies == ["media_fetch_failed", b"whole"]


def test_without_memory_everything_is_fetched_anew():
    scripts = {"/a": response(b"one", "200 OK", "Cache-Control: max-age=60")}
    _, requests = fetches(scripts, ["/a"] * 3, max_bytes=0)
    assert len(requests) == 3
