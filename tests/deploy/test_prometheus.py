"""A real Prometheus, where there is one: it scrapes a server as compose's would, and is asked what
the dashboard asks; its own tool says when the chart's alerts come.

Debian's package `prometheus` has both programs, and so has Prometheus's own archive.
"""

import json
import shutil
import socket
import subprocess

import httpx
import pytest
import yaml

from tests.deploy.dockerfile import ROOT
from tests.deploy.test_dashboard import DASHBOARD, QUERIES, RULE
from tests.deploy.test_helm import render, services, values
from tests.server.running import ADMIN_TOKEN, running
from tests.support.waiting import until

PROGRAMS = [shutil.which(name) for name in ("prometheus", "promtool")]
pytestmark = pytest.mark.skipif(
    None in PROGRAMS, reason="there is no prometheus and promtool here (Debian: prometheus)"
)

RULES = RULE["spec"]
[_, ADMIN_SERVICE] = services(render(values("tokens")))
OF = {"namespace": "models", "service": ADMIN_SERVICE["metadata"]["name"], "pod": "expertgate-0"}
"""What Prometheus's operator puts to each sample of the chart's pods."""


class Prometheus:
    def __init__(self, url):
        self.url = url

    def get(self, path, **params):
        response = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def query(self, expression):
        return self.get("query", query=expression)["result"]

    @property
    def targets(self):
        return self.get("targets")["activeTargets"]

    def answers(self):
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """With compose's configuration, but for where the server is, and the chart's alerts."""
    folder = tmp_path_factory.mktemp("prometheus")
    server = running()
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    [scrape] = config["scrape_configs"]
    (folder / "admin-token").write_text(ADMIN_TOKEN + "\n")
    scrape["authorization"]["credentials_file"] = str(folder / "admin-token")
    admin = server.log.partition("operators: http://")[2].split()[0]
    scrape["static_configs"] = [{"targets": [admin], "labels": OF}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / "alerts.yml")]
    (folder / "alerts.yml").write_text(json.dumps(RULES))
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = folder / "said"
    with said.open("wb") as out:
        process = subprocess.Popen(
            [
                PROGRAMS[0],
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=out,
            stderr=out,
            cwd=folder,
        )
    found = Prometheus(f"http://{address}")
    try:
        until(found.answers, said.read_text)
        # Each before and after something is counted: a rate is of what changes between two looks.
        until(lambda: any(target["lastScrape"] > "1" for target in found.targets), "no scrape")
        for _ in range(2):  # the second time from the cache
            assert server.complete(prompt="all the same words " * 40).status_code == 200
        assert server.complete("bob", experts=["math"]).status_code == 403
        yield found
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_is_scraped(prometheus):
    [target] = prometheus.targets
    until(lambda: prometheus.targets[0]["health"] == "up", target["lastError"])
    [up] = prometheus.query("up")
    assert up["metric"]["job"] == "expertgate"
    assert up["value"][1] == "1"
    # Prometheus 3 takes no answer that doesn't say what it is.
    said = running().admin("GET", "/metrics").headers["content-type"]
    assert said.startswith("text/plain; version=")


def test_what_is_scraped_has_types_and_words(prometheus):
    """Prometheus reads them; a metric without them is in no explorer."""
    until(lambda: prometheus.get("metadata", metric="expertgate_requests_total"), "no metadata")
    metadata = prometheus.get("metadata")
    ours = {name: found for name, found in metadata.items() if name.startswith("expertgate")}
    assert ours
    assert all(each["help"] for found in ours.values() for each in found)
    assert not {name for name, found in ours.items() if found[0]["type"] == "unknown"}


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_shows_something(prometheus, query):
    asked = query.replace("$__rate_interval", "1m").replace("$job", "expertgate")
    assert "$" not in asked
    # Quantiles of nothing are not a number, of which no panel makes a line.
    until(lambda: {each["value"][1] for each in prometheus.query(asked)} - {"NaN"}, asked)


def test_the_jobs_to_choose_from_are_found(prometheus):
    [variable] = DASHBOARD["templating"]["list"]
    metric = variable["query"].partition("(")[2].partition(",")[0]
    assert variable["query"] == f"label_values({metric}, job)"
    until(lambda: prometheus.query(metric), metric)
    found = prometheus.get("label/job/values", **{"match[]": metric})
    assert found == ["expertgate"]


def test_alerts_can_be_judged_and_are_quiet(prometheus):
    def rules():
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] == "ok" for rule in rules()), rules())
    assert [rule["name"] for rule in rules()] == [
        rule["alert"] for group in RULES["groups"] for rule in group["rules"]
    ]
    assert not [rule["name"] for rule in rules() if rule["state"] == "firing"]


