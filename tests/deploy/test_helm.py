"""The chart, rendered by Helm's own code for several values, and what must hold for all of them."""

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from pydantic import ValidationError

import expertgate
from expertgate.server import suspensions
from expertgate.server.config import Config
from expertgate.server.policy_files import PolicyFiles
from expertgate.server.routes.table import ROUTES
from expertgate.server.watched import WatchedFile
from tests.deploy.dockerfile import ROOT, read
from tests.deploy.leaderworkerset import LeaderWorkerSet
from tests.deploy.stopping import takes_s

CHART = ROOT / "deploy" / "helm" / "expertgate"
VALUES = Path(__file__).parent / "values"
NAMES = ["defaults", *sorted(path.stem for path in VALUES.glob("*.yaml"))]
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
"""The oldest that Chart.yaml admits, which must know every field that the chart writes, and the
newest, which must serve every version yet."""


def values(name):
    return {} if name == "defaults" else yaml.safe_load((VALUES / f"{name}.yaml").read_text())


def render(given, release="gate"):
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(given))
        texts = chart.render(given, name=release, namespace="models")
    found = []
    for path, text in texts.items():
        if path.endswith(".yaml"):
            found += [item for item in yaml.safe_load_all(text) if item]
    return found


@pytest.fixture(params=NAMES)
def objects(request):
    return render(values(request.param))


def kind(objects, name):
    return [item for item in objects if item["kind"] == name]


def services(objects):
    """The API's, and then the operators', where there is one."""
    return sorted(kind(objects, "Service"), key=lambda item: "clusterIP" in item["spec"])


def pods(objects):
    """The pod templates, workers of a multi-node server among them."""
    found = [item["spec"]["template"] for item in kind(objects, "StatefulSet")]
    for item in kind(objects, "LeaderWorkerSet"):
        template = item["spec"]["leaderWorkerTemplate"]
        found += [template["leaderTemplate"], template["workerTemplate"]]
    assert found
    return found


def claims(objects):
    """The volumes that each pod has of its own."""
    return [
        claim
        for item in kind(objects, "StatefulSet")
        for claim in item["spec"]["volumeClaimTemplates"]
    ]


def container(pod):
    [only] = pod["spec"]["containers"]
    assert "initContainers" not in pod["spec"]
    return only


def servers(objects):
    found = [pod for pod in pods(objects) if container(pod).get("ports")]
    assert found
    return found


@pytest.mark.parametrize("name", NAMES)
def test_lint_strict_finds_nothing(name):
    report = helm.lint(CHART, values(name), strict=True)
    assert [m for m in report["messages"] if m["severity"] > 1] == []
    assert report["errors"] == []


def test_every_object_fits_the_schema_of_kubernetes(objects):
    check_objects(objects)


def check_objects(objects):
    for item in objects:
        if item["kind"] == "LeaderWorkerSet":
            assert fits(item, LeaderWorkerSet)
            for pod in pods(objects):
                assert pod["metadata"]["labels"]
                whole = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod}
                check(whole)
        elif item["kind"] not in ("HTTPRoute", "PrometheusRule", "ServiceMonitor", "ScaledObject"):
            # Those are of the Gateway API, the Prometheus operator and KEDA, not of Kubernetes.
            check(item)


def check(item):
    for version in KUBERNETES:
        kubernetes_validate.validate(item, version, strict=True)


def fits(item, model):
    """Raises ValidationError for a value of another type; says whether all fields are known."""
    read_back = model.model_validate(item).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )
    return bool(read_back == item)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replicas", "2"),
        ("startupPolicy", "WorkersFirst"),
        ("leaderWorkerTemplate.size", 0),
        ("leaderWorkerTemplate.restartPolicy", "Always"),
        ("leaderWorkerTemplate.workerTemplate", None),
        ("leaderWorkerTemplate.template", {}),
    ],
)
def test_a_wrong_leader_worker_set_would_be_found(field, value):
    [item] = kind(render(values("multi-node")), "LeaderWorkerSet")
    *path, last = field.split(".")
    part = item["spec"]
    for name in path:
        part = part[name]
    part[last] = value
    with pytest.raises(ValidationError):
        fits(item, LeaderWorkerSet)


@pytest.mark.parametrize(
    ("name", "model"),
    [("multi-node", ScaledObject), ("production", ServiceMonitor), ("tokens", PrometheusRule)],
)
def test_objects_of_operators_fit_their_definitions(name, model):
    """By models that were generated from the operators' own CustomResourceDefinitions."""
    [item] = kind(render(values(name)), model.__name__)
    assert fits(item, model)
    assert not fits(item | {"spec": item["spec"] | {"misspelt": 1}}, model)
    for field in item["spec"]:
        with pytest.raises(ValidationError):
            fits(item | {"spec": item["spec"] | {field: "?"}}, model)


