"""The chart's objects, made on a real API server where there is one.

It finds what no schema says: a mount of a volume that isn't there, a limit below its request, a
name or a port that another kind doesn't take, a change of what can't be changed. What a server
doesn't serve, as the kinds of operators, is a subtest that is skipped and says so: an older one,
as Debian's source package `kubernetes` makes, checks the rest.
"""

import itertools
import os
from pathlib import Path

import pytest

from tests.deploy.api_server import running
from tests.deploy.test_helm import (
    NAMES,
    SPREAD,
    claims,
    container,
    kind,
    pods,
    render,
    servers,
    values,
)

ASSETS = os.environ.get("KUBEBUILDER_ASSETS")
pytestmark = pytest.mark.skipif(
    not ASSETS,
    reason="KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver (as made by"
    " sigs.k8s.io/controller-runtime/tools/setup-envtest: setup-envtest use --print path)",
)
EVERYWHERE = {"ConfigMap", "NetworkPolicy", "Pod", "Service", "ServiceAccount", "StatefulSet"}
"""Whatever a server doesn't serve, of these each must have been checked."""


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with running(Path(ASSETS), tmp_path_factory.mktemp("kubernetes")) as server:
        yield server


@pytest.fixture
def namespace(api):
    """Its pods must keep to the Pod Security Standard `restricted`, where the server knows it."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    head = {"generateName": "models-", "labels": labels}
    made = taken(api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": head}))
    return made["metadata"]["name"]


def taken(response):
    """Without a warning, as servers send of what is deprecated or has no effect."""
    assert response.is_success, response.json()["message"]
    assert "warning" not in response.headers, response.headers["warning"]
    return response.json()


def rendered(api, name):
    objects = render(values(name))
    for pod in servers(objects):
        hook = container(pod)["lifecycle"]["preStop"]
        if not api.knows("core.v1.LifecycleHandler", "sleep"):  # older than Chart.yaml admits
            hook["exec"] = {"command": ["sleep", str(hook.pop("sleep")["seconds"])]}
    return objects


def started(objects):
    """The pods that controllers would make, as if nothing of the cluster's own were named."""
    for number, template in enumerate(pods(objects)):
        spec = {k: v for k, v in template["spec"].items() if not k.endswith("ClassName")}
        spec["volumes"] = spec["volumes"] + [
            {"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": "own"}}
            for claim in claims(objects)
        ]
        metadata = template["metadata"] | {"name": f"pod-{number}"}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@pytest.mark.parametrize("name", NAMES)
def test_every_object_and_every_pod_is_taken(api, namespace, name, subtests):
    objects = rendered(api, name)
    accounts = kind(objects, "ServiceAccount")  # before the pods that name one
    others = [item for item in objects if item not in accounts]
    for item in [*accounts, *others, *started(objects)]:
        what = f"{item['apiVersion']} {item['kind']}"
        with subtests.test(f"{what} {item['metadata']['name']}"):
            if api.collection(item, namespace) is None:
                assert item["kind"] not in EVERYWHERE
                pytest.skip(f"Kubernetes {api.version} serves no {what} here: not checked")
            taken(api.create(item, namespace))


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(NAMES, 2)))
def test_an_upgrade_changes_nothing_that_is_for_good(api, namespace, before, after):
    old, new = rendered(api, before), rendered(api, after)
    for item in kind(new, "StatefulSet"):
        for kept in kind(old, "StatefulSet"):  # as values.yaml says of the log's volume
            item["spec"]["volumeClaimTemplates"] = kept["spec"]["volumeClaimTemplates"]
    served = [[item for item in each if api.collection(item, namespace)] for each in (old, new)]
    there = [taken(api.create(item, namespace)) for item in served[0]]
    for item in served[1]:
        known = any(identity(item) == identity(other) for other in there)
        taken((api.change if known else api.create)(item, namespace))


def identity(item):
    return item["kind"], item["metadata"]["name"]


def in_pod(change):
    return lambda objects: change(container(pods(objects)[0]))


@pytest.mark.parametrize(
    ("which", "change", "complaint"),
    [
        ("Pod", in_pod(lambda c: c["volumeMounts"][0].update(name="nowhere")), "Not found"),
        ("Pod", in_pod(lambda c: c["volumeMounts"][0].update(mountPath="/tmp")), "must be unique"),
        ("Pod", in_pod(lambda c: c["resources"]["limits"].update(memory="1Gi")), "memory limit"),
        ("Pod", in_pod(lambda c: c["ports"][0].update(name="p" * 16)), "ports[0].name"),
        (
            "Pod",
            lambda objects: pods(objects)[0]["spec"].update(
                topologySpreadConstraints=[SPREAD, SPREAD]
            ),
            "Duplicate value",
        ),
        (
            "StatefulSet",
            lambda objects: pods(objects)[0]["metadata"]["labels"].clear(),
            "`selector` does not match template `labels`",
        ),
        (
            "Service",
            lambda objects: kind(objects, "Service")[0]["metadata"].update(name="1.0"),
            "metadata.name",
        ),
    ],
)
def test_what_is_wrong_would_be_refused(api, namespace, which, change, complaint):
    objects = rendered(api, "cpu")
    [account] = kind(objects, "ServiceAccount")
    taken(api.create(account, namespace))
    change(objects)
    answer = api.create(kind(objects + list(started(objects)), which)[0], namespace)
    assert answer.status_code == 422, answer.text
    assert complaint in answer.json()["message"]


def test_the_volume_of_the_log_is_for_good(api, namespace):
    """So values.yaml says of its size and its class."""
    [item] = kind(rendered(api, "cpu"), "StatefulSet")
    taken(api.create(item, namespace))
    claims([item])[0]["spec"]["resources"]["requests"]["storage"] = "20Gi"
    answer = api.change(item, namespace)
    assert answer.status_code == 422, answer.text
    assert "Forbidden" in answer.json()["message"]
