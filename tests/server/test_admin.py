"""The operators' application, which is none of the clients' business."""

import stat
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from expertgate.model.catalogue import Catalogue
from expertgate.server.admin import create_admin
from expertgate.server.changes import PoliciesLoaded, PoliciesRefused, Withdrawn
from expertgate.server.config import AdminConfig, ConfigError
from expertgate.server.listening import ListenError, listen, listen_at
from expertgate.server.metrics import WITHDRAWALS
from expertgate.server.suspensions import SuspensionError

TOKEN = "f" * 64


class Oversight:
    """Suspends in memory."""

    def __init__(self):
        self.listeners = []
        self.suspended = set()

    async def suspend(self, name):
        changed = name not in self.suspended
        self.suspended.add(name)
        return changed

    async def resume(self, name):
        changed = name in self.suspended
        self.suspended.discard(name)
        return changed


@pytest.fixture
def oversight():
    return Oversight()


@pytest.fixture
def client(oversight):
    service = SimpleNamespace(
        engine=None,
        policies=SimpleNamespace(version="v1"),
        catalogue=Catalogue.default(3),
        audit=SimpleNamespace(log=None, refused=lambda *_: None),
    )
    return TestClient(create_admin(service, oversight, TOKEN))


def test_an_expert_is_suspended_and_resumed(client, oversight):
    headers = {"Authorization": f"Bearer {TOKEN}"}

    def post(name, what):
        return client.post(f"/admin/experts/{name}/{what}", headers=headers)

    for what, suspended, changed in (
        ("suspend", True, True),
        ("suspend", True, False),
        ("resume", False, True),
        ("resume", False, False),
    ):
        expected = {"expert": "expert-1", "suspended": suspended, "changed": changed}
        assert post("expert-1", what).json() == expected
        assert oversight.suspended == ({"expert-1"} if suspended else set())
    response = post("nosuch", "suspend")
    assert response.status_code == 404
    assert "expert-2" in response.json()["error"]["message"]
    assert client.post("/admin/experts/expert-1/suspend").status_code == 401
    assert oversight.suspended == set()


@pytest.mark.parametrize("what", ["suspend", "resume"])
def test_a_list_that_cannot_be_written_is_told(client, oversight, monkeypatch, what):
    async def fail(name):
        raise SuspensionError("/etc/suspended.yaml: Read-only file system")

    monkeypatch.setattr(oversight, what, fail)
    response = client.post(
        f"/admin/experts/expert-1/{what}", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "suspension_failed"
    assert "this is not in force: /etc/suspended.yaml: Read-only" in response.text


def test_changes_are_counted(client, oversight):
    def text():
        return client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text

    (tell,) = oversight.listeners
    assert 'expertgate_policies_info{version="v1"} 1.0' in text()
    tell(PoliciesRefused("a fault", "v1"))
    assert "expertgate_policy_reload_success 0.0" in text()
    tell(PoliciesLoaded("v2", "v1"))
    assert "expertgate_policy_reload_success 1.0" in text()
    assert 'expertgate_policies_info{version="v2"} 1.0' in text()
    before = WITHDRAWALS._value.get()
    tell(Withdrawn(None, "alice", ("math",)))
    assert f"expertgate_withdrawals_total {before + 1}" in text()
    assert "alice" not in text()


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {'e' * 64}", f"Basic {TOKEN}", TOKEN, "Bearer é"],
)
def test_without_the_token_nothing_is_shown(client, authorization):
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    response = client.get("/metrics", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_credential"
    assert "expertgate_" not in response.text


def test_metrics_are_for_whoever_has_it(client):
    response = client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert response.status_code == 200
    assert "expertgate_denials_total" in response.text


def test_health_needs_none(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/docs", "/openapi.json"])
def test_there_is_nothing_else(client, path):
    assert client.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 404


def test_a_token_that_cannot_be_used(tmp_path):
    path = tmp_path / "token"
    config = AdminConfig(listen="127.0.0.1:0", token=path)
    with pytest.raises(ConfigError, match="openssl rand"):
        config.read_token()
    for text in ("", "short", "é" * 64):
        path.write_text(text)
        with pytest.raises(ConfigError, match="32"):
            config.read_token()
    path.write_text(f"{TOKEN}\n")
    assert config.read_token() == TOKEN


def test_a_socket_is_this_users_alone(tmp_path):
    path = tmp_path / "admin.sock"
    bound = listen_at(f"unix:{path}")
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ListenError, match="in use"):
            listen_at(f"unix:{path}")
    finally:
        bound.close()
    listen_at(f"unix:{path}").close()  # what a server leaves that was killed is in nobody's way


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "admin.sock"
    path.write_text("somebody's")
    with pytest.raises(ListenError):
        listen_at(f"unix:{path}")
    assert path.read_text() == "somebody's"


def test_addresses_and_ports_in_use():
    with listen_at("127.0.0.1:0") as bound, pytest.raises(ListenError, match="--port"):
        listen("127.0.0.1", bound.getsockname()[1])
    with listen_at("[::1]:0") as bound:
        assert bound.getsockname()[0] == "::1"