@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm: PyPI has no such schema")
def test_an_httproute_fits_the_gateway_api(tmp_path):
    """By validators that were generated from its CustomResourceDefinitions."""
    folder = shutil.copytree(Path(__file__).parent / "gateway_api", tmp_path / "gateway_api")
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)

    def complaints(item):
        done = subprocess.run(
            ["node", "fits.mjs"],
            cwd=folder,
            input=json.dumps(item),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == (not done.stderr)
        return done.stderr

    [route] = kind(render(values("production")), "HTTPRoute")
    assert complaints(route) == ""
    assert "hostnames/0" in complaints(route | {"spec": {"hostnames": ["not a name"]}})


def test_nothing_runs_as_root_or_can_become_it(objects):
    for pod in pods(objects):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert all("hostPath" not in volume for volume in pod["spec"]["volumes"])


def test_a_cluster_may_assign_the_user():
    """OpenShift refuses pods that name another than one of their namespace's own."""
    for pod in pods(render({"runAsUser": None})):
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(pod["spec"]["securityContext"])
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


def test_a_user_may_be_of_the_range_that_openshift_gives_a_namespace():
    for pod in pods(render({"runAsUser": 1000650000})):
        context = pod["spec"]["securityContext"]
        assert context["runAsUser"] == context["fsGroup"] == 1000650000


def test_a_pod_can_do_nothing_to_the_cluster(objects):
    assert not [item for item in objects if "Role" in item["kind"]]
    for holder in [*(pod["spec"] for pod in pods(objects)), *kind(objects, "ServiceAccount")]:
        assert holder["automountServiceAccountToken"] is False


def test_it_may_write_where_the_image_must_be_able_to_and_nowhere_else(objects):
    home = read(ROOT / "Dockerfile")[-1].pairs("ENV")["HOME"]
    for pod in pods(objects):
        mounts = container(pod)["volumeMounts"]
        writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
        log = {"/var/lib/expertgate"} if "ports" in container(pod) else set()
        assert writable == {home, "/tmp", "/dev/shm"} | log
        names = [volume["name"] for volume in pod["spec"]["volumes"]]
        names += [claim["metadata"]["name"] for claim in claims(objects)]
        assert sorted(mount["name"] for mount in mounts) == sorted(names)


def test_files_that_change_are_mounted_as_folders(objects):
    for pod in pods(objects):
        assert all("subPath" not in mount for mount in container(pod)["volumeMounts"])


def test_resources_are_set(objects):
    for pod in pods(objects):
        resources = container(pod)["resources"]
        assert resources["requests"]
        assert resources["limits"]["memory"]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_as_many_as_gpus(name):
    objects, gpus = render(values(name)), values(name).get("gpus", 2)
    for pod in pods(objects):
        assert container(pod)["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
    assert config(objects)["engine"].get("tensor_parallel_size", 0) == gpus


def test_one_listener_is_exposed(objects):
    service, *others = services(objects)
    [port] = service["spec"]["ports"]
    assert port["targetPort"] == "http"
    # The operators' listener has no address of its own, and is led to by nothing else.
    assert all(other["spec"]["clusterIP"] == "None" for other in others)
    for pod in servers(objects):
        ports = [(port["name"], port["containerPort"]) for port in container(pod)["ports"]]
        assert ports == [("http", 8000), ("admin", 9100)][: 1 + len(others)]
        selector, labels = service["spec"]["selector"], pod["metadata"]["labels"]
        assert selector.items() <= labels.items()
    workers = [pod for pod in pods(objects) if pod not in servers(objects)]
    assert all(not selector.items() <= pod["metadata"]["labels"].items() for pod in workers)


def test_the_network_lets_nobody_reach_the_engine(objects):
    [policy] = kind(objects, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    mine = policy["spec"]["podSelector"]["matchLabels"]
    assert all(mine.items() <= pod["metadata"]["labels"].items() for pod in pods(objects))
    rules = policy["spec"]["ingress"]
    [api] = [rule for rule in rules if rule.get("ports", [{}])[0].get("port") == "http"]
    assert api["ports"] == [{"port": "http", "protocol": "TCP"}]
    for admin in [rule for rule in rules if rule.get("ports", [{}])[0].get("port") == "admin"]:
        assert admin["ports"] == [{"port": "admin", "protocol": "TCP"}]
        assert admin["from"]  # without peers it would be everybody
    ranks = [rule for rule in rules if "ports" not in rule]
    # The sockets of a server over several nodes: for its own release's pods alone.
    many = bool(kind(objects, "LeaderWorkerSet"))
    assert ranks == [{"from": [{"podSelector": {"matchLabels": mine}}]}] * many


def test_the_operators_listener_is_there_where_its_token_is(objects):
    admin = config(objects).get("admin")
    assert bool(admin) == (len(kind(objects, "Service")) == 2)
    for monitor in kind(objects, "ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        [_, service] = services(objects)
        assert monitor["spec"]["selector"]["matchLabels"].items() <= (
            service["metadata"]["labels"].items()
        )
        assert endpoint["port"] == service["spec"]["ports"][0]["name"]
        assert endpoint["authorization"]["credentials"]["key"] == Path(admin["token"]).name


def test_an_operators_listener_alone_opens_to_nobody():
    [policy] = kind(render({"admin": {"existingSecret": "operators"}}), "NetworkPolicy")
    assert len(policy["spec"]["ingress"]) == 1


def test_an_audit_log_outlives_its_pod_and_is_nobody_elses(objects):
    folder = config(objects)["audit"]
    for pod in servers(objects):
        [mount] = [m for m in container(pod)["volumeMounts"] if m["name"] == "audit"]
        assert Path(folder["path"]).is_relative_to(mount["mountPath"])
        if kind(objects, "LeaderWorkerSet"):
            assert mount["subPathExpr"] == "$(POD_NAME)"
    for item in kind(objects, "StatefulSet"):
        [claim] = claims(objects)
        assert claim["metadata"]["name"] == "audit"
        assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
        kept = item["spec"]["persistentVolumeClaimRetentionPolicy"]
        assert set(kept.values()) == {"Retain"}


WAITING = 'sum({__name__=~"vllm:num_requests_waiting|expertgate_calls_waiting", '
"""In the engine, which is given little more than it can run, and before it."""
[ADAPTER] = [
    yaml.safe_load(text)
    for text in re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs/operating.md").read_text(), re.DOTALL
    )
    if "seriesQuery" in text
]


def test_the_signing_key_is_of_a_secret_or_beside_the_log(objects):
    key = Path(config(objects)["audit"]["signing_key"])
    for pod in servers(objects):
        [mount] = [m for m in container(pod)["volumeMounts"] if m["mountPath"] == str(key.parent)]
        [secret] = [v for v in pod["spec"]["volumes"] if v["name"] == "signing"] or [None]
        if secret is None:
            assert mount["name"] == "audit"
        else:
            assert secret["secret"] == {"secretName": "signing", "defaultMode": 0o440}
            assert mount == {"name": "signing", "mountPath": str(key.parent), "readOnly": True}


def test_replicas_follow_what_waits(objects):
    scalers = kind(objects, "HorizontalPodAutoscaler") + kind(objects, "ScaledObject")
    [workload] = kind(objects, "StatefulSet") + kind(objects, "LeaderWorkerSet")
    assert ("replicas" in workload["spec"]) == (not scalers)
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        assert target == {
            "apiVersion": workload["apiVersion"],
            "kind": workload["kind"],
            "name": workload["metadata"]["name"],
        }
    for scaler in kind(objects, "HorizontalPodAutoscaler"):
        [metric] = scaler["spec"]["metrics"]
        [rule] = ADAPTER["rules"]
        assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
        asked = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
        assert WAITING in asked
    for scaler in kind(objects, "ScaledObject"):
        [trigger] = scaler["spec"]["triggers"]
        assert WAITING in trigger["metadata"]["query"]
        [_, service] = services(objects)
        assert f'service="{service["metadata"]["name"]}"' in trigger["metadata"]["query"]


def test_routes_lead_to_the_api_alone(objects):
    for ingress in kind(objects, "Ingress"):
        [rule] = ingress["spec"]["rules"]
        check_paths({p["path"]: p["pathType"] == "Prefix" for p in rule["http"]["paths"]})
    for route in kind(objects, "HTTPRoute"):
        [rule] = route["spec"]["rules"]
        paths = [match["path"] for match in rule["matches"]]
        check_paths({path["value"]: path["type"] == "PathPrefix" for path in paths})


INSIDE = {"/health", "/ready", "/version"}
"""Of the public listener, what is for the cluster alone."""


def check_paths(prefixes):
    """`prefixes`: whether each path stands for all below it as well."""
    public = {route.path for route in ROUTES}
    assert public > INSIDE

    def is_led_to(path):
        return path in prefixes or any(
            path.startswith(f"{prefix}/") for prefix, below in prefixes.items() if below
        )

    assert {path for path in public if is_led_to(path)} == public - INSIDE


DOWNLOAD_S = 67e9 * 8 / 0.5e9
"""Of the chart's own model, at half a gigabit a second; nothing listens before it is there."""


def test_probes_ask_what_each_is_for(objects):
    for pod in servers(objects):
        paths = {
            name: container(pod)[name]["httpGet"]["path"]
            for name in ("startupProbe", "livenessProbe", "readinessProbe")
        }
        assert paths == {
            "startupProbe": "/health",
            "livenessProbe": "/health",
            "readinessProbe": "/ready",
        }
        startup = container(pod)["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= DOWNLOAD_S
        scheme = "HTTPS" if "tls" in config(objects) else "HTTP"
        assert {container(pod)[name]["httpGet"]["scheme"] for name in paths} == {scheme}
        [port] = services(objects)[0]["spec"]["ports"]
        assert port["appProtocol"] == scheme.lower()


def has_time_to_drain(objects, drain_s):
    for pod in servers(objects):
        hook = container(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= hook + takes_s(drain_s)


def test_a_pod_has_time_to_drain(objects):
    has_time_to_drain(objects, Config.model_fields["drain_s"].default)


def test_a_pod_has_time_for_another_drain():
    has_time_to_drain(render({"config": {"drain_s": 300}}), 300)


def test_a_pod_that_goes_leaves_others(objects):
    [budget] = kind(objects, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    for pod in servers(objects):
        chosen = budget["spec"]["selector"]["matchLabels"]
        assert chosen.items() <= pod["metadata"]["labels"].items()


def config(objects):
    [text] = [
        item["data"]["expertgate.yaml"]
        for item in kind(objects, "ConfigMap")
        if "expertgate.yaml" in item["data"]
    ]
    return yaml.safe_load(text)


def test_the_server_takes_its_configuration(objects, tmp_path):
    path = tmp_path / "expertgate.yaml"
    path.write_text(yaml.safe_dump(config(objects)))
    read_back = Config.load(path)
    assert (read_back.host, read_back.port) == ("0.0.0.0", 8000)
    for pod in servers(objects):
        mounted = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
        named = [read_back.policies, read_back.suspended.parent]
        files = [read_back.catalogue, read_back.identity.api_keys]
        files += [issuer.jwks_file for issuer in read_back.identity.jwt]
        files += [read_back.tls.certificate, read_back.tls.key] if read_back.tls else []
        named += [file.parent for file in files if file]
        assert {str(folder) for folder in named} <= mounted


def test_pods_of_ipv6_are_reached_at_both_listeners(tmp_path):
    given = {"address": "::", "admin": {"existingSecret": "operators"}}
    path = tmp_path / "expertgate.yaml"
    path.write_text(yaml.safe_dump(config(render(given))))
    read_back = Config.load(path)
    assert (read_back.host, read_back.admin.listen) == ("::", "[::]:9100")


def test_what_is_read_at_the_start_only_restarts_the_pods():
    [before], [after] = (servers(render({"engine": {"max_model_len": n}})) for n in (1, 2))
    assert before["metadata"]["annotations"] != after["metadata"]["annotations"]


def test_what_is_read_again_restarts_nothing():
    changed = {"suspended": ["news"], "catalogue": {"content": "{}"}}
    changed["policies"] = {"files": {"b.cedar": "permit(principal, action, resource);"}}
    before, after = render({"catalogue": {"content": "[]"}}), render(changed)
    assert pods(before) == pods(after)
    assert kind(before, "ConfigMap") != kind(after, "ConfigMap")


def test_without_a_list_in_the_chart_each_pod_keeps_one_that_can_be_written():
    objects = render({"suspended": None})
    path = Path(config(objects)["suspended"])
    for pod in servers(objects):
        [mount] = [m for m in container(pod)["volumeMounts"] if path.is_relative_to(m["mountPath"])]
        assert mount["name"] == "audit"  # which outlives the pod
        assert not mount.get("readOnly")
        assert "suspended" not in {volume["name"] for volume in pod["spec"]["volumes"]}
    assert not [m for m in kind(objects, "ConfigMap") if "suspended.yaml" in m["data"]]


@pytest.mark.parametrize("names", [[], ["news"], ["math", "news"]])
def test_the_suspended_arrive_as_they_were_written(names, tmp_path):
    maps = kind(render({"suspended": names}), "ConfigMap")
    [data] = [item["data"] for item in maps if "suspended.yaml" in item["data"]]
    path = tmp_path / "suspended.yaml"
    path.write_text(data["suspended.yaml"])
    assert suspensions.read(path) == frozenset(names)


def mounted(folder, files):
    """Updates a folder as Kubernetes does: links to a hidden folder, which is turned at once."""
    version = folder / f"..{len(list(folder.glob('..*')))}"
    version.mkdir(parents=True)
    for name, text in files.items():
        (version / name).write_text(text)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    turned = folder / "..data_tmp"
    turned.symlink_to(version.name)
    turned.rename(folder / "..data")


PERMIT = "permit(principal, action, resource);"


def test_a_change_of_a_mounted_folder_is_seen(tmp_path):
    policies, keys = tmp_path / "policies", tmp_path / "keys"
    mounted(policies, {"a.cedar": PERMIT})
    mounted(keys, {"keys.yaml": "[]"})
    files = PolicyFiles(policies, tmp_path / "none", {})
    watched = WatchedFile(keys / "keys.yaml", lambda raw, _: raw)
    before = files.stamp()
    assert files.stamp() == before
    mounted(policies, {"a.cedar": PERMIT})
    mounted(keys, {"keys.yaml": "[ ]"})
    assert files.stamp() != before
    assert not asyncio.run(watched.refresh())  # the first look sees it, the next that it is whole
    assert asyncio.run(watched.refresh())
    assert watched.value == b"[ ]"


def test_the_catalogue_arrives_as_it_was_written(tmp_path):
    objects = render(values("cpu"))
    [data] = [item["data"] for item in kind(objects, "ConfigMap") if "experts.json" in item["data"]]
    given = json.loads(values("cpu")["catalogue"]["content"])
    assert json.loads(data["experts.json"]) == given
    assert [expert["name"] for expert in given["experts"]] == ["public", "math"]


def test_several_nodes_form_one_server():
    [group] = kind(render(values("multi-node")), "LeaderWorkerSet")
    leader, worker = pods([group])
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 2
    assert container(leader)["args"][0].count("ray start --head") == 1
    assert "expertgate serve" in container(leader)["args"][0]
    assert "expertgate serve" not in container(worker)["args"][0]
    # Neither keys nor policies go where nobody is asked for them.
    assert {v["name"] for v in worker["spec"]["volumes"]} == {"cache", "tmp", "shared-memory"}
    said = config(render(values("multi-node")))["engine"]
    assert said["pipeline_parallel_size"] == 2
    assert said["distributed_executor_backend"] == "ray"


def test_workers_find_their_leader_before_it_is_ready():
    """By a Service that LeaderWorkerSet's controller makes, unless there is one of that name."""
    objects = render(values("multi-node"))
    [group] = kind(objects, "LeaderWorkerSet")
    name = group["metadata"]["name"]
    policy = group["spec"].get("networkConfig", {}).get("subdomainPolicy", "Shared")
    wanted = {name} if policy == "Shared" else {f"{name}-{index}" for index in range(100)}
    assert not wanted & {service["metadata"]["name"] for service in services(objects)}


@pytest.mark.parametrize("name", NAMES)
def test_every_pod_has_the_environment_that_is_given(name):
    given = values(name).get("env", [])
    for pod in pods(render(values(name))):
        found = container(pod).get("env", [])
        assert found[: len(given)] == given
        names = [each["name"] for each in found]
        assert len(names) == len(set(names)), "the last of two would win"


def test_labels_and_annotations_arrive():
    for name in NAMES:
        for pod in pods(render(values(name) | {"podLabels": {"example/cost-centre": "42"}})):
            assert pod["metadata"]["labels"]["example/cost-centre"] == "42"
    given = values("production")
    objects = render(given)
    assert services(objects)[0]["metadata"]["annotations"] == given["service"]["annotations"]
    [account] = kind(objects, "ServiceAccount")
    assert account["metadata"]["annotations"] == given["serviceAccount"]["annotations"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 3},
        {"model": {"nam": "x"}},
        {"gpus": "two"},
        {"model": {"name": "/models/flex"}},  # without the claim that is mounted there
        {"policies": {"files": {"notes.txt": "x"}}},
        {"policies": {"files": {"..x.cedar": "x"}}},
        {"policies": {"files": {".x.cedar": "x"}}},  # which the server passes over
        {"policies": {"files": {f"{'x' * 250}.cedar": "x"}}},
        {"image": {"digest": "sha256:abc"}},
        {"resources": {"limits": {"memory": None}}},
        {"resources": {"limits": {"cpu": -1}}},
        {"ingress": {"enabled": True}},
        {"httpRoute": {"enabled": True}},
        {"multiNode": {"enabled": True}, "audit": {"existingClaim": "logs"}, "gpus": 0},
        {"multiNode": {"enabled": True}},  # and so a log that would go with the pod
        {"service": {"type": "NodePort"}},
        {"audit": {"existingClaim": "shared"}},
        {"serviceMonitor": {"enabled": True}},
        {"autoscaling": {"enabled": True}, "admin": {"existingSecret": "operators"}},
        {"env": {"HTTPS_PROXY": "http://proxy"}},
        {"env": [{"name": "HTTPS_PROXY"}]},
        {"env": [{"name": "THREADS", "value": 4}]},
        {"env": [{"name": "VLLM_PLUGINS", "value": "others"}]},
        {"apiKeys": {"existingSecret": ""}},  # lets nobody in
        {"apiKeys": {"existingSecret": ""}, "config": {"identity": {"jwt": []}}},
        {"config": {"tls": {"certificate": "/a", "key": "/b", "client_ca": "/c"}}},
        {"imagePullSecrets": ["registry", "registry"]},
        {"extraVolumes": [{"name": "keys", "emptyDir": {}}]},
        {"extraVolumes": [{"name": "node", "hostPath": {"path": "/"}}]},
        {"extraVolumeMounts": [{"name": "audit", "mountPath": "/a"}]},
        {"extraVolumeMounts": [{"name": "a", "mountPath": "/etc/expertgate/policies/a"}]},
        {"extraVolumeMounts": [{"name": "a", "mountPath": "/etc/x/../expertgate/keys"}]},
        {"extraVolumeMounts": [{"name": "a", "mountPath": "/"}]},
        {"extraVolumeMounts": [{"name": "a", "mountPath": "/a", "readOnly": False}]},
        {"prometheusRule": {"enabled": True}},
        {"runAsUser": 0},
        {"fullnameOverride": "Models"},
        {"fullnameOverride": "x" * 50},
        {"fullnameOverride": "true"},
        {"serviceAccount": {"name": "no name"}},
        {"address": "10.0.0.1"},
        {"podLabels": {"app.kubernetes.io/component": "worker"}},
        # A claim that asks for no storage is refused when a pod's volume is made.
        {"audit": {"size": None}},
        # A pod that comes by itself, or comes back without a volume, would suspend nobody.
        {
            "suspended": None,
            "autoscaling": {"enabled": True},
            "admin": {"existingSecret": "operators", "from": [{"podSelector": {}}]},
        },
        {
            "suspended": None,
            "multiNode": {"enabled": True},
            "config": {"audit": {"enabled": False}},
        },
    ],
    ids=json.dumps,
)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(helm.HelmError):
        render(wrong)


SPACE = {"name": "a", "emptyDir": {}}
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
MANY = {"autoscaling": {"enabled": True, "minReplicas": 5}}
OPERATORS = {"admin": {"existingSecret": "operators", "from": [{"podSelector": {}}]}}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"resources": {"limits": {"memory": "65000Mi"}}},
            "resources.requests.memory (64Gi) is above resources.limits.memory (65000Mi)",
        ),
        (
            {"resources": {"requests": {"cpu": "4500m"}, "limits": {"cpu": "4"}}},
            "resources.requests.cpu (4500m) is above resources.limits.cpu (4)",
        ),
        (
            {"resources": {"requests": {"cpu": 16}, "limits": {"cpu": 0}}},
            "resources.requests.cpu (16) is above resources.limits.cpu (0)",
        ),
        (
            {"resources": {"requests": {"memory": "1Ei"}, "limits": {"memory": "1E"}}},
            "resources.requests.memory (1Ei) is above resources.limits.memory (1E)",
        ),
        ({"resources": {"limits": {"nvidia.com/gpu": 4}}}, "nvidia.com/gpu: `gpus` says it"),
        ({"resources": {"requests": {"nvidia.com/gpu": "4"}}}, "nvidia.com/gpu: `gpus` says it"),
        ({"audit": {"size": "0Gi"}}, "audit.size (0Gi)"),
        ({"serviceAccount": {"name": "mlops", "annotations": {"a": "b"}}}, "annotate mlops itself"),
        ({"audit": {"size": 0}}, "audit.size (0)"),
        (
            {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
            "env: A is there twice",
        ),
        (
            {"topologySpreadConstraints": [SPREAD, SPREAD | {"maxSkew": 2}]},
            "topologySpreadConstraints: zone DoNotSchedule is there twice",
        ),
        ({"extraVolumes": [SPACE, SPACE]}, "extraVolumes: a is there twice"),
        (
            {"extraVolumes": [SPACE], "extraVolumeMounts": [{"name": "b", "mountPath": "/b"}]},
            "extraVolumeMounts: /b is of b, which isn't in extraVolumes",
        ),
        (
            {"extraVolumes": [SPACE], "extraVolumeMounts": [{"name": "a", "mountPath": "/a"}] * 2},
            "extraVolumeMounts: /a is there twice",
        ),
        (MANY | OPERATORS, "autoscaling.minReplicas (5) is above autoscaling.maxReplicas (4)"),
    ],
    ids=json.dumps,
)
def test_values_that_do_not_fit_one_another_are_named(wrong, said):
    """No schema can say them. Kubernetes takes a StatefulSet whose pods it then refuses, and of a
    list with something twice it keeps one, or, from Helm 4, nothing."""
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        render(wrong)


def leaves(given, *path):
    """The way to each value of nested dictionaries, by their keys."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from leaves(value, *path, name)
        else:
            yield (*path, name)


def test_what_the_chart_writes_itself_is_refused_by_name():
    written = config(
        render(
            OPERATORS
            | {"model": {"revision": "main"}, "catalogue": {"content": "{}"}}
            | {"multiNode": {"enabled": True}, "audit": {"existingClaim": "logs"}}
        )
    )
    engine = written.pop("engine")
    found = [*leaves(written, "config"), *leaves(engine, "engine"), ("config", "engine", "seed")]
    assert len(found) > 12
    for path in found:
        given = "elsewhere"
        for name in reversed(path):
            given = {name: given}
        with pytest.raises(
            helm.HelmError, match=r"must not be set: `\w+(\.\w+)?` says it"
        ) as caught:
            render(given)
        assert re.search(r"([\w.]+) must not", str(caught.value))[1] in ".".join(path)


@pytest.mark.parametrize(
    "right",
    [
        {"resources": {"limits": {"cpu": "8", "memory": "64Gi"}}},
        {"resources": {"requests": {"cpu": "0.5", "memory": "1G"}, "limits": {"cpu": "500m"}}},
        {"resources": {"requests": {"memory": "1.5Gi"}, "limits": {"memory": "1536Mi"}}},
        {"resources": {"requests": {"ephemeral-storage": "1Ti"}}},
        {"resources": {"requests": {"cpu": 0.5}, "limits": {"cpu": "500m"}}},
        {"resources": {"requests": {"memory": "1024Pi"}, "limits": {"memory": "1Ei"}}},
        {"resources": {"requests": {"memory": "1E"}, "limits": {"memory": "1000P"}}},
        {"autoscaling": {"enabled": True, "minReplicas": 4}} | OPERATORS,
        {"autoscaling": {"minReplicas": 5}},
        {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]},
        {
            "topologySpreadConstraints": [
                SPREAD,
                SPREAD | {"topologyKey": "node"},
                SPREAD | {"whenUnsatisfiable": "ScheduleAnyway"},
            ]
        },
    ],
    ids=json.dumps,
)
def test_values_that_fit_one_another_are_taken(right):
    render(right)


@pytest.mark.parametrize("size", [16, 0.5, 171798691840, "2Pi", "2E"])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_arrive_as_kubernetes_takes_them(name, size):
    """Numbers too, as `--set resources.requests.cpu=16` makes one."""
    resources = {"requests": {"cpu": size, "memory": size}, "limits": {"memory": size}}
    disk = values(name).get("audit", {}) | {"size": size}
    given = {"resources": resources, "audit": disk, "cache": {"size": size}, "sharedMemory": size}
    objects = render(values(name) | given)
    check_objects(objects)
    for pod in pods(objects):
        arrived = container(pod)["resources"]
        assert arrived["requests"] == resources["requests"]
        assert arrived["limits"]["memory"] == size
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["shared-memory"]["emptyDir"]["sizeLimit"] == size
        assert volumes["cache"]["emptyDir"]["sizeLimit"] == size
    for claim in claims(objects):
        assert claim["spec"]["resources"]["requests"]["storage"] == size


@pytest.mark.parametrize("name", yaml.safe_load((CHART / "values.yaml").read_text()))
def test_a_value_that_is_left_empty_is_none_or_named(name):
    """As `engine:` with nothing behind it, which takes the chart's own value out."""
    if name in json.loads((CHART / "values.schema.json").read_text())["required"]:
        with pytest.raises(helm.HelmError, match=f"missing property '{name}'"):
            render({name: None})
    else:
        assert config(render({name: None}))["host"] == "0.0.0.0"


def test_several_nodes_may_do_without_a_log_that_is_off():
    render({"multiNode": {"enabled": True}, "config": {"audit": {"enabled": False}}})


def test_several_nodes_may_keep_the_list_where_they_have_a_volume():
    claim = {"existingClaim": "logs"}
    render({"suspended": None, "multiNode": {"enabled": True}, "audit": claim})


def test_names_follow_the_release():
    assert services(render({}))[0]["metadata"]["name"] == "gate-expertgate"
    named = render({}, release="expertgate-eu")
    assert services(named)[0]["metadata"]["name"] == "expertgate-eu"


@pytest.mark.parametrize("name", NAMES)
def test_all_objects_may_be_called_otherwise(name):
    given = values(name)
    plain, other = render(given), render(given | {"fullnameOverride": "models"})
    assert json.dumps(other) == re.sub(r"gate-expertgate", "models", json.dumps(plain))


@pytest.mark.parametrize("name", NAMES)
def test_pods_may_have_an_account_that_is_there_already(name):
    objects = render(values(name) | {"serviceAccount": {"name": "mlops", "annotations": None}})
    assert not kind(objects, "ServiceAccount")
    for pod in pods(objects):
        assert pod["spec"]["serviceAccountName"] == "mlops"
        assert pod["spec"]["automountServiceAccountToken"] is False


# Helm takes all: with dots, a digit first, what YAML reads as no text, and the longest.
RELEASES = ["a.b", "1gate", "12", "true", "null", f"{'x' * 47}.v1-eu", f"{'x' * 47}--a-b", "x" * 53]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["multi-node", "production"])
def test_every_release_that_helm_takes_has_names_that_kubernetes_takes(name, release):
    objects = render(values(name), release)
    for item in objects:
        # A Service's name is a label of DNS, and so is a LeaderWorkerSet's: it names one.
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", item["metadata"]["name"])
        assert len(item["metadata"]["name"]) <= 63
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    for item in kind(objects, "StatefulSet") + kind(objects, "LeaderWorkerSet"):
        # Its controller labels pods with a hash behind the name; of the 100th group's workers too.
        assert len(f"{item['metadata']['name']}-99-{'h' * 10}") <= 63


