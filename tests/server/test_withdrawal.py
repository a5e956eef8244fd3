"""Experts that are taken away while a real server's streams use them."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.soak import Target, soak
from tests.server.audit.documented import check_fields
from tests.server.audit.logs import records
from tests.server.running import (
    ADMIN_TOKEN,
    GROUPS,
    POLICIES,
    Server,
    expertgate,
    make_key,
    prepare,
    start,
    stop,
)
from tests.support import sse
from tests.support.waiting import until

LONG = 30_000
"""Tokens: far more than any machine makes of one stream while a command runs."""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """One whose policies, keys and suspensions may be changed, as the shared one's may not."""
    folder = tmp_path_factory.mktemp("withdrawal")
    prepare(folder, max_model_len=LONG + 1000)
    keys = {user: make_key(folder, user, *groups) for user, groups in GROUPS.items()}
    server = start(folder)
    server.keys = keys
    yield server
    stop(server)


@pytest.fixture(autouse=True)
def _restored(server):
    rules, keys = server.folder / "policies" / "all.cedar", server.folder / "keys.yaml"
    kept = keys.read_text()
    yield
    rules.write_text(POLICIES)
    keys.write_text(kept)
    expertgate(server.folder, "experts", "resume", "news")
    until(lambda: names(server, "alice") == ["public", "math", "news", "code"])


def names(server: Server, user: str) -> list[str]:
    response = server.get("/v1/experts", user)
    return [expert["name"] for expert in response.json().get("data", [])]


def withdrawals(server: Server) -> list[tuple[dict, dict]]:
    """What the audit log says of withdrawals, each with what it says of the request."""
    found = records(server.folder)
    requests = {record["request"]: record for record in found if record["kind"] == "request"}
    return [(each, requests[each["request"]]) for each in found if each["kind"] == "withdrawn"]


def under_way(server: Server) -> list[dict]:
    """The records of requests that have begun and not ended."""
    found = records(server.folder)
    ended = {record["request"] for record in found if record["kind"] == "result"}
    return [
        record for record in found if record["kind"] == "request" and record["request"] not in ended
    ]


class Stream(threading.Thread):
    """A request that runs until it is ended, and notes when its events came."""

    def __init__(self, server: Server, user: str, path: str = "/v1/completions", **body) -> None:
        super().__init__()
        self.server, self.user, self.path = server, user, path
        self.body = {"max_tokens": LONG, "ignore_eos": True, "stream": True, **body}
        self.events: list[str] = []
        self.status = 0
        self.text = ""
        self.ended_at = 0.0
        self.leaving = False
        self.start()

    def run(self) -> None:
        headers = {"Content-Type": "application/json", **self.server.headers(self.user)}
        content = json.dumps(self.body)
        url = self.server.url + self.path
        with httpx.stream("POST", url, content=content, headers=headers, timeout=300) as response:
            self.status = response.status_code
            if self.body["stream"]:
                for event in sse.data(response):
                    self.events.append(event)
                    if self.leaving:
                        break
            else:
                self.text = response.read().decode()
        self.ended_at = time.monotonic()

    def flowing(self) -> "Stream":
        until(lambda: len(self.events) > 3)
        return self

    def goes_on(self) -> None:
        """Nothing was taken from it; it is left then."""
        so_far = len(self.events)
        until(lambda: len(self.events) > so_far + 100)
        self.leaving = True
        self.join(60)
        assert not self.is_alive()
        assert not any("error" in json.loads(event) for event in self.events)

    def withdrawn(self) -> None:
        """It ended as a stream does whose expert was taken, long before its own end."""
        self.join(60)
        assert not self.is_alive()
        assert self.status == 200
        error = json.loads(self.events[-2])["error"]
        assert (error["code"], error["type"]) == ("expert_withdrawn", "permission_error")
        assert self.events[-1] == "[DONE]"
        assert len(self.events) < LONG
        assert not any("error" in json.loads(event) for event in self.events[:-2])


