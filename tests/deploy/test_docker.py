"""The image by its parts, for where there is no container engine: linted, and its commands run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import httpx
import pytest
import yaml

import expertgate
from expertgate.server.config import Config
from expertgate.server.demo import USERS
from tests.deploy.dockerfile import ROOT, read
from tests.deploy.stopping import takes_s
from tests.server.running import Server, stop

DOCKERFILE = ROOT / "Dockerfile"
BUILD, FINAL = read(DOCKERFILE)
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
CONFIG = yaml.safe_load(COMPOSE["configs"]["expertgate"]["content"])


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts"), "hadolint"), "--no-color", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_what_is_wrong(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace('"VARIANT"', "VARIANT") + "USER root\n")
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([hadolint, bad], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "DL3002" in done.stdout  # the last user is root


def test_both_stages_start_from_one_image_of_an_exact_version():
    [default] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.search(r":3\.11\.\d+-slim-\w+$", default)
    assert BUILD.image == "${PYTHON_IMAGE} AS build"
    assert FINAL.image == "${PYTHON_IMAGE}"


def test_the_user_is_a_number_and_not_root():
    assert FINAL.all("USER") == ["10001:10001"]
    assert "--uid 10001" in FINAL.all("RUN")[0]


def test_labels_tell_the_truth():
    labels = FINAL.pairs("LABEL")
    assert labels["org.opencontainers.image.version"] == expertgate.__version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_nothing_of_the_build_stays_but_the_environment():
    assert FINAL.all("COPY") == ["--from=build /opt/expertgate /opt/expertgate"]


def test_the_context_has_what_is_copied_and_little_else():
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = {name.rstrip("/") for rest in BUILD.all("COPY") for name in rest.split()[:-1]}
    assert ignored[0] == "*"
    assert {name.strip("!/") for name in ignored if name.startswith("!")} == sources
    assert all((ROOT / name).exists() for name in sources)


def test_it_installs_as_make_does():
    install, _ = BUILD.all("RUN")
    script, *arguments = install.split()
    assert os.access(ROOT / script, os.X_OK)
    assert f"\t{script} " in (ROOT / "Makefile").read_text()
    assert arguments[2:] == ['"${VARIANT}"', "runtime"]


def fits_compose(path):
    """Whether check-jsonschema finds it to be of the Compose specification, whose schema it has."""
    tool = Path(sysconfig.get_path("scripts"), "check-jsonschema")
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.stdout


def test_compose_fits_the_specification():
    assert fits_compose(ROOT / "compose.yaml")[0]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("read_only: true", "readonly: true"),
        ("cap_drop: [ALL]", "cap_drop: ALL"),
        ("service_completed_successfully", "service_succeeded"),
    ],
)
def test_compose_that_does_not_fit_is_found(right, wrong, tmp_path):
    text = (ROOT / "compose.yaml").read_text()
    assert right in text
    bad = tmp_path / "compose.yaml"
    bad.write_text(text.replace(right, wrong))
    fits, said = fits_compose(bad)
    assert not fits
    assert "$.services" in said


def test_compose_gives_the_folders_that_must_be_writable():
    home = FINAL.pairs("ENV")["HOME"]
    for service in (SERVICES["keys"], SERVICES["expertgate"]):
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert [volume.split(":")[1] for volume in service["volumes"]] == [home]
        assert service["cap_drop"] == ["ALL"]


def test_compose_waits_for_the_drain():
    grace_s = int(SERVICES["expertgate"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= takes_s(Config.model_fields["drain_s"].default)


def test_compose_shows_nothing_outside_of_this_machine():
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    # The operators' listener is for Prometheus, inside.
    assert not [port for port in ports if port.endswith(":9100")]


def test_compose_makes_the_keys_of_the_demo():
    [script] = SERVICES["keys"]["command"]
    made = dict(re.findall(r"(\w+):(\w+)(?=[ ;])", script.partition("for user in ")[2]))
    assert made == dict(USERS)


def test_prometheus_asks_where_and_as_whom_it_may():
    [job] = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    admin = CONFIG["admin"]
    assert job["static_configs"][0]["targets"] == ["expertgate:" + admin["listen"].split(":")[1]]
    state = dict(v.split(":")[:2] for v in SERVICES["prometheus"]["volumes"])["state"]
    home = FINAL.pairs("ENV")["HOME"]
    assert job["authorization"]["credentials_file"] == admin["token"].replace(home, state)


def in_source(command, source, venv):
    """A RUN of the build stage, on this machine's paths."""
    return command.replace("/opt/expertgate", str(venv)).replace(
        "requirements/install.sh python ", f"requirements/install.sh {sys.executable} "
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What the build stage has in /src."""
    folder = tmp_path_factory.mktemp("src")
    for rest in BUILD.all("COPY"):
        *names, target = rest.split()
        for name in names:
            origin = ROOT / name.rstrip("/")
            if origin.is_dir():
                skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(origin, folder / target.rstrip("/"), ignore=skip)
            else:
                shutil.copy(origin, folder / target)
    return folder


@pytest.fixture(scope="module")
def venv(source, tmp_path_factory):
    """/opt/expertgate: our own package installed by the file's command.

    The locks come from the environment that runs the tests, which was made of the same ones;
    with EXPERTGATE_TEST_IMAGE=1 they are installed anew, by the file's command (minutes, 4 GB).
    """
    folder = tmp_path_factory.mktemp("opt") / "expertgate"
    locks, package = (in_source(command, source, folder) for command in BUILD.all("RUN"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if os.environ.get("EXPERTGATE_TEST_IMAGE"):
        from vllm.platforms import current_platform

        variant = {"VARIANT": "cpu" if current_platform.is_cpu() else "cuda"}
        subprocess.run(locks, shell=True, cwd=source, env=environment | variant, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "locks.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run(package, shell=True, cwd=source, env=environment, check=True)
    return folder


def test_the_installed_package_is_whole(venv):
    [packages] = venv.glob("lib/python*/site-packages")
    tracked = subprocess.run(
        ["git", "ls-files", "expertgate"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert [name for name in tracked if not (packages / name).is_file()] == []


READ_ONLY = """
set -eu
for folder in /tmp /dev/shm; do mount --bind "$folder" "$folder"; done
mount -o remount,ro,bind /
if touch /written 2>/dev/null; then exit 9; fi
exec "$@"
"""


def may_unshare():
    probe = ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", "true"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_unshare(), reason="needs unprivileged mount namespaces")
def test_compose_serves_from_a_read_only_root(venv, tmp_path):
    """Its commands, with the image's own, make keys, get healthy and answer with them."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, admin = one.getsockname()[1], two.getsockname()[1]
    home, etc = tmp_path / "home", tmp_path / "etc"
    home.mkdir()
    etc.mkdir()
    [packages] = venv.glob("lib/python*/site-packages")

    def here(text):
        """With this machine's paths and ports."""
        for there, mine in {
            "/opt/expertgate/lib/python3.11/site-packages": packages,
            "/home/expertgate": home,
            "0.0.0.0": "127.0.0.1",
            "8000": port,
            "9100": admin,
        }.items():
            text = text.replace(there, str(mine))
        return text

    environment = FINAL.pairs("ENV") | {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{venv}/bin:/usr/bin:/bin"
    keys = SERVICES["keys"]
    printed = subprocess.run(
        keys["entrypoint"] + [part.replace("$$", "$") for part in keys["command"]],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    made = dict(line.split(": ") for line in printed.splitlines())
    assert set(made) == set(USERS)

    (etc / "expertgate.yaml").write_text(here(COMPOSE["configs"]["expertgate"]["content"]))
    start = [here(part) for part in FINAL.command("ENTRYPOINT") + FINAL.command("CMD")]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", *start],
            cwd=etc,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    server = Server(tmp_path, f"http://127.0.0.1:{port}", process, made)
    check = json.loads(FINAL.all("HEALTHCHECK")[0].partition("CMD ")[2])
    healthy = [here(part) for part in check]
    try:
        assert subprocess.run(healthy, env=environment, stderr=subprocess.DEVNULL).returncode
        deadline = time.monotonic() + 300
        while "ready after" not in server.log:
            assert process.poll() is None, server.log
            assert time.monotonic() < deadline, server.log
            time.sleep(0.2)
        subprocess.run(healthy, env=environment, check=True)
        granted = server.get("/v1/experts", "nurse").json()["data"]
        assert "formulary" in [expert["name"] for expert in granted]
        token = (home / "admin-token").read_text().strip()
        scraped = httpx.get(
            f"http://127.0.0.1:{admin}/metrics", headers={"Authorization": f"Bearer {token}"}
        )
        assert "vllm:num_requests_running" in scraped.text
    finally:
        stop(server)
    assert process.wait(60) == 0
