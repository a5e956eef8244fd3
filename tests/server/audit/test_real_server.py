"""The audit log of the server that the session shares, while it runs."""

import json
import time

from expertgate.server.audit.signing import PublicKeys
from expertgate.server.audit.verify import verify
from tests.server.running import running


def published(server, folder):
    path = folder / "keys.json"
    path.write_text(server.get("/.well-known/expertgate-keys").text)
    return PublicKeys.load(path)


def records(server):
    return [
        json.loads(line)
        for path in sorted((server.folder / "audit").glob("*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]


def test_requests_are_recorded_and_the_log_holds(tmp_path):
    server = running()
    answers = [server.chat(user) for user in ("alice", "dave", "bob")]
    stream = server.complete("alice", stream=True, experts=["math"])
    assert server.chat("dave", experts=["news"]).status_code == 403
    found = []
    for _ in range(100):  # results are written behind the answer
        found = records(server)
        if any(r["kind"] == "result" and r["request"] == _id(stream) for r in found):
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
    assert any(r["kind"] == "refused" and r["code"] == "expert_not_permitted" for r in found)

    report = verify(server.folder / "audit", published(server, tmp_path))
    assert report.faults == []
    assert report.heads >= 1


def _id(response):
    return response.headers["x-request-id"]
