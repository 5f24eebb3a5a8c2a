"""Random requests by the OpenAPI document against a real server, for `--seconds`: what is not as documented.

A server of its own with the bundled checkpoint. schemathesis writes bodies within the document and beside it, for
each operation in turn, from seeds that count up from `--seed`. A 5xx, a status, type or shape that the document does
not have, or a connection that breaks is a finding: the request is written as a curl command into the result. Each
belongs into tests/server/test_openapi.py with its fix, which is this for a few seconds, at every test run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from requests import RequestException
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from benchmarks.report import finish
from benchmarks.servers import Recipe, running

ROUND = 20
"""Requests to an operation before the next has its turn."""
LIMIT_S = 60.0
NOT_IN_A_SCHEMAS_POWER = [positive_data_acceptance, negative_data_rejection]
"""See docs/decisions.md, "An OpenAPI document of our own"."""
MAX_SHOWN = 20
UNABLE = "Unsupported type: 'Binary'"
"""schemathesis 4.32 stumbles so, at times, when it spoils a form that has a file."""
RECIPE = Recipe(
    "tympan", (sys.executable, "-m", "server", "--host", "127.0.0.1", "--max-model-len", "2048", "--port"), "/ready"
)
"""Short answers: some bodies ask for thousands of tokens by `min_tokens`."""


@dataclass
class Outcome:
    """What the server said to all of it."""

    statuses: Counter[str] = field(default_factory=Counter)
    by_operation: Counter[str] = field(default_factory=Counter)
    not_written: Counter[str] = field(default_factory=Counter)
    """Rounds that schemathesis broke off itself."""
    slowest: tuple[float, str, str] = (0.0, "", "")
    """Seconds, operation and request."""
    findings: list[dict[str, str]] = field(default_factory=list)

    def ask(self, case: Any, url: str) -> None:
        """One request, and whether its answer is as documented."""
        label = f"{case.method.upper()} {case.path}"
        self.by_operation[label] += 1
        started = time.monotonic()
        try:
            response = case.call(base_url=url, timeout=LIMIT_S)
            if (seconds := time.monotonic() - started) > self.slowest[0]:
                self.slowest = seconds, f"{label} {response.status_code}", curl(case)
            self.statuses[str(response.status_code)] += 1
            case.validate_response(response, excluded_checks=NOT_IN_A_SCHEMAS_POWER)
        except RequestException as error:
            self.statuses["none"] += 1
            self.findings.append({"operation": label, "what": type(error).__name__, "request": curl(case)})
        except (Failure, FailureGroup) as error:
            self.findings.append({"operation": label, "what": str(error)[:500], "request": curl(case)})


def curl(case: Any) -> str:
    """The request, to be sent again."""
    return str(case.as_curl_command())[:2000]


def fuzz(url: str, seconds: float, seed: int) -> Outcome:
    """Until the time is up; a round that has begun is finished."""
    config = SchemathesisConfig.from_dict(
        {"generation": {"database": "none"}, "output": {"sanitization": {"enabled": False}}}
    )
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    operations = [found.ok() for found in document.get_all_operations()]
    outcome, ends = Outcome(), time.monotonic() + seconds
    modes = list(schemathesis.GenerationMode)
    for number, operation in enumerate(itertools.cycle(operations)):
        if time.monotonic() > ends:
            return outcome
        mode = modes[number // len(operations) % len(modes)]
        cases = operation.as_strategy(generation_mode=mode)

        @hypothesis.seed(seed + number)
        @hypothesis.settings(
            max_examples=ROUND, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(cases)
        def one(case: Any) -> None:
            outcome.ask(case, url)

        try:
            one()
        except hypothesis.errors.Unsatisfiable:  # nothing beside the document can be asked of it
            continue
        except ValueError as error:
            if UNABLE not in str(error):
                raise
            outcome.not_written[f"{operation.method.upper()} {operation.path}"] += 1
    return outcome


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with running(RECIPE) as server:
        outcome = fuzz(server.url, args.seconds, args.seed)
    result = {
        "benchmark": "fuzz the API",
        "schemathesis": schemathesis.__version__,
        "seed": args.seed,
        "seconds": args.seconds,
        "num_requests": outcome.by_operation.total(),
        "statuses": dict(outcome.statuses.most_common()),
        "by_operation": dict(sorted(outcome.by_operation.items())),
        "rounds_not_written": dict(outcome.not_written),
        "slowest": outcome.slowest,
        "num_findings": len(outcome.findings),
        "findings": outcome.findings[:MAX_SHOWN],
    }
    finish(result, args.output)


if __name__ == "__main__":
    main()
