"""Restart replicas one after the other, each when all of them take requests, so that none is lost.

    python deploy/roll.py --router http://127.0.0.1:8000 \\
        http://10.0.0.1:8000='ssh one sudo systemctl restart tympan' \\
        http://10.0.0.2:8000='ssh two sudo systemctl restart tympan'

A command ends a replica by SIGTERM, which drains it, and starts it again on the same address. Where smg is in front,
a replica is taken out of it first and put back when it is ready: an upload that a draining replica refuses would be
lost, and smg learns by probes, a moment late, who is back. With nginx neither is so: leave out --router. It needs
nothing but Python.

The exit status is 0 when all have been restarted; otherwise 1, and those after the one that failed still run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

POLL_SECONDS = 0.2
KEY_VARIABLE = "SMG_API_KEY"

Restart = Callable[[], None]

logger = logging.getLogger("roll")


class RollError(Exception):
    """Why the roll ends before all have been restarted."""


class Smg:
    """Which replicas smg sends requests to. Methods raise RollError when it will not tell, or obey."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._key = os.environ.get(KEY_VARIABLE)

    def routed(self) -> set[str]:
        """The addresses of those that take requests; none while smg does not answer."""
        return {address for address, one in self._workers().items() if one["is_healthy"]}

    def take_out(self, replica: str) -> None:
        """No request goes there any more; those that it has go on."""
        worker = self._workers().get(replica)
        if worker is None:
            raise RollError(f"{self._url} has no worker {replica}")
        _ask(f"{self._url}/workers/{worker['id']}", self._key, "DELETE")
        _wait(lambda: self._workers().keys() & {replica}, 0, self._timeout_s, "are still in the router")

    def put_in(self, replica: str) -> None:
        """It is asked again as soon as smg has seen that it is ready."""
        worker = {"url": replica} | ({"api_key": self._key} if self._key else {})
        _ask(f"{self._url}/workers", self._key, "POST", worker)

    def _workers(self) -> dict[str, dict[str, Any]]:
        body = _ask(f"{self._url}/workers", self._key)
        try:
            return {one["url"].rstrip("/"): one for one in json.loads(body)["workers"]} if body is not None else {}
        except (ValueError, KeyError, TypeError) as error:
            raise RollError(f"{self._url}/workers does not list workers: that is no smg") from error


def roll(
    restarts: Mapping[str, Restart],
    router: str | None = None,
    settle_s: float = 2,
    timeout_s: float = 600,
) -> None:
    """Restart what is at these addresses, in this order.

    `settle_s`: before each restart all must have taken requests for so long: a probe may still fail.

    Raises RollError: a command failed, or a replica is not back after `timeout_s` seconds.
    """
    smg = Smg(router, timeout_s) if router else None

    def idle() -> set[str]:
        return _unready(restarts) or (set() if smg is None else set(restarts) - smg.routed())

    _wait(idle, settle_s, timeout_s, "take no requests")
    for replica, restart in restarts.items():
        logger.info("restarting %s", replica)
        if smg is not None:
            smg.take_out(replica)
        restart()
        _wait(partial(_unready, [replica]), 0, timeout_s, "are not ready")
        if smg is not None:
            smg.put_in(replica)
        _wait(idle, settle_s, timeout_s, "take no requests")


def _unready(replicas: Iterable[str]) -> set[str]:
    return {one for one in replicas if _ask(f"{one}/ready") is None}


def _wait(left: Callable[[], set[str]], settle_s: float, timeout_s: float, what: str) -> None:
    """Until nothing is left, and has not been for `settle_s` seconds."""
    since = time.monotonic()
    deadline = since + timeout_s
    while True:
        those = left()
        now = time.monotonic()
        if not those and now >= since + settle_s:
            return
        if those:
            since = now
        if now > deadline + settle_s:
            raise RollError(f"after {timeout_s:g} s these {what}: {', '.join(sorted(those))}")
        time.sleep(POLL_SECONDS)


def _ask(url: str, key: str | None = None, method: str = "GET", body: object = None) -> bytes | None:
    """What a 2xx brings, None for most else. Raises RollError: what another try would not change."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        if error.code < 500:
            raise RollError(f"{method} {url}: {error.code}; a key is taken from {KEY_VARIABLE}") from None
    except (http.client.HTTPException, OSError):
        pass
    if method == "GET":
        return None
    raise RollError(f"{method} {url} failed")


def _command(text: str) -> Restart:
    def run() -> None:
        status = subprocess.run(text, shell=True, check=False).returncode
        if status:
            raise RollError(f"`{text}` ended with status {status}")

    return run


def _address_and_command(text: str) -> tuple[str, Restart]:
    address, _, command = text.partition("=")
    if not address.startswith(("http://", "https://")) or not command.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS=COMMAND, as in http://10.0.0.1:8000='...'")
    return address.rstrip("/"), _command(command)


def main() -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("replicas", nargs="+", type=_address_and_command, metavar="ADDRESS=COMMAND")
    parser.add_argument(
        "--router", type=lambda text: text.rstrip("/"), help=f"smg's address; its key: {KEY_VARIABLE}"
    )
    parser.add_argument("--settle", type=float, default=2, help="seconds for which all must have taken requests (2)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one may take to come back (600)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        roll(dict(arguments.replicas), arguments.router, arguments.settle, arguments.timeout)
    except RollError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
