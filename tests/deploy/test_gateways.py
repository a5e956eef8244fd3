"""The gateways of deploy/gateways: Envoy and LiteLLM run in front of the server, Kong's is read."""

import json
import os
import re
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import httpx
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from jwt.algorithms import RSAAlgorithm

from tests.deploy.dockerfile import ROOT
from tests.server.running import expertgate, running

GATEWAYS = ROOT / "deploy" / "gateways"
ENVOY = Path(sysconfig.get_path("scripts"), "envoy")
SIGNER = generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def server():
    return running()


@pytest.fixture(scope="module")
def gateway_key(server):
    done = expertgate(
        server.folder, "keys", "create", "--id", "gate", "--group", "research", "--may-assert"
    )
    assert done.returncode == 0, done.stderr
    server.keys["gate"] = done.stdout.strip()
    deadline = time.monotonic() + 30
    while server.get("/v1/experts", "gate").status_code == 401:  # the file is watched
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return server.keys["gate"]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_for(url, process):
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the gateway ended"
        assert time.monotonic() < deadline
        try:
            return httpx.get(url, timeout=5)
        except httpx.TransportError:
            time.sleep(0.1)


def test_envoy_takes_its_configuration():
    done = subprocess.run(
        [ENVOY, "--mode", "validate", "--config-path", GATEWAYS / "envoy.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def envoy(server, gateway_key, tmp_path_factory):
    """Envoy by its file, with this machine's addresses and keys of our own issuer."""
    text = (GATEWAYS / "envoy.yaml").read_text()
    config = yaml.safe_load(text)
    static = config["static_resources"]
    [listener], port = static["listeners"], free_port()
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    host, upstream = server.url.removeprefix("http://").split(":")
    static["clusters"] = [item for item in static["clusters"] if item["name"] == "expertgate"]
    [endpoints] = static["clusters"][0]["load_assignment"]["endpoints"]
    [endpoint] = endpoints["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"] = {"address": host, "port_value": upstream}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    provider = manager["http_filters"][0]["typed_config"]["providers"]["login"]
    del provider["remote_jwks"]
    public = json.loads(RSAAlgorithm.to_jwk(SIGNER.public_key())) | {"kid": "one"}
    provider["local_jwks"] = {"inline_string": json.dumps({"keys": [public]})}
    path = tmp_path_factory.mktemp("envoy") / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [ENVOY, "--config-path", path, "--concurrency", "1", "--use-dynamic-base-id"],
        env=os.environ | {"EXPERTGATE_KEY": gateway_key},
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def token(signer=SIGNER, **claims):
    claims = {"iss": "https://login.example", "aud": "expertgate", "sub": "alice", **claims}
    claims.setdefault("exp", int(time.time()) + 600)
    return jwt.encode(claims, signer, "RS256", {"kid": "one"})


def granted(url, bearer, **headers):
    response = httpx.get(
        f"{url}/v1/experts", headers={"Authorization": f"Bearer {bearer}", **headers}
    )
    assert response.status_code == 200, response.text
    return [expert["name"] for expert in response.json()["data"]]


def test_envoy_names_the_user_and_the_groups_of_the_token(envoy):
    assert granted(envoy, token(groups=["research"])) == ["public", "math", "code"]
    assert granted(envoy, token()) == ["public"]


def test_envoy_takes_away_what_a_client_says_of_itself(envoy):
    forged = {"X-Forwarded-User": "boss", "X-Forwarded-Groups": "research"}
    assert granted(envoy, token(), **forged) == ["public"]


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"groups": "research"},
        {"groups": [{}]},
        {"groups": ["research,research"]},
        {"groups": [" research"]},
        {"groups": ["research", True]},
        {"sub": "alice "},
    ],
)
def test_envoy_lets_nobody_speak_for_a_token_that_it_cannot_read(envoy, claims):
    bearer = token(**claims) if claims else _token_of_nobody()
    forged = {"X-Forwarded-User": "boss", "X-Forwarded-Groups": "research"}
    response = httpx.get(
        f"{envoy}/v1/experts", headers={"Authorization": f"Bearer {bearer}", **forged}
    )
    assert response.status_code in (400, 401, 403), response.text


def _token_of_nobody():
    claims = {"iss": "https://login.example", "aud": "expertgate", "exp": int(time.time()) + 600}
    return jwt.encode(claims, SIGNER, "RS256", {"kid": "one"})


