"""The dashboard and the chart's alerts ask for what a running server really says."""

import json
import re

import pytest
import yaml

from tests.deploy.dockerfile import ROOT
from tests.deploy.test_helm import kind, render, services, values
from tests.server.running import running

GRAFANA = ROOT / "deploy" / "grafana"
FILE = ROOT / "deploy" / "helm" / "expertgate" / "dashboard.json"
DASHBOARD = json.loads(FILE.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}/{target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
[RULE] = kind(render(values("tokens")), "PrometheusRule")
ALERTS = [
    pytest.param(rule["expr"], id=rule["alert"])
    for group in RULE["spec"]["groups"]
    for rule in group["rules"]
]
METRIC = re.compile(r"\b(?:vllm:|expertgate_)\w+")


@pytest.fixture(scope="module")
def exported():
    """What a server that was asked a few things says."""
    server = running()
    assert server.complete("alice", experts=["public"]).status_code == 200
    assert server.complete("bob", experts=["math"]).status_code == 403
    return server.admin("GET", "/metrics").text


@pytest.fixture(scope="module")
def samples(exported):
    """Name of a sample → the labels that it has."""
    found = {}
    for line in exported.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("{")
            name = name.split(" ")[0]
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', rest))
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_what_the_server_exports(query, samples):
    names = METRIC.findall(query)
    assert names
    assert [name for name in names if name not in samples] == []
    for label in re.findall(r"by \((\w+)\)", query):
        assert all(label in samples[name] for name in names)


@pytest.mark.parametrize("query", ALERTS)
def test_an_alert_asks_for_what_the_server_exports(query, samples, exported):
    [_, service] = services(render(values("tokens")))
    assert f'namespace="models", service="{service["metadata"]["name"]}"' in query
    names = METRIC.findall(query)
    assert names or query.startswith("up{")
    assert [name for name in names if name not in samples] == []
    for code in re.findall(r'code="(\w+)"', query):
        # Before it was ever counted: a series that begins above 0 has not increased.
        assert f'expertgate_denials_total{{code="{code}"}}' in exported


def test_every_metric_of_ours_is_shown(samples):
    shown = {name for query in QUERIES for name in METRIC.findall(query.values[0])}
    ours = {
        name
        for name in samples
        if re.fullmatch(r"expertgate_\w+_(total|success|held|waiting)", name)
    }
    assert ours - shown == set()


def test_a_query_of_nothing_would_be_found(samples):
    assert "vllm:no_such_metric" not in samples
    assert METRIC.findall("rate(vllm:no_such_metric[5m])") == ["vllm:no_such_metric"]


def test_the_job_can_be_chosen(samples):
    [_, variable] = DASHBOARD["templating"]["list"]
    assert METRIC.findall(variable["query"])[0] in samples
    assert all('{job=~"$job"}' in query.values[0] for query in QUERIES)


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_chart_brings_it_to_grafanas_sidecar():
    objects = render(values("tokens"))
    [found] = [each for each in kind(objects, "ConfigMap") if "expertgate.json" in each["data"]]
    assert json.loads(found["data"]["expertgate.json"]) == DASHBOARD
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == {"grafana_folder": "Models"}
    assert not any("expertgate.json" in each["data"] for each in kind(render({}), "ConfigMap"))


def test_grafana_finds_dashboard_and_source():
    folder = GRAFANA / "provisioning"
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    # Any that Grafana has: another one's has another id.
    [variable, job] = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", source["type"])
    asked = {each["datasource"]["uid"] for each in [job, *PANELS]}
    assert asked == {f"${{{variable['name']}}}"}
    [provider] = yaml.safe_load((folder / "dashboards" / "expertgate.yaml").read_text())[
        "providers"
    ]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    targets = {
        entry.split(":")[1]: ROOT / entry.split(":")[0]
        for entry in compose["services"]["grafana"]["volumes"]
    }
    assert targets[f"{provider['options']['path']}/expertgate.json"] == FILE
    assert targets["/etc/grafana/provisioning"].is_dir()
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
