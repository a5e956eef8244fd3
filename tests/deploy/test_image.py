"""The whole image, where a container engine has one: run as compose does, and used.

`make image VARIANT=cpu` builds it, and `make image` CUDA's; CONTAINER_ENGINE names the engine, as
there. Its containers have no network: they are asked from within, and need none.
"""

import json
import os
import secrets
import subprocess
import time

import pytest
import torch
import yaml

from expertgate.server.demo import USERS
from tests.deploy.dockerfile import ROOT, read

ENGINE = os.environ.get("CONTAINER_ENGINE", "docker")
IMAGE, CUDA = "expertgate:cpu", "expertgate:cuda"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KEYS, SERVER = COMPOSE["services"]["keys"], COMPOSE["services"]["expertgate"]
HOME = "/home/expertgate"
ASK = """
import json, sys, urllib.error, urllib.request
url, key, body = sys.argv[1:]
headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
asked = urllib.request.Request("http://127.0.0.1:8000" + url, body.encode() or None, headers)
try:
    print(200, urllib.request.urlopen(asked, timeout=60).read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""


def engine(*arguments, check=True):
    done = subprocess.run(
        [ENGINE, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def needs(image):
    try:
        missing = engine("image", "inspect", image, check=False).returncode != 0
    except FileNotFoundError:
        missing = True
    variant = image.partition(":")[2]
    return pytest.mark.skipif(
        missing, reason=f"{ENGINE} has no image {image}: make image VARIANT={variant}"
    )


needs_cpu, needs_cuda = needs(IMAGE), needs(CUDA)


def flags(service, volume):
    """Of `run`, for what compose says of a service."""
    found = ["--network", "none"]
    found += ["--read-only"] * service["read_only"]
    found += ["--init"] * service.get("init", False)
    found += [part for path in service["tmpfs"] for part in ("--tmpfs", path)]
    found += [part for name in service["cap_drop"] for part in ("--cap-drop", name)]
    found += [part for name in service["security_opt"] for part in ("--security-opt", name)]
    found += [p for v in service["volumes"] for p in ("--volume", v.replace("state", volume, 1))]
    if "shm_size" in service:
        found += ["--shm-size", service["shm_size"].removesuffix("b")]
    return found


class Container:
    """A running server, and the volume with its keys and its log."""

    def __init__(self, name, keys):
        self.name = name
        self.keys = keys

    def inside(self, *command, check=True):
        return engine("exec", self.name, *command, check=check)

    def ask(self, path, key, body=None):
        """The status, and the answer."""
        said = "" if body is None else json.dumps(body)
        status, _, text = self.inside("python", "-c", ASK, path, key, said).stdout.partition(" ")
        return int(status), json.loads(text)


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    name = f"expertgate-test-{secrets.token_hex(4)}"
    config = tmp_path_factory.mktemp("etc") / "expertgate.yaml"
    config.write_text(COMPOSE["configs"]["expertgate"]["content"])
    config.chmod(0o644)
    [target] = [c["target"] for c in SERVER["configs"]]
    entrypoint, *arguments = KEYS["entrypoint"]
    command = [*arguments, *(part.replace("$$", "$") for part in KEYS["command"])]
    try:
        printed = engine(
            "run", "--rm", *flags(KEYS, name), "--entrypoint", entrypoint, IMAGE, *command
        ).stdout
        keys = dict(line.split(": ") for line in printed.splitlines())
        mounted = ["--volume", f"{config}:{target}:ro"]
        engine("run", "--detach", "--name", name, *flags(SERVER, name), *mounted, IMAGE)
        yield Container(name, keys)
    finally:
        engine("rm", "--force", name, check=False)
        engine("volume", "rm", "--force", name, check=False)


@needs_cpu
def test_it_gets_healthy_by_its_own_check(container):
    _, final = read(ROOT / "Dockerfile")
    check = json.loads(final.all("HEALTHCHECK")[0].partition("CMD ")[2])
    deadline = time.monotonic() + 300
    while "ready after" not in (said := engine("logs", container.name)).stdout + said.stderr:
        assert container.inside("true", check=False).returncode == 0, said
        assert time.monotonic() < deadline, said
        time.sleep(1)
    container.inside(*check)


@needs_cpu
def test_nobody_is_root_and_nothing_else_can_be_written(container):
    assert container.inside("id", "-u").stdout.strip() == "10001"
    status = container.inside("cat", "/proc/self/status").stdout
    held = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert int(held["CapEff"], 16) == int(held["CapBnd"], 16) == 0
    assert held["NoNewPrivs"] == "1"
    for folder in ("/", "/etc/expertgate", "/opt/expertgate"):
        assert container.inside("touch", f"{folder}/x", check=False).returncode, folder
    for folder in (HOME, "/tmp", "/dev/shm"):
        container.inside("touch", f"{folder}/x")


@needs_cpu
def test_each_user_has_the_experts_of_their_group(container):
    assert set(container.keys) == set(USERS)
    body = {"model": "demo", "prompt": "Q: who?\nA:", "max_tokens": 4}
    answers = {
        user: container.ask("/v1/completions", key, body) for user, key in container.keys.items()
    }
    sets = {user: tuple(said["experts"]["effective"]) for user, (_, said) in answers.items()}
    assert [status for status, _ in answers.values()] == [200] * len(USERS)
    assert len(set(sets.values())) == len(USERS)
    [theirs] = set(sets["nurse"]) - set(sets["lawyer"])
    status, said = container.ask(
        "/v1/completions", container.keys["lawyer"], {**body, "experts": [theirs]}
    )
    assert (status, said["error"]["code"]) == (403, "expert_not_permitted")
    assert container.ask("/v1/experts", "eg-wrong")[0] == 401


@needs_cpu
def test_it_ends_with_a_log_that_holds(container):
    grace = SERVER["stop_grace_period"].removesuffix("s")
    public = f"{HOME}/public.json"
    container.inside("sh", "-c", f"expertgate audit public-key {HOME}/audit-key.pem > {public}")
    engine("stop", "--time", grace, container.name)
    assert engine("inspect", "--format", "{{.State.ExitCode}}", container.name).stdout == "0\n"
    # With the public key; the exit status says whether all of it holds.
    verify = ["audit", "verify", f"{HOME}/audit", "--key", public]
    told = engine("run", "--rm", *flags(KEYS, container.name), IMAGE, *verify)
    assert "signatures hold; 0 records since the last head" in told.stdout


@needs_cuda
def test_cudas_image_has_cudas_build():
    code = "import expertgate.model.gpu_worker, torch; print(torch.version.cuda)"
    run = ["run", "--rm", "--network", "none", "--entrypoint", "python", CUDA]
    assert engine(*run, "-c", code).stdout.strip() not in ("", "None")


@needs_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cudas_image_says_that_there_is_no_gpu():
    run = ["run", "--rm", "--network", "none", "--read-only", "--tmpfs", HOME, "--tmpfs", "/tmp"]
    done = engine(*run, CUDA, "demo", check=False)
    assert done.returncode == 2
    assert "expertgate: no NVIDIA GPU is seen" in done.stdout + done.stderr
