"""Receipts: who gets them, what they say, and that nobody else can make one."""

import base64
import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.testclient import TestClient

from expertgate.server.app import create_app
from expertgate.server.audit import receipts
from expertgate.server.cli import main
from tests.server.audit.application import BODY, service_of
from tests.server.audit.logs import open_log, public_keys, records, signing_key
from tests.server.fakes import FakeEngine


@pytest.fixture
def log(tmp_path):
    made = open_log(tmp_path)
    yield made
    made.close()


@pytest.fixture
def service(log):
    return service_of(log, FakeEngine())


@pytest.fixture
def client(service):
    return TestClient(create_app(service))


def ask(client, user="alice", headers=None, **body):
    headers = {"user": user, **(headers or {})}
    return client.post("/v1/chat/completions", json={**BODY, **body}, headers=headers)


def claims_of(receipt, folder):
    return receipts.verify(receipt, public_keys(folder), "receipt")


@pytest.mark.parametrize("way", [{"receipt": True}, {"headers": {"X-Receipt": "1"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_brings_its_receipt_where_it_is_asked_to(client, tmp_path, way, stream):
    response = ask(client, stream=stream, experts=["news"], **way)
    if stream:
        lines = [line for line in response.text.splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        event = json.loads(lines[-2].removeprefix("data: "))
        assert (event["id"], event["choices"]) == ("chatcmpl-x", [])
        receipt = event["receipt"]
    else:
        receipt = response.json()["receipt"]
    claims = claims_of(receipt, tmp_path)
    assert claims["jti"] == response.headers["x-request-id"]
    assert claims["principal"] == {"id": "alice", "via": "key"}
    assert claims["status"] == 200
    assert claims["experts"] == [
        {"name": "news", "owner": "news-owner", "weights_sha256": "2" * 64}
    ]
    assert claims["policy_version"] == "v" * 64


def test_a_receipt_names_its_records_in_the_log(client, service, tmp_path):
    claims = claims_of(ask(client, receipt=True).json()["receipt"], tmp_path)
    found = {record["seq"]: record for record in records(tmp_path)}
    for kind in ("request", "result"):
        place = claims["log"][kind]
        assert found[place["seq"]]["kind"] == kind
        assert found[place["seq"]]["request"] == claims["jti"]
        if place["seq"] + 1 in found:
            assert found[place["seq"] + 1]["prev"] == place["sha256"]
    assert claims["catalogue"] == service.audit.catalogue_digest


def test_without_being_asked_there_is_none_and_it_can_be_fetched(client, tmp_path):
    for stream in (False, True):
        response = ask(client, stream=stream)
        assert "receipt" not in response.text
        path = f"/v1/receipts/{response.headers['x-request-id']}"
        found = client.get(path, headers={"user": "alice"})
        assert claims_of(found.json()["receipt"], tmp_path)["jti"] in path


def test_anothers_receipt_looks_like_none(client):
    path = f"/v1/receipts/{ask(client).headers['x-request-id']}"
    foreign = client.get(path, headers={"user": "bob"})
    unknown = client.get("/v1/receipts/none", headers={"user": "bob"})
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json() == unknown.json()
    assert client.get(path).status_code == 401


def test_the_same_name_by_another_credential_is_another(client, service, monkeypatch):
    path = f"/v1/receipts/{ask(client).headers['x-request-id']}"
    identify = service.identity.identify

    async def otherwise(request):
        principal = await identify(request)
        return type(principal)(principal.id, principal.groups, via="issuer")

    service.identity.identify = otherwise
    assert client.get(path, headers={"user": "alice"}).status_code == 404


def test_receipts_are_kept_for_a_time_and_in_a_number(client, monkeypatch):
    def fetch(response):
        path = f"/v1/receipts/{response.headers['x-request-id']}"
        return client.get(path, headers={"user": "alice"}).status_code

    monkeypatch.setattr(receipts, "MAX_KEPT", 2)
    answers = [ask(client) for _ in range(3)]
    assert [fetch(answer) for answer in answers] == [404, 200, 200]
    monkeypatch.setattr(receipts, "KEPT_S", -1.0)
    assert fetch(ask(client)) == 404


def test_a_salted_hash_names_the_principal_to_whoever_knows_it(log, tmp_path):
    service = service_of(log, FakeEngine())
    service.audit.receipts._hashed = True
    client = TestClient(create_app(service))
    both = [claims_of(ask(client, receipt=True).json()["receipt"], tmp_path) for _ in range(2)]
    for claims in both:
        assert "alice" not in json.dumps(claims)
        assert receipts.names(claims, "alice")
        assert not receipts.names(claims, "bob")
    assert both[0]["principal"] != both[1]["principal"]


def test_a_refused_request_has_none(client):
    response = ask(client, experts=["math"], receipt=True)
    assert response.status_code == 403
    assert "receipt" not in response.text


@pytest.mark.parametrize("value", ["0", "true", ""])
def test_a_header_that_says_something_else(client, value):
    assert ask(client, headers={"X-Receipt": value}).status_code == 400


@pytest.mark.parametrize("value", ["true", 1, "yes", {}])
def test_a_field_that_is_no_boolean(client, value):
    assert ask(client, receipt=value).status_code == 400


def test_without_a_log_there_are_no_receipts():
    client = TestClient(create_app(service_of(None, FakeEngine())))
    assert ask(client, receipt=True).status_code == 400
    assert client.get("/v1/receipts/x", headers={"user": "alice"}).status_code == 404


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key.pub").write_bytes(
        signing_key(tmp_path)
        .private.public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )

    def call(content, *more):
        (tmp_path / "file").write_bytes(content if isinstance(content, bytes) else content.encode())
        status = main(["receipts", "verify", "file", "--key", "key.pub", *more]) or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def answer(client):
    return ask(client, receipt=True)


def test_a_receipt_and_an_answer_with_one_hold(call, answer):
    for content in (answer.json()["receipt"], answer.text):
        status, out, err = call(content, "--principal", "alice")
        assert (status, err) == (0, "")
        assert json.loads(out)["jti"] == answer.headers["x-request-id"]
    status, out, err = call(answer.text, "--principal", "bob")
    assert (status, out, err) == (1, "", "expertgate: file: is not for bob\n")


def _b64(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_forgeries_do_not_hold(call, answer, tmp_path):
    key = signing_key(tmp_path)
    receipt = answer.json()["receipt"]
    head, body, signature = receipt.split(".")
    claims = jwt.decode(receipt, options={"verify_signature": False})
    header = {"typ": "expertgate-receipt+jws", "kid": key.id}
    public = key.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    forged = {
        "changed claims": f"{head}.{_b64({**claims, 'status': 500})}.{signature}",
        "changed signature": f"{head}.{body}.{'A' * len(signature)}",
        "no algorithm": f"{_b64({**header, 'alg': 'none'})}.{body}.",
        "hmac with the public key": jwt.encode(claims, public, algorithm="HS256", headers=header),
        "another key under this id": jwt.encode(
            claims, Ed25519PrivateKey.generate(), algorithm="EdDSA", headers=header
        ),
        "another key": jwt.encode(
            claims,
            Ed25519PrivateKey.generate(),
            algorithm="EdDSA",
            headers={**header, "kid": "other"},
        ),
        "another issuer": jwt.encode(
            {**claims, "iss": "x"}, key.private, algorithm="EdDSA", headers=header
        ),
    }
    for name, content in forged.items():
        status, out, err = call(content)
        assert (status, out) == (1, ""), name
        assert len(err.splitlines()) == 1
        assert err.startswith("expertgate: file: ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"a.b.c",
        b"\xff",
        b"{}",
        b"{",
        b'{"receipt": 7}',
        b'{"receipt": "x"}',
        b"{" * 9999,
    ],
)
def test_what_is_no_receipt(call, content):
    status, out, err = call(content)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("expertgate: file: ")


def test_a_signed_head_or_another_token_is_no_receipt(call, tmp_path):
    other = jwt.encode({"iss": "expertgate"}, signing_key(tmp_path).private, algorithm="EdDSA")
    assert call(other)[0] == 2