NAMED = """
imagePullSecrets: [NAME]
model: {name: /models/demo, existingClaim: NAME, tokenSecret: NAME}
apiKeys: {existingSecret: NAME}
admin: {existingSecret: NAME, from: [{podSelector: {}}]}
serviceMonitor: {enabled: true}
policies: {existingConfigMap: NAME}
catalogue: {existingConfigMap: NAME}
cache: {existingClaim: NAME}
audit: {signingKeySecret: NAME, CHOSEN}
ingress: {enabled: true, className: NAME, host: NAME, tlsSecret: NAME}
priorityClassName: NAME
runtimeClassName: NAME
serviceAccount: {name: NAME}
"""


@pytest.mark.parametrize("word", ["12", "0x1f", "true", "null"])
@pytest.mark.parametrize(
    "chosen", ["storageClass: NAME", "existingClaim: NAME}\nmultiNode: {enabled: true"]
)
def test_a_name_is_text_whatever_yaml_would_take_it_for(chosen, word):
    named = NAMED.replace("CHOSEN", chosen)
    quoted = render(yaml.safe_load(named.replace("NAME", f'"{word}"')))
    plain = render(yaml.safe_load(named.replace("NAME", "placeholder")))
    assert quoted == json.loads(json.dumps(plain).replace("placeholder", word))


def test_an_ingress_may_be_of_all_hosts_below_one():
    wild = {"enabled": True, "host": "*.models.example", "tlsSecret": "models-tls"}
    [ingress] = kind(render({"ingress": wild}), "Ingress")
    assert ingress["spec"]["rules"][0]["host"] == "*.models.example"
    assert ingress["spec"]["tls"][0]["hosts"] == ["*.models.example"]


def test_a_build_in_the_version_is_no_label(tmp_path, monkeypatch):
    """As `helm package --version 0.1.0+build.7` writes it."""
    copied = shutil.copytree(CHART, tmp_path / "expertgate")
    chart = yaml.safe_load((copied / "Chart.yaml").read_text())
    chart |= {"version": "0.1.0+build.7", "appVersion": "0.1.0+cu130"}
    (copied / "Chart.yaml").write_text(yaml.safe_dump(chart))
    monkeypatch.setitem(globals(), "CHART", copied)
    for item in render(values("production")):
        for value in item["metadata"]["labels"].values():
            assert re.fullmatch(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]", value)


def test_the_chart_and_the_package_have_one_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == expertgate.__version__
