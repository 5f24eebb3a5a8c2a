"""Dashboard, alert rules, what Prometheus and Grafana are told: it fits, compose and /metrics included."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from .conftest import Servers, audio_part, user

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "tympan.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
[KUBERNETES, *_] = yaml.safe_load_all((DEPLOY / "kubernetes" / "tympan.yaml").read_text())
KEDA = [*yaml.safe_load_all((DEPLOY / "kubernetes" / "keda.yaml").read_text())]

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
METRIC = re.compile(r"\b(?:vllm:|tympan:|process_)\w+")
GROUPING = re.compile(r"\bby \(([\w, ]+)\)")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
OF_PROMETHEUS = {"instance", "job", "le", "namespace", "pod"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def targets() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def queries() -> dict[str, str]:
    """All PromQL there is, by where it stands."""
    alerts = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    panels = {f"panel {title} {number}": expr for number, (title, expr) in enumerate(targets())}
    scalers = {
        f"keda {number}": trigger["metadata"]["query"]
        for document in KEDA
        for number, trigger in enumerate(document["spec"].get("triggers", ()))
        if trigger["type"] == "prometheus"
    }
    return alerts | panels | scalers


@pytest.fixture(scope="module")
def exposed(servers: Servers) -> tuple[set[str], set[str]]:
    """Names of series, and of labels, that a server has after an answer and a refusal."""
    served = servers.start()
    served.say("Hello there!")
    assert served.post({"messages": [user(audio_part(1.0))]}).status_code == 200
    served.engine.dead.set()
    assert served.post({"messages": [user("Hi")]}).status_code == 503
    families = list(parse(served.client.get(f"{served.url}/metrics").text))
    names = {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}
    return names, {label for family in families for sample in family.samples for label in sample.labels}


@pytest.mark.parametrize("place", queries())
def test_a_query_names_only_what_there_is(exposed: tuple[set[str], set[str]], place: str) -> None:
    query = queries()[place]
    names, labels = exposed
    used = set(METRIC.findall(query))
    assert used or "up{" in query
    assert used <= names
    grouped = {label.strip() for group in GROUPING.findall(query) for label in group.split(",")}
    assert grouped | {*LABEL.findall(query)} <= labels | OF_PROMETHEUS
    assert all(query.count(left) == query.count(right) for left, right in ("()", "[]", "{}"))


def test_everything_of_ours_is_on_the_dashboard(exposed: tuple[set[str], set[str]]) -> None:
    shown = {name for query in queries().values() for name in METRIC.findall(query)}
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed[0] if name.startswith(("tympan:", "vllm:"))
    }
    not_worth_a_panel = {
        "tympan:http_request_seconds", "vllm:cache_config_info", "vllm:request_params_n",
        "vllm:request_time_per_output_token_seconds",
    }  # fmt: skip
    assert ours - stems == not_worth_a_panel


def test_every_metric_is_documented(exposed: tuple[set[str], set[str]]) -> None:
    document = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    for name in exposed[0]:
        stem = re.sub(r"_(bucket|sum|count)$", "", name)
        if stem.startswith(("tympan:", "vllm:")):
            assert stem in document, stem


def test_alerts_say_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 8
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "1m"))


def test_panels_have_their_place() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        columns, lines = range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
        cells = {(column, line) for column in columns for line in lines}
        assert columns.stop <= 24
        assert not cells & taken
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {*re.findall(r"\$\{?(\w+)\}?", json.dumps(panels))} <= variables | {"__rate_interval"}


def mounts(service: str) -> dict[str, Path]:
    """What of this repository a service of compose sees, by where."""
    pairs = [volume.split(":") for volume in COMPOSE["services"][service]["volumes"]]
    return {inside: ROOT / outside for outside, inside, *_ in pairs if outside.startswith("./")}


def test_compose_gives_each_what_its_configuration_names() -> None:
    services = COMPOSE["services"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["monitoring"]
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", services[name]["image"]), "pinned"
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
        assert all(path.exists() for path in mounts(name).values())
        named = {volume.split(":")[0] for volume in services[name]["volumes"]} - {"./"}
        assert {volume for volume in named if not volume.startswith("./")} <= COMPOSE["volumes"].keys()
    seen = mounts("prometheus")
    assert {f"--config.file={path}" for path in seen} & {*services["prometheus"]["command"]}
    assert {*PROMETHEUS["rule_files"]} <= seen.keys()
    [job] = PROMETHEUS["scrape_configs"]
    assert job["job_name"] in "".join(rule["expr"] for rule in rules())
    [discovery] = job["dns_sd_configs"]
    assert {*discovery["names"]} <= services.keys()
    for name in discovery["names"]:
        environment = services[name]["environment"]
        assert environment["TYMPAN_METRICS_PORT"] == str(discovery["port"]), "it is read where no key is asked for"
        assert environment["TYMPAN_METRICS_HOST"] == "0.0.0.0"
    seen = mounts("grafana")
    provisioning = seen["/etc/grafana/provisioning"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "tympan.yml").read_text())["providers"]
    assert (seen[provider["options"]["path"]] / "tympan.json").exists()
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_the_proxy_knows_the_replicas_of_compose() -> None:
    replicas = set(re.findall(r"server (\S+):8000", (ROOT / "deploy/nginx.conf").read_text()))
    assert replicas == {name for name in COMPOSE["services"] if name.startswith("tympan")}
    assert replicas == set(COMPOSE["services"]["nginx"]["depends_on"])


def test_kubernetes_scrapes_the_port_that_asks_for_no_key() -> None:
    pod = KUBERNETES["spec"]["template"]
    [container] = pod["spec"]["containers"]
    port = pod["metadata"]["annotations"]["prometheus.io/port"]
    assert ("--metrics-port", port) in pairwise(container["args"])
    assert ("--metrics-host", "0.0.0.0") in pairwise(container["args"])
    assert {"name": "metrics", "containerPort": int(port)} in container["ports"]
