"""What nginx, smg and Ray Serve add in front of replicas: to the time of an answer, to the first token, in memory.

    python -m benchmarks.topology [--requests 200] [--output results/topology-cpu.json]

A replica of the bundled checkpoint, and one client that asks one after the other, so that nothing waits. Each round
sends the same small text request, whole and streamed, straight to the replica and through what stands in front, in
random order: what drifts on the machine meets all. Ray Serve has replicas of its own, two, and is compared with the
plain one in a second phase. Needs nginx, and what `make topology` installs.

Memory is PSS after the requests, summed over the processes: pages that several share are counted once. Of Ray Serve
it is everything but the replicas themselves, whose own growth over a plain server stands beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.report import finish
from tests.deploy.conftest import ROOT, Replica, free_port, wait_for
from tests.deploy.test_ray_serve import Cluster
from tests.deploy.test_topology import nginx, smg
from tympan.load import percentiles

WARM_UP = 10
"""Rounds that do not count."""
BODY = {"model": "tympan-tiny", "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
RAY_PYTHON = ROOT / ".topology/bin/python"


def whole_s(client: httpx.Client) -> float:
    """Seconds of an answer of one token."""
    started = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=BODY | {"max_tokens": 1})
    answer.raise_for_status()
    return time.perf_counter() - started


def first_token_s(client: httpx.Client) -> float:
    """Seconds to the first token of a stream, which is read to its end."""
    first = 0.0
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 8, "stream": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not first and line.startswith("data: {") and _has_text(json.loads(line[6:])):
                first = time.perf_counter() - started
    assert first, "a stream without a token"
    return first


def _has_text(chunk: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in chunk["choices"])


def compare(urls: Mapping[str, str], num_requests: int) -> dict[str, Any]:
    """`urls`: what is asked, `direct` among it. -> milliseconds of each, and what it adds to `direct`."""
    times: dict[str, dict[str, list[float]]] = {name: {"whole": [], "first_token": []} for name in urls}
    clients = {name: httpx.Client(base_url=url, trust_env=False, timeout=60) for name, url in urls.items()}
    order = list(urls)
    shuffle = random.Random(0).shuffle
    for number in range(WARM_UP + num_requests):
        shuffle(order)
        for name in order:
            seconds = {"whole": whole_s(clients[name]), "first_token": first_token_s(clients[name])}
            for what, one in seconds.items() if number >= WARM_UP else ():
                times[name][what].append(1000 * one)
    for client in clients.values():
        client.close()
    figures = {name: {what: percentiles(values) for what, values in of.items()} for name, of in times.items()}
    added = {name: _added(of, figures["direct"]) for name, of in figures.items() if name != "direct"}
    return {"milliseconds": figures, "added_milliseconds": added}


def _added(figures: dict[str, Any], direct: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        what: {point: of[point] - direct[what][point] for point in ("p50", "p95")} for what, of in figures.items()
    }


def pss_mib(roots: Sequence[psutil.Process], but: Sequence[psutil.Process] = ()) -> float:
    """Of these processes and their children, without those of `but` and theirs."""
    left_out = {process.pid for process in _trees(but)}
    return float(sum(one.memory_full_info().pss for one in _trees(roots) if one.pid not in left_out) / 2**20)


def _trees(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [one for root in roots for one in (root, *root.children(recursive=True))]


@contextmanager
def fronts(replica: Replica, folder: Path) -> Iterator[dict[str, tuple[str, psutil.Process]]]:
    """nginx and smg. -> name: address and process."""
    started = {}
    processes = []
    try:
        for make, behind in ((nginx, [replica, replica]), (smg, [replica])):  # nginx.conf has two
            port = free_port()
            (folder / make.__name__).mkdir()
            with (folder / make.__name__ / "log").open("wb") as log:
                process = subprocess.Popen(make(behind, folder / make.__name__, port), stdout=log, stderr=log)
            processes.append(process)
            wait_for(f"http://127.0.0.1:{port}/health", process)
            started[make.__name__] = (f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        yield started
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def measure_proxies(replica: Replica, folder: Path, num_requests: int) -> dict[str, Any]:
    """nginx and smg."""
    with fronts(replica, folder) as started:
        urls = {"direct": replica.url} | {name: url for name, (url, _) in started.items()}
        for name, url in urls.items():
            assert num_of_models(url), name
        figures = compare(urls, num_requests)
        return figures | {"pss_mib": {name: pss_mib([process]) for name, (_, process) in started.items()}}


def measure_ray(replica: Replica, folder: Path, num_requests: int) -> dict[str, Any]:
    """Ray Serve with two replicas of its own."""
    cluster = Cluster(folder / "ray.log")
    try:
        figures = compare({"direct": replica.url, "ray_serve": cluster.url}, num_requests)
        root = psutil.Process(cluster.pid)
        actors = [one for one in root.children(recursive=True) if "ServeReplica" in " ".join(one.cmdline())]
        assert len(actors) == 2
        assert replica.process is not None
        return figures | {
            "pss_mib": {
                "ray_serve": pss_mib([root], but=actors),
                "its_replica": pss_mib(actors) / len(actors),
                "plain_replica": pss_mib([psutil.Process(replica.process.pid)]),
            }
        }
    finally:
        cluster.close()


def num_of_models(url: str) -> int:
    """How many it lists."""
    return len(httpx.get(f"{url}/v1/models", trust_env=False).json()["data"])


def versions() -> dict[str, str]:
    """Of what stands in front; smg's and Ray's are those of .topology."""
    code = "import importlib.metadata as m; print(m.version('smg'), m.version('ray'))"
    smg_version, ray_version = subprocess.check_output([RAY_PYTHON, "-c", code], text=True).split()
    shown = subprocess.run([shutil.which("nginx") or "nginx", "-v"], capture_output=True, text=True, check=True)
    return {
        "nginx": shown.stderr.strip().rpartition("/")[2],
        "smg": smg_version,
        "ray": ray_version,
        "psutil": importlib.metadata.version("psutil"),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="rounds that count")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replica = Replica(free_port(), folder / "replica.log")
        try:
            replica.start()
            proxies = measure_proxies(replica, folder, arguments.requests)
            ray = measure_ray(replica, folder, arguments.requests)
        finally:
            replica.kill()
    result = {"requests": arguments.requests, "fronts": versions(), "proxies": proxies, "ray_serve": ray}
    finish({"benchmark": "topology", **result}, arguments.output)


if __name__ == "__main__":
    main()
