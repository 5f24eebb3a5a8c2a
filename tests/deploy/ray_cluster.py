"""A Ray of one machine that runs deploy/ray_serve.py, until its standard input ends.

It obeys, a line each: `kill` ends a replica's process, a number is how many replicas there shall be.
"""

from __future__ import annotations

import os
import sys

import ray
from ray import serve

from tests.deploy.conftest import ROOT


def main(port: int) -> None:
    """Prints `ready`, and `done` after each order."""
    os.environ |= {"TYMPAN_REPLICAS": "2", "TYMPAN_GPUS_PER_REPLICA": "0"}
    variables = {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2, object_store_memory=80 << 20, include_dashboard=False,
        _node_ip_address="127.0.0.1", runtime_env={"env_vars": variables},
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    from deploy.ray_serve import deployment

    serve.run(deployment.bind())
    print("ready", flush=True)  # noqa: T201
    for order in sys.stdin:
        if order.strip() == "kill":
            replicas = [name for name in ray.util.list_named_actors(all_namespaces=True) if "tympan" in name["name"]]
            ray.kill(ray.get_actor(**replicas[0]))
        else:
            serve.run(deployment.options(num_replicas=int(order)).bind())
        print("done", flush=True)  # noqa: T201
    serve.shutdown()


if __name__ == "__main__":
    os.chdir(ROOT)
    main(int(sys.argv[1]))