def test_a_policy_that_takes_an_expert_ends_the_streams_that_use_it(server):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    using = Stream(server, "alice", "/v1/chat/completions", **chat).flowing()
    several = Stream(server, "alice", prompt=["a", "b"], experts=["news"]).flowing()
    whole = Stream(server, "alice", prompt="c", stream=False)
    until(lambda: sum("news" in each["effective"] for each in under_way(server)) == 3)
    without = Stream(server, "alice", prompt="d", experts=["public", "math"]).flowing()
    other = Stream(server, "bob", prompt="e").flowing()
    rules = POLICIES + 'forbid(principal, action, resource == Expert::"news");'
    written = time.monotonic()
    (server.folder / "policies" / "all.cedar").write_text(rules)
    using.withdrawn()
    several.withdrawn()
    whole.join(60)
    assert whole.status == 403
    assert json.loads(whole.text)["error"]["code"] == "expert_withdrawn"
    took = max(s.ended_at for s in (using, several, whole)) - written
    print(f"ended {1000 * took:.0f} ms after the policy was written")
    assert names(server, "alice") == ["public", "math", "code"]
    until(lambda: len(withdrawals(server)) == 3)
    for record, request in withdrawals(server):
        check_fields(record)
        assert record["principal"] == request["principal"] == "alice"
        assert record["experts"] == ["news"]
        assert "news" in request["effective"]
    # Whoever uses none of what was taken goes on, as one who begins now.
    server.effective(server.complete("alice", experts=["public", "math"]))
    assert server.complete("alice", experts=["news"]).status_code == 403
    without.goes_on()
    other.goes_on()


def test_a_key_that_is_revoked_ends_what_it_began(server):
    stream = Stream(server, "dave", prompt="a").flowing()
    done = expertgate(server.folder, "keys", "revoke", "dave")
    assert done.returncode == 0, done.stderr
    stream.withdrawn()
    assert server.complete("dave").status_code == 401


def cached(server: Server, experts: list[str]) -> int:
    body = {"prompt": "all the same words " * 60, "experts": experts}
    usage = server.complete("alice", **body).json()["usage"]
    return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0


def test_a_suspended_expert_is_taken_from_all_and_its_cache_with_it(server):
    for experts in (["public", "news"], ["public", "math"]):
        cached(server, experts)
        assert cached(server, experts) > 0
    stream = Stream(server, "alice", prompt="a").flowing()
    done = expertgate(server.folder, "experts", "suspend", "news")
    assert (done.returncode, done.stdout) == (0, "news is suspended\n")
    stream.withdrawn()
    until(lambda: names(server, "alice") == ["public", "math", "code"])
    assert server.complete("alice", experts=["news"]).status_code == 403
    assert cached(server, ["public", "math"]) > 0
    done = expertgate(server.folder, "experts", "resume", "news")
    assert (done.returncode, done.stdout) == (0, "news is not suspended\n")
    until(lambda: "news" in names(server, "alice"))
    assert cached(server, ["public", "news"]) == 0
    assert cached(server, ["public", "news"]) > 0


def test_a_broken_policy_changes_nothing_and_is_in_the_log(server):
    before = names(server, "alice")
    (server.folder / "policies" / "all.cedar").write_text(POLICIES + "\nforbid(principal")
    until(lambda: "stay in force" in server.log)
    line = next(line for line in server.log.splitlines() if "stay in force" in line)
    assert f"all.cedar:{len(POLICIES.splitlines()) + 2}: unexpected end of input" in line
    assert names(server, "alice") == before


def test_sighup_has_the_policies_read_again(server):
    done = server.log.count("are in force as before")
    server.process.send_signal(1)
    until(lambda: server.log.count("are in force as before") > done)
    assert server.get("/ready").status_code == 200


def test_a_suspension_outlasts_the_server(server):
    expertgate(server.folder, "experts", "suspend", "news")
    second = start_until_it_answers(server)
    try:
        assert names(second, "alice") == ["public", "math", "code"]
    finally:
        stop(second)


def start_until_it_answers(server: Server) -> Server:
    """Another process of the same folder; who may consult what it knows before its engine is up."""
    before = len(server.log)
    with (server.folder / "expertgate.yaml").open("a") as config:
        config.write("audit: {path: another-audit}\n")  # the first writes the one of the default
    second = start(server.folder, ready=False)
    second.keys = server.keys

    def answers() -> bool:
        second.url = "http://" + second.log[before:].partition(" at http://")[2].partition("\n")[0]
        try:
            return second.get("/health").status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    try:
        until(answers)
    except BaseException:
        stop(second)
        raise
    return second


def test_nothing_is_left_of_a_while_of_load_faults_and_changes(server):
    target = Target(
        url=server.url,
        admin_url=server.log.partition("operators: ")[2].split()[0],
        admin_token=ADMIN_TOKEN,
        folder=server.folder,
        log=server.folder / "log",
        pid=server.process.pid,
        model="toy",
        keys={user: make_key(server.folder, user, "research") for user in ("erin", "frank")},
        experts=["public", "math", "code"],
    )
    found, _ = asyncio.run(soak(target, 15))
    assert found.faults == []
    for outcome in ("whole: 200", "leaving: left", "too large: 413 body_too_large"):
        assert found.outcomes[outcome]
    for change in ("suspend", "policies: less one", "key rotated"):
        assert found.outcomes[change]
