"""What the server's requests leave in the log, and in which order."""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from expertgate.policies.principal import Principal
from expertgate.server.admin import create_admin
from expertgate.server.app import create_app
from expertgate.server.audit import trail, writer
from expertgate.server.audit.chain import AuditError
from expertgate.server.audit.entry import Entry
from expertgate.server.audit.trail import Trail
from expertgate.server.changes import (
    CredentialChange,
    CredentialsChanged,
    PoliciesLoaded,
    PoliciesRefused,
    Resumed,
    Suspended,
    Withdrawn,
)
from expertgate.server.errors import ApiError
from expertgate.server.metrics import REQUESTS
from tests.server.audit.application import BODY, CATALOGUE, EXPERTS, service_of
from tests.server.audit.documented import FIELDS, check_fields, examples
from tests.server.audit.logs import check, open_log, records, signing_key
from tests.server.fakes import FakeEngine
from tests.support.waiting import until


@pytest.fixture
def engine():
    made = FakeEngine()
    made.finish_reason = "stop"
    return made


@pytest.fixture
def log(tmp_path):
    made = open_log(tmp_path, sign_every=100)
    yield made
    if made._thread.is_alive():
        made.close()


@pytest.fixture
def service(log, engine):
    return service_of(log, engine)


@pytest.fixture
def client(service):
    return TestClient(create_app(service), raise_server_exceptions=False)


def ask(client, user="alice", **body):
    headers = {} if user is None else {"user": user}
    return client.post("/v1/chat/completions", json={**BODY, **body}, headers=headers)


def let_through():
    (counter,) = REQUESTS.collect()
    return sum(sample.value for sample in counter.samples if sample.name.endswith("_total"))


def closed(log, folder, *kinds):
    """All that was said, and the log holds; the log is closed by this."""
    log.close()
    assert check(folder).faults == []
    found = records(folder)
    for record in found:
        check_fields(record)
    return [record for record in found if not kinds or record["kind"] in kinds]


def test_a_request_and_its_result(client, log, tmp_path):
    response = ask(client, experts=["news"], purpose="care")
    assert response.status_code == 200
    request, result = closed(log, tmp_path, "request", "result")
    request_id = response.headers["x-request-id"]
    assert request["request"] == result["request"] == request_id
    said = {
        "route": "/v1/chat/completions",
        "principal": "alice",
        "via": "key",
        "groups": ["research"],
        "purpose": "care",
        "granted": ["public", "news"],
        "effective": ["news"],
        "policies": {"news": ["readers"]},
        "policy_version": "v" * 64,
    }
    assert {key: request[key] for key in said} == said
    assert (result["status"], result["code"], result["effective"]) == (200, None, ["news"])
    assert result["finish_reasons"] == {"stop": 1}


def test_a_request_is_told_with_the_address_that_it_came_from(client, service, log, tmp_path):
    other = TestClient(create_app(service), client=("2001:db8::7", 7))
    for user in ("alice", None):
        ask(other, user=user)
    ask(client)  # which has none
    told = closed(log, tmp_path, "request", "refused")
    assert [(record["kind"], record["address"]) for record in told] == [
        ("request", "2001:db8::7"),
        ("refused", "2001:db8::7"),
        ("request", None),
    ]


def test_a_probe_is_told_with_every_expert(service, log, tmp_path):
    recorded = asyncio.run(service.audit.probe())
    (probe,) = closed(log, tmp_path, "probe")
    assert (recorded.seq, probe["seq"]) == (1, 1)
    assert probe["effective"] == list(EXPERTS)


def test_every_kind_is_documented():
    """Here and in the module's own words; `closed` holds each record of these tests against it."""
    named = (line.split("|")[1] for line in trail.__doc__.splitlines() if line.startswith("| `"))
    assert set(FIELDS) == {kind for cell in named for kind in re.findall(r"`(\w+)`", cell)}
    assert [record["kind"] for record in examples()] == ["request", "result"]
    for record in examples():
        check_fields(record)


def test_a_prompt_is_there_as_a_digest_that_needs_the_key(client, log, tmp_path):
    prompt = bytes.fromhex(ask(client).headers["x-request-id"])
    (result,) = closed(log, tmp_path, "result")
    ids = b"".join(token.to_bytes(4, "little") for token in prompt)
    expected = signing_key(tmp_path).keyed_digest(
        b"expertgate/audit-prompt/1", hashlib.sha256(ids).digest()
    )
    assert result["prompts"] == [expected]
    assert result["prompts"] != [hashlib.sha256(ids).hexdigest()]


