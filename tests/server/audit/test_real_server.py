"""The audit log, receipts and usage of real servers: of the one that the session shares, while it
runs, and of one that is killed.
"""

import base64
import json
import os
import signal
import threading
import time
from collections import Counter
from datetime import UTC, datetime

import httpx
import pytest

from expertgate.server.audit.signing import PublicKeys
from expertgate.server.audit.verify import verify
from tests.server.audit import logs
from tests.server.audit.documented import check_fields
from tests.server.running import expertgate, make_key, prepare, running, start, stop
from tests.support import sse
from tests.support.waiting import until


def published(server, folder):
    path = folder / "keys.json"
    path.write_text(server.get("/.well-known/expertgate-keys").text)
    return PublicKeys.load(path)


def records(server):
    found = logs.records(server.folder)
    for record in found:
        check_fields(record)
    return found


def test_requests_are_recorded_and_the_log_holds(tmp_path):
    server = running()
    answers = [server.chat(user) for user in ("alice", "dave", "bob")]
    stream = server.complete("alice", stream=True, experts=["math"])
    assert server.chat("dave", experts=["news"]).status_code == 403
    found = []
    for _ in range(100):  # results and refusals are written behind the answer
        found = records(server)
        ended = any(r["kind"] == "result" and r["request"] == _id(stream) for r in found)
        if ended and any(map(_beyond_the_grant, found)):
            break
        time.sleep(0.1)

    by_request = {r["request"]: r for r in found if r["kind"] == "request"}
    results = {r["request"]: r for r in found if r["kind"] == "result"}
    for answer, user in zip(answers, ("alice", "dave", "bob"), strict=True):
        request, result = by_request[_id(answer)], results[_id(answer)]
        assert request["principal"] == user
        assert request["effective"] == result["effective"] == server.effective(answer)
        assert request["seq"] < result["seq"]
        assert result["status"] == 200
        assert result["finish_reasons"] == {"length": 1}
        assert len(result["prompts"]) == 1
    assert by_request[_id(stream)]["effective"] == ["math"]
    assert by_request[_id(stream)]["policies"] == {"math": ["stem-for-research"]}
    assert found[0]["kind"] == "start"
    assert "probe" in {r["kind"] for r in found}
    assert any(map(_beyond_the_grant, found))

    report = verify(server.folder / "audit", published(server, tmp_path))
    assert report.faults == []
    assert report.heads >= 1


def _beyond_the_grant(record):
    return record["kind"] == "refused" and record["code"] == "expert_not_permitted"


def _id(response):
    return response.headers["x-request-id"]


def test_receipts_are_checked_without_the_server(tmp_path):
    server = running()
    published(server, tmp_path)
    answers = {
        "chat": server.chat("alice", headers={"X-Receipt": "1"}, experts=["public", "math"]),
        "stream": server.complete("alice", receipt=True, stream=True, experts=["public", "math"]),
    }
    for name, answer in answers.items():
        assert answer.status_code == 200, answer.text
        whole = list(sse.data(answer))[-2] if name == "stream" else answer.text
        (tmp_path / name).write_text(whole)
        asked = server.get(f"/v1/receipts/{_id(answer)}", "alice")
        (tmp_path / f"{name} asked").write_text(asked.text)
        for other in ("bob", "dave"):
            assert server.get(f"/v1/receipts/{_id(answer)}", other).status_code == 404
        for file in (name, f"{name} asked"):
            done = checked(tmp_path, file, "--principal", "alice")
            assert done.returncode == 0, done.stderr
            said = json.loads(done.stdout)
            assert said["jti"] == _id(answer)
            assert [one["name"] for one in said["experts"]] == ["public", "math"]
            assert [one["owner"] for one in said["experts"]] == ["ai2", "acme"]
    # Of the last one: what it says is what the answer says, and what the log says.
    usage = json.loads((tmp_path / "stream").read_text())
    assert "receipt" in usage
    assert said["usage"]["completion_tokens"] == 4
    place = said["log"]["result"]
    (result,) = (r for r in records(server) if r["seq"] == place["seq"])
    assert result["usage"] == said["usage"]
    assert checked(tmp_path, "chat", "--principal", "bob").returncode == 1
    header, claims, signature = asked.json()["receipt"].split(".")
    said = base64.urlsafe_b64decode(claims + "==").replace(b'"alice"', b'"bobby"')
    assert b'"bobby"' in said
    forged = f"{header}.{base64.urlsafe_b64encode(said).rstrip(b'=').decode()}.{signature}"
    (tmp_path / "forged").write_text(forged)
    assert checked(tmp_path, "forged").returncode == 1