# Alert → the metric and its labels, what it says minute by minute, and when the alert is there.
COMES = {
    "ExpertgateDown": ("up", {}, "1 0 0 0 0 0 0 0 1", [0, 0, 0, 0, 0, 0, 1, 1, 0]),
    "ExpertgateAuditUnavailable": (
        "expertgate_denials_total",
        {"code": "audit_unavailable"},
        "0 0 1 1 1 1 1 1 1 1",
        [0, 0, 1, 1, 1, 1, 1, 0, 0, 0],
    ),
    "ExpertgateAuditBehind": (
        "expertgate_audit_records_waiting",
        {},
        "0 2048 2049 2049 2049 0",
        [0, 0, 0, 1, 1, 0],
    ),
    "ExpertgateEngineUnavailable": (
        "expertgate_denials_total",
        {"code": "engine_unavailable"},
        "0 1 2 3 4 5 6 7 7 7 7 7 7 7",
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
    ),
    "ExpertgateFaults": (
        "expertgate_denials_total",
        {"code": "internal_error"},
        "0 0 1 1 1 1 1 1 1 1",
        [0, 0, 1, 1, 1, 1, 1, 0, 0, 0],
    ),
    "ExpertgatePoliciesRefused": (
        "expertgate_policy_reload_success",
        {},
        "1 0 0 0 1",
        [0, 0, 1, 1, 0],
    ),
}


def promtool(folder, *arguments):
    done = subprocess.run(
        [PROGRAMS[1], *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def summary_of(alert, value):
    [summary] = [
        rule["annotations"]["summary"]
        for group in RULES["groups"]
        for rule in group["rules"]
        if rule["alert"] == alert
    ]
    return summary.replace("{{ $labels.pod }}", OF["pod"]).replace("{{ $value }}", value)


@pytest.mark.parametrize("alert", [rule["alert"] for g in RULES["groups"] for rule in g["rules"]])
def test_an_alert_comes_and_goes(tmp_path, alert):
    metric, labels, samples, there = COMES[alert]
    [rule] = [r for group in RULES["groups"] for r in group["rules"] if r["alert"] == alert]
    named = ",".join(f'{name}="{value}"' for name, value in {**OF, **labels}.items())
    summed = rule["expr"].startswith("sum by (pod)")
    shown = {"pod": OF["pod"]} if summed else {**OF, **labels}
    expected = {
        "exp_labels": {**shown, **rule["labels"]},
        "exp_annotations": {"summary": summary_of(alert, "2049")},
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": f"{metric}{{{named}}}", "values": samples}],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": [expected] * comes}
            for minute, comes in enumerate(there)
        ],
    }
    (tmp_path / "alerts.yml").write_text(json.dumps(RULES))
    tests = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "case.yml").write_text(json.dumps(tests))
    promtool(tmp_path, "check", "rules", "alerts.yml")
    promtool(tmp_path, "test", "rules", "case.yml")


def test_compose_gives_prometheus_what_it_takes(tmp_path):
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    [scrape] = config["scrape_configs"]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    mounted = [v.split(":")[1] for v in compose["services"]["prometheus"]["volumes"]]
    token = scrape["authorization"]["credentials_file"]
    assert token.rpartition("/")[0] in mounted
    (tmp_path / "token").write_text("one")  # the check opens it
    scrape["authorization"]["credentials_file"] = str(tmp_path / "token")
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    promtool(tmp_path, "check", "config", "prometheus.yml")