def test_envoy_lets_nobody_in_without_a_good_token(envoy):
    other = generate_private_key(public_exponent=65537, key_size=2048)
    for bad in ("x", token(other), token(aud="elsewhere"), token(exp=1)):
        headers = {"Authorization": f"Bearer {bad}"}
        # Envoy says 403 where the token is good and for somebody else.
        assert httpx.get(f"{envoy}/v1/experts", headers=headers).status_code in (401, 403)
    assert httpx.get(f"{envoy}/v1/experts").status_code == 401


def test_envoy_streams(envoy):
    with httpx.stream(
        "POST",
        f"{envoy}/v1/completions",
        headers={"Authorization": f"Bearer {token(groups=['research'])}"},
        json={"prompt": "hi", "max_tokens": 4, "stream": True, "experts": ["public", "math"]},
        timeout=60,
    ) as response:
        assert response.headers["x-experts-effective"] == "public,math"
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_kong_replaces_what_a_client_says_of_itself():
    config = yaml.safe_load((GATEWAYS / "kong.yaml").read_text())
    assert config["_format_version"] == "3.0"
    [service] = config["services"]
    plugins = {plugin["name"]: plugin.get("config", {}) for plugin in service["plugins"]}
    # A user is known before one is named, and the groups are Kong's own.
    assert list(plugins) == ["key-auth", "acl", "post-function"]
    assert not plugins["acl"].get("hide_groups_header")
    [script] = plugins["post-function"]["access"]
    for header in ("X-Forwarded-User", "X-Forwarded-Groups", "Authorization"):
        assert f'set_header("{header}"' in script
    assert 'clear_header("X-Forwarded-Groups")' in script
    [vault] = config["vaults"]
    references = re.findall(r"\{vault://(\w+)/", yaml.safe_dump(config))
    assert set(references) == {vault["prefix"]}


LITELLM = ROOT / "build" / "litellm" / "bin" / "litellm"


@pytest.fixture(scope="module")
def litellm(server, gateway_key, tmp_path_factory):
    """LiteLLM's proxy by its file, with this machine's address, and one virtual key's owner."""
    folder = tmp_path_factory.mktemp("litellm")
    config = yaml.safe_load((GATEWAYS / "litellm.yaml").read_text())
    [model] = config["model_list"]
    model["litellm_params"] |= {"model": "openai/toy", "api_base": f"{server.url}/v1"}
    # Virtual keys live in a database; a function says the same of two keys here.
    config["general_settings"]["custom_auth"] = "owners.owner"
    (folder / "litellm.yaml").write_text(yaml.safe_dump(config))
    (folder / "litellm_user.py").write_text((GATEWAYS / "litellm_user.py").read_text())
    (folder / "owners.py").write_text(
        "from litellm.proxy._types import UserAPIKeyAuth\n"
        "OWNERS = {'sk-alice': ('alice', 'research'), 'sk-bob': ('bob', None)}\n"
        "async def owner(request, api_key):\n"
        "    user, team = OWNERS.get(api_key, (None, None))\n"
        "    return UserAPIKeyAuth(api_key=api_key, user_id=user, team_alias=team)\n"
    )
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [LITELLM, "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=os.environ | {"EXPERTGATE_KEY": gateway_key, "LITELLM_MASTER_KEY": "sk-master"},
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health/liveliness", process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def chat(url, key, headers=None, **body):
    body = {
        "model": "flexolmo",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "hi"}],
        **body,
    }
    sent = {"Authorization": f"Bearer {key}", **(headers or {})}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=sent, timeout=60)


@pytest.mark.skipif(not LITELLM.exists(), reason="LiteLLM's proxy is not there: make litellm")
def test_litellm_names_the_owner_of_its_key(litellm):
    def effective(response):
        assert response.status_code == 200, response.text
        return response.json()["experts"]["effective"]

    assert effective(chat(litellm, "sk-alice")) == ["public", "math", "code"]
    assert effective(chat(litellm, "sk-bob")) == ["public"]
    assert effective(chat(litellm, "sk-alice", experts=["public", "math"])) == ["public", "math"]
    forged = {"X-Forwarded-User": "alice", "X-Forwarded-Groups": "research"}
    assert effective(chat(litellm, "sk-bob", forged)) == ["public"]
    for field in ("extra_headers", "headers"):
        assert effective(chat(litellm, "sk-bob", **{field: forged})) == ["public"]
    assert chat(litellm, "sk-bob", experts=["math"]).status_code == 403
    assert chat(litellm, "sk-no").status_code == 403