def test_neither_prompt_nor_answer_nor_credential_is_there(client, log, tmp_path):
    ask(client)
    ask(client, stream=True)
    ask(client, user=None)
    log.close()
    for path in (tmp_path / "audit").iterdir():
        text = path.read_text()
        for secret in ("secret", "question", '"x"', "eg-"):
            assert secret not in text


def test_the_record_is_on_disk_before_the_engine_is_asked(client, log, engine, monkeypatch):
    order = []
    write, generate = os.write, engine.generate

    def written(file, data):
        count = write(file, data)
        if threading.current_thread().name == "audit-log":
            assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DSYNC
            order.append("on disk")
        return count

    def generated(*args, **kwargs):
        order.append("generate")
        return generate(*args, **kwargs)

    monkeypatch.setattr(writer.os, "write", written)
    monkeypatch.setattr(engine, "generate", generated)
    log.record("stop")  # what the log does at its beginning is behind it
    order.clear()
    assert ask(client).status_code == 200
    assert order[:2] == ["on disk", "generate"]


def test_the_engine_waits_as_long_as_the_disk_takes(client, log, engine, monkeypatch):
    log.record("stop")
    hold, write = threading.Event(), os.write

    def slow(file, data):
        if threading.current_thread().name == "audit-log":
            hold.wait()
        return write(file, data)

    monkeypatch.setattr(writer.os, "write", slow)
    asking = threading.Thread(target=ask, args=(client,))
    asking.start()
    time.sleep(0.3)
    assert engine.calls == []
    hold.set()
    asking.join()
    assert len(engine.calls) == 1


def test_a_stream_has_its_result_when_it_has_ended(client, log, tmp_path):
    assert ask(client, stream=True).text.endswith("data: [DONE]\n\n")
    (result,) = closed(log, tmp_path, "result")
    assert (result["status"], result["code"]) == (200, None)
    assert result["finish_reasons"] == {"stop": 1}


def test_a_request_that_fails_has_a_result_with_its_code(client, log, engine, tmp_path):
    engine.dies = True
    assert ask(client).status_code == 503
    ask(client, stream=True)  # breaks after its first event
    results = closed(log, tmp_path, "result", "refused")
    assert [(r["kind"], r["status"], r["code"]) for r in results] == [
        ("result", 503, "engine_unavailable"),
        ("result", 200, "internal_error"),
    ]


def test_refusals_are_told(client, log, tmp_path):
    ask(client, user=None)
    ask(client, experts=["math"])
    ask(client, experts=[])
    client.get("/v1/experts")
    client.get("/v1/experts", headers={"user": "alice", "X-Purpose": ""})
    client.post("/tokenize", content="{}", headers={"user": "alice", "Content-Type": "text/plain"})
    found = closed(log, tmp_path, "refused", "request", "result")
    assert [(r["kind"], r["principal"], r["status"], r["code"]) for r in found] == [
        ("refused", None, 401, "invalid_credential"),
        ("refused", "alice", 403, "expert_not_permitted"),
        ("refused", "alice", 400, "invalid_experts"),
        ("refused", None, 401, "invalid_credential"),
        ("refused", "alice", 400, "invalid_request"),
        ("refused", "alice", 415, "unsupported_media_type"),
    ]
    assert [record["route"] for record in found[3:]] == [
        "/v1/experts",
        "/v1/experts",
        "/tokenize",
    ]


def test_a_flood_of_refusals_fills_no_disk(client, log, service, tmp_path, monkeypatch):
    for _ in range(15):
        ask(client, experts=["math"])
    for _ in range(50):
        ask(client, user=None)
    ask(client, user="bob", experts=["math"])
    service.audit.stop()
    assert check(tmp_path).faults == []
    found = records(tmp_path)
    assert len([r for r in found if r["kind"] == "refused"]) == 10 + 10 + 1
    (counts,) = (r["more"] for r in found if r["kind"] == "refusals")
    assert counts == [
        {"status": 401, "code": "invalid_credential", "count": 40},
        {"status": 403, "code": "expert_not_permitted", "count": 5},
    ]


def test_an_operators_wrong_token_hides_nobody(client, service, log, tmp_path):
    operators = TestClient(create_admin(service, SimpleNamespace(listeners=[]), "right"))
    for _ in range(15):
        operators.get("/metrics", headers={"Authorization": "Bearer wrong"})
    ask(client, user=None)
    ask(client, user="operator", experts=["math"])  # may be a key's name as well
    found = closed(log, tmp_path, "refused")
    assert [(r["principal"], r["via"]) for r in found[:10]] == [("operator", "admin")] * 10
    assert [(r["principal"], r["route"]) for r in found[10:]] == [
        (None, "/v1/chat/completions"),
        ("operator", "/v1/chat/completions"),
    ]