def checked(folder, file, *options):
    return expertgate(folder, "receipts", "verify", file, "--key", "keys.json", *options)


def test_usage_is_what_the_answers_said():
    server = running()
    since = datetime.now(UTC)
    asked = [("alice", ["public", "math"]), ("alice", ["news"]), ("dave", ["math", "code"])]
    answers = [server.chat(user, experts=experts, max_tokens=9) for user, experts in asked]
    until = _wait_for_results(server, answers)
    said: Counter[str] = Counter()
    for answer in answers:
        for name, used in answer.json()["experts"]["usage"].items():
            said[name] += used["tokens"]
    times = ["--from", since.isoformat(), "--to", until.isoformat()]
    for by, names in {
        "expert": {"public": ["public"], "math": ["math"], "news": ["news"], "code": ["code"]},
        "owner": {"ai2": ["public"], "acme": ["math"], "courier": ["news"], "quillon": ["code"]},
    }.items():
        done = expertgate(server.folder, "usage", "--by", by, "--format", "json", *times)
        assert done.returncode == 0, done.stderr
        rows = {row[by]: row for row in json.loads(done.stdout)}
        assert rows.keys() == names.keys()
        for name, parts in names.items():
            total = sum(said[part] for part in parts)
            assert rows[name]["tokens"] == pytest.approx(total, abs=1e-2)


def _wait_for_results(server, answers):
    """Until they are all in the log, which is behind the answers; a time after that."""
    wanted = {_id(answer) for answer in answers}
    until(lambda: wanted <= {r["request"] for r in records(server) if r["kind"] == "result"})
    return datetime.now(UTC)


KILLS = 2


class Client(threading.Thread):
    """Asks again and again until the server is gone, and notes whose tokens have come."""

    def __init__(self, server, generated):
        super().__init__()
        self.server, self.generated = server, generated
        self.ended = []
        self.start()

    def run(self):
        body = {"prompt": "hi", "max_tokens": 48, "ignore_eos": True, "stream": True}
        url, headers = f"{self.server.url}/v1/completions", self.server.headers("alice")
        while True:
            try:
                with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
                    for event in sse.data(answer):
                        if '"text":' in event:
                            self.generated[_id(answer)] += 1
                self.ended.append(_id(answer))
            except httpx.HTTPError:
                return


def test_kill_9_of_a_server_under_load_leaves_no_token_without_its_record(tmp_path):
    prepare(tmp_path)
    key = make_key(tmp_path, "alice", "research")
    generated: Counter[str] = Counter()
    for life in range(1, KILLS + 1):
        server = start(tmp_path)
        server.keys = {"alice": key}
        try:
            clients = [Client(server, generated) for _ in range(6)]
            wanted = 20 * life
            deadline = time.monotonic() + 120
            while len(generated) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            # The engine's processes as well: the machine is gone, for all that they know.
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(60)
            for client in clients:
                client.join(60)
        finally:
            stop(server)
        assert len(generated) >= wanted, server.log[-4000:]
        (tmp_path / "log").rename(tmp_path / f"log-{life}")

    found = records(server)
    recorded = {r["request"] for r in found if r["kind"] == "request"}
    assert generated.keys() <= recorded
    # Some were running when it died, or it was not killed under load.
    assert recorded - {r["request"] for r in found if r["kind"] == "result"}
    assert sum(r["kind"] == "start" for r in found) == KILLS
    public = expertgate(tmp_path, "audit", "public-key")
    (tmp_path / "keys.json").write_text(public.stdout)
    done = expertgate(tmp_path, "audit", "verify", "audit", "--key", "keys.json")
    assert done.returncode == 0, done.stderr
    assert expertgate(tmp_path, "usage", "--by", "expert").returncode == 0
