"""Receipts: who gets them, what they say, and that nobody else can make one."""

import asyncio
import base64
import dataclasses
import functools
import json
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.testclient import TestClient

from expertgate.policies.principal import Principal
from expertgate.server.app import create_app
from expertgate.server.audit import receipts, writer
from expertgate.server.audit.chain import AuditError
from expertgate.server.audit.lately import lately
from expertgate.server.audit.trail import Trail
from expertgate.server.cli import main
from expertgate.server.errors import ApiError
from tests.server.audit.application import BODY, service_of
from tests.server.audit.logs import open_log, public_keys, records, signing_key
from tests.server.fakes import FakeEngine
from tests.support import sse


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
        *_, last, done = sse.data(response)
        assert done == "[DONE]"
        event = json.loads(last)
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


def lives(folder):
    """Servers of the same log, one after the other; each is closed in order where the next starts,
    or else left as by a crash.
    """
    while True:
        log = open_log(folder, sign_every=100)
        service = service_of(log, FakeEngine())
        service.audit.start("toy", "v" * 64)
        closing = yield TestClient(create_app(service))
        if closing:
            service.audit.stop()
        else:
            log._closing = True  # its thread ends, and signs nothing more
            log._state = dataclasses.replace(log._state, unsigned=0)
            log.close()


def fetched(client, answer, user="alice"):
    path = f"/v1/receipts/{answer.headers['x-request-id']}"
    return client.get(path, headers={"user": user})


def has(kept, request_id, user):
    """Whether this user is given a receipt of this request."""
    try:
        asyncio.run(kept.of(request_id, Principal(user, via="key")))
    except ApiError:
        return False
    return True


def test_receipts_outlast_the_server(tmp_path):
    servers = lives(tmp_path)
    client = next(servers)
    answers = [ask(client, user, experts=["news"]) for user in ("alice", "bob")]
    before = [fetched(client, answers[0]), fetched(client, answers[1], "bob")]
    for _ in range(2):  # the second life's start stands between
        client = servers.send(True)
        after = [fetched(client, answers[0]), fetched(client, answers[1], "bob")]
        for old, new in zip(before, after, strict=True):
            said, again = (claims_of(one.json()["receipt"], tmp_path) for one in (old, new))
            assert abs(said.pop("iat") - again.pop("iat")) <= 1
            assert said == again
        assert fetched(client, answers[0], "bob").status_code == 404
        assert ask(client, receipt=True).status_code == 200


def test_also_one_that_started_long_before(tmp_path, monkeypatch):
    """What its start says of the experts stands too far back to be read again."""
    servers = lives(tmp_path)
    long_ago = datetime.now(UTC) - timedelta(hours=3)
    with monkeypatch.context() as patched:
        patched.setattr(writer, "_stamped", functools.partial(stamped, long_ago))
        client = next(servers)
    answer = ask(client)
    assert fetched(servers.send(True), answer).status_code == 200


def test_what_no_head_has_signed_gives_no_receipt_after_a_crash(tmp_path):
    """Anybody who can write there could have written it, and had it signed."""
    servers = lives(tmp_path)
    client = next(servers)
    early = ask(client)
    client = servers.send(True)
    late = ask(client)
    assert fetched(client, late).status_code == 200
    for in_order in (False, True, True):  # the starts since have signed over it
        client = servers.send(in_order)
        assert fetched(client, early).status_code == 200
        assert fetched(client, late).status_code == 404


def test_nor_does_a_record_that_was_changed(tmp_path):
    servers = lives(tmp_path)
    answers = [ask(next(servers)), None, None]
    for place in (1, 2):
        answers[place] = ask(servers.send(True))
    servers.send(True)
    servers.close()
    (path,) = (tmp_path / "audit").glob("*.jsonl")
    changed = answers[1].headers["x-request-id"]
    lines = path.read_text().splitlines(keepends=True)
    lines = [
        line.replace('"principal":"alice"', '"principal":"mallo"') if changed in line else line
        for line in lines
    ]
    assert "mallo" in "".join(lines)
    path.write_text("".join(lines))
    kept = receipts.Receipts(signing_key(tmp_path), lambda: None, hashed=False)
    kept.restore(lately(tmp_path / "audit", public_keys(tmp_path)), KNOWN)
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert [has(kept, one, "alice") or has(kept, one, "mallo") for one in ids] == [
        False,
        False,
        True,
    ]


KNOWN = {"c": [{"name": name, "owner": "o", "sha256": None} for name in ("public", "math", "news")]}


def test_after_a_restart_they_are_kept_no_longer_and_are_no_more(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    for number, minutes in enumerate((200, 70, 50, 40)):
        ended = datetime.now(UTC) - timedelta(minutes=minutes)
        monkeypatch.setattr(writer, "_stamped", functools.partial(stamped, ended))
        more = {"via": "key", "policy_version": "v", "catalogue": "c" if number < 3 else "d"}
        log.record("request", request=f"r{number}", principal="alice", **more)
        log.record(
            "result",
            request=f"r{number}",
            effective=["news"],
            status=200,
            code=None,
            finish_reasons={},
            usage=None,
        )
    log.close()

    def restored(known=KNOWN):
        kept = receipts.Receipts(signing_key(tmp_path), lambda: None, hashed=False)
        kept.restore(lately(tmp_path / "audit", public_keys(tmp_path)), known)
        return [name for name in (f"r{number}" for number in range(4)) if has(kept, name, "alice")]

    assert restored() == ["r2"]  # nobody knows whose the experts of another catalogue were
    assert restored({**KNOWN, "d": KNOWN["c"]}) == ["r2", "r3"]
    monkeypatch.setattr(receipts, "MAX_KEPT", 1)
    assert restored({**KNOWN, "d": KNOWN["c"]}) == ["r3"]


def stamped(time, kind, fields):
    return {**fields, "v": 1, "kind": kind, "time": time.isoformat().replace("+00:00", "Z")}


def test_a_salted_hash_names_the_principal_to_whoever_knows_it(log, tmp_path):
    service = service_of(log, FakeEngine())
    service.audit = Trail(log, service.catalogue, hashed=True)
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


def test_a_header_that_is_almost_for_a_receipt(client):
    response = ask(client, headers={"X-Reciept": "1"})
    assert response.status_code == 400
    assert "X-Receipt" in response.json()["error"]["message"]


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
        "another key that says more": jwt.encode(
            claims,
            Ed25519PrivateKey.generate(),
            algorithm="EdDSA",
            headers={**header, "kid": "other\x1b[2K"},
        ),
        "another issuer": jwt.encode(
            {**claims, "iss": "x"}, key.private, algorithm="EdDSA", headers=header
        ),
    }
    for name, content in forged.items():
        status, out, err = call(content)
        assert (status, out) == (1, ""), name
        assert err.startswith("expertgate: file: ")
        assert err.removesuffix("\n").isprintable(), name


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


def test_a_log_that_cannot_be_read_ends_the_start_and_says_why(tmp_path):
    next(lives(tmp_path))
    folder = tmp_path / "audit"
    (path,) = folder.glob("*.jsonl")
    path.rename(folder / "away")
    path.mkdir()
    with pytest.raises(AuditError, match=rf"{path}: Is a directory"):
        list(lately(folder, public_keys(tmp_path)))