def test_after_a_minute_refusals_are_told_one_by_one_again(client, log, tmp_path, monkeypatch):
    now = [int(time.monotonic()) + 1]
    monkeypatch.setattr(trail, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(trail, "_REFUSALS_EACH", 1)
    for _ in range(3):
        for _ in range(4):
            ask(client, user=None)
        now[0] += 60
    found = closed(log, tmp_path, "refused", "refusals")
    minute = ("refused", "refusals")
    assert [record["kind"] for record in found] == [*minute, *minute, "refused"]
    assert [record["more"][0]["count"] for record in found[1::2]] == [3, 3]


def test_what_no_record_can_hold_of_a_name_is_told_as_a_question_mark(service, log, tmp_path):
    who = Principal("ada\ud800", frozenset({"e", "d", "c", "b", "a", "\udfff"}), via="corp")
    service.audit.refused("/v1/experts", who, None, ApiError(400, "invalid_request", "?", None))
    (record,) = closed(log, tmp_path, "refused")
    assert (record["principal"], record["via"]) == ("ada?", "corp")
    assert record["groups"] == ["?", "a", "b", "c", "d", "e"]


@pytest.fixture
def full_disk(monkeypatch):
    written = os.write

    class Full:
        full = True

    def write(file, data):
        if Full.full and threading.current_thread().name == "audit-log":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(file, data)

    monkeypatch.setattr(writer, "_TICK_S", 0.02)
    monkeypatch.setattr(writer.os, "write", write)
    return Full


def test_a_full_disk_stops_generation_and_an_emptied_one_starts_it(
    client, log, engine, full_disk, tmp_path
):
    before = let_through()
    for stream in (False, True):
        response = ask(client, stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "audit_unavailable"
        assert response.headers["retry-after"] == "1"
        assert str(tmp_path) not in response.text
        assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200  # a new process would find the same disk
    assert engine.calls == []
    assert let_through() == before
    full_disk.full = False
    until(lambda: client.get("/ready").status_code == 200)
    assert ask(client).status_code == 200
    assert let_through() == before + 1
    assert len(closed(log, tmp_path, "request")) == 1


def test_open_on_failure_generates_all_the_same(tmp_path, engine, full_disk, caplog):
    log = open_log(tmp_path, fail_open=True)
    client = TestClient(create_app(service_of(log, engine)))
    assert ask(client).status_code == 200
    assert client.get("/ready").status_code == 200
    assert len(engine.calls) == 1
    full_disk.full = False
    found = closed(log, tmp_path, "request", "result", "gap")
    assert [r["kind"] for r in found] == ["gap", "request", "result"]
    assert "WITHOUT A RECORD" in caplog.text


def test_without_a_log_requests_are_waived(engine):
    service = service_of(None, engine)
    client = TestClient(create_app(service))
    assert ask(client).status_code == 200
    assert ask(client, user=None).status_code == 401
    assert client.get("/ready").status_code == 200
    service.audit.changed(Suspended("math"))
    service.catalogue = CATALOGUE.model_copy()
    assert ask(client).status_code == 200


def test_a_route_that_forgets_the_record_runs_nothing(client, engine, monkeypatch):
    async def forget(entry):
        pass

    monkeypatch.setattr(Entry, "begin", forget)
    assert ask(client).status_code == 500
    assert engine.calls == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (PoliciesLoaded("b" * 64, "a" * 64), {"kind": "policies", "previous": "a" * 64}),
        (PoliciesRefused("x:1: bad", "a" * 64), {"kind": "policies_refused", "fault": "x:1: bad"}),
        (
            CredentialsChanged(None, (CredentialChange("bob", {"groups": ["a"]}, None, True),)),
            {
                "kind": "credentials",
                "issuer": None,
                "id": "bob",
                "before": {"groups": ["a"]},
                "after": None,
                "secret": True,
            },
        ),
        (
            CredentialsChanged("corp", (CredentialChange("\ud800", None, {"a": "b"}, True),)),
            {"kind": "credentials", "issuer": "corp", "id": "?", "before": None},
        ),
        (Suspended("math"), {"kind": "suspended", "expert": "math"}),
        (Resumed("math"), {"kind": "resumed", "expert": "math"}),
        (Withdrawn(None, "alice", ("math",)), {"kind": "withdrawn", "experts": ["math"]}),
    ],
)
def test_changes_of_what_permissions_rest_on_are_told(service, log, tmp_path, change, said):
    service.audit.changed(change)
    (record,) = closed(log, tmp_path, said["kind"])
    assert {key: record[key] for key in said} == said


def test_each_credential_that_changed_has_a_record(service, log, tmp_path):
    changes = [CredentialChange(name, None, {"groups": []}, True) for name in ("ada", "bob")]
    service.audit.changed(CredentialsChanged("corp", tuple(changes)))
    told = closed(log, tmp_path, "credentials")
    assert [(record["issuer"], record["id"]) for record in told] == [
        ("corp", "ada"),
        ("corp", "bob"),
    ]


def test_another_catalogue_is_told_before_what_it_names(client, service, log, tmp_path):
    experts = [one.model_copy(update={"owner": "another"}) for one in CATALOGUE.experts]
    ask(client)
    service.catalogue = CATALOGUE.model_copy(update={"experts": tuple(experts)})
    ask(client)
    ask(client)
    first, change, second, third = closed(log, tmp_path, "request", "catalogue")
    assert (change["kind"], change["experts"][1]["owner"]) == ("catalogue", "another")
    assert first["catalogue"] != change["catalogue"] == second["catalogue"] == third["catalogue"]


def test_start_and_stop_are_told(tmp_path):
    trail = Trail(open_log(tmp_path), CATALOGUE)
    trail.start("toy", "v" * 64)
    trail.stop()
    start, head, stop, last = records(tmp_path)
    assert (start["kind"], stop["kind"]) == ("start", "stop")
    assert (head["kind"], last["kind"]) == ("head", "head")
    assert start["experts"][1] == {"name": "math", "owner": "math-owner", "sha256": "1" * 64}
    assert start["catalogue"] == trail.catalogue_digest
    assert check(tmp_path).faults == []


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_start_that_cannot_be_told_is_none_unless_the_log_is_open_on_failure(
    tmp_path, full_disk, fail_open
):
    trail = Trail(open_log(tmp_path, fail_open=fail_open), CATALOGUE)
    if fail_open:
        trail.start("toy", "v" * 64)
    else:
        with pytest.raises(AuditError, match="audit: can't be written: No space left"):
            trail.start("toy", "v" * 64)
    full_disk.full = False
    trail.stop()
    told = [record["kind"] for record in records(tmp_path)]
    assert ("start" in told, "stop" in told) == (fail_open, fail_open)
    assert check(tmp_path).faults == []


async def status_of_chat(app):
    """Asks in the event loop that runs."""
    body = json.dumps(BODY).encode()
    headers = [(b"user", b"alice"), (b"content-type", b"application/json")]
    left, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return left.pop() if left else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    await app(
        {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "client": ("127.0.0.1", 7),
            "headers": headers,
        },
        receive,
        send,
    )
    return sent[0]["status"]


@pytest.fixture(params=[None, errno.EIO], ids=["slow", "slow and failing"])
def slow_disk(monkeypatch, request):
    """Writes nothing until it may, and then at once or by the second try."""
    may, write, errors = threading.Event(), os.write, [request.param] if request.param else []

    def slow(file, data):
        if threading.current_thread().name == "audit-log":
            may.wait()
            if errors:
                raise OSError(errors.pop(), "the disk failed")
        return write(file, data)

    monkeypatch.setattr(writer, "_TICK_S", 0.02)
    monkeypatch.setattr(writer.os, "write", slow)
    return may


def check_ended(found, status, code):
    """A request that is on record for good has a result there."""
    assert [record["kind"] for record in found] == ["request", "result"]
    assert found[0]["request"] == found[1]["request"]
    assert (found[1]["status"], found[1]["code"]) == (status, code)


def test_a_record_that_comes_too_late_has_a_result_that_says_so(
    client, log, engine, tmp_path, monkeypatch, slow_disk
):
    monkeypatch.setattr(writer, "_WRITE_TIMEOUT_S", 0.2)
    assert ask(client).status_code == 503
    slow_disk.set()
    until(lambda: log.healthy)
    assert engine.calls == []
    found = closed(log, tmp_path, "request", "result", "refused")
    check_ended(found, 503, "audit_unavailable")


def test_a_request_that_is_withdrawn_before_its_record_is_written_has_both(
    log, service, engine, tmp_path, slow_disk
):
    async def story():
        asking = asyncio.create_task(status_of_chat(create_app(service)))
        while not len(service.grants):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        for grant in service.grants:
            grant.withdraw()
        assert await asking == 403

    asyncio.run(story())
    slow_disk.set()
    until(lambda: log.depth == 0 and log.healthy)
    assert engine.calls == []
    check_ended(closed(log, tmp_path, "request", "result"), 403, "expert_withdrawn")
