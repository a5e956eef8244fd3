"""A real server on a real engine, asked over HTTP as clients ask it."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import yaml

from expertgate.server.routes.table import ROUTES
from tests.server.running import (
    BLOCK_TOKENS,
    Server,
    environment,
    expertgate,
    make_key,
    prepare,
    start,
    stop,
)
from tests.support import sse
from tests.support.waiting import until

ALL = ["public", "math", "news", "code"]
STEM = ["public", "math", "code"]
GRANTS = {"alice": ALL, "dave": STEM, "bob": ["public"]}


def code_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error["code"]


def client(server: Server, user: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[user], max_retries=0)


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = list(sse.data(response))
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


# --- what may speak ---------------------------------------------------------------------------


@pytest.mark.parametrize("user", GRANTS)
def test_without_a_selection_all_that_are_granted_speak(server, user):
    assert server.effective(server.chat(user)) == GRANTS[user]
    assert server.effective(server.complete(user)) == GRANTS[user]


@pytest.mark.parametrize(
    ("body", "header", "expected"),
    [
        ({"experts": ["public"]}, None, ["public"]),
        ({"experts": ["math"]}, None, ["math"]),
        ({"experts": ["code", "public", "public"]}, None, ["public", "code"]),
        ({"experts": {"exclude": ["news"]}}, None, STEM),
        ({"experts": {"exclude": []}}, None, ALL),
        ({"experts": None}, None, ALL),
        ({}, "public,math", ["public", "math"]),
        ({}, "public , math", ["public", "math"]),
        ({}, "-news", STEM),
        ({"model": "toy:public+math"}, None, ["public", "math"]),
        ({"model": "toy:-news"}, None, STEM),
        ({"model": "toy"}, None, ALL),
        ({"model": "toy:-news", "experts": {"exclude": ["news"]}}, "-news", STEM),
    ],
)
def test_every_way_to_say_which(server, body, header, expected):
    headers = {} if header is None else {"X-Experts": header}
    for ask in server.asks:
        response = ask("alice", headers=headers, **body)
        assert server.effective(response) == expected
        assert response.json()["model"] == "toy"


@pytest.mark.parametrize(
    ("body", "header"),
    [
        ({"experts": ["public", "news"]}, None),
        ({"experts": {"exclude": ["news"]}}, None),
        ({"experts": ["public", "nosuch"]}, None),
        ({}, "public,news"),
        ({}, "-news"),
        ({"model": "toy:public+news"}, None),
        ({"model": "toy:-nosuch"}, None),
    ],
)
def test_beyond_the_grant_is_forbidden_and_runs_nothing(server, body, header):
    headers = {} if header is None else {"X-Experts": header}
    for ask in server.asks:
        for stream in (False, True):
            response = ask("dave", headers=headers, stream=stream, **body)
            assert code_of(response, 403) == "expert_not_permitted"
            assert "x-experts-effective" not in response.headers


@pytest.mark.parametrize(
    ("body", "header"),
    [
        ({"experts": []}, None),
        ({"experts": "public"}, None),
        ({"experts": {"exclude": ALL}}, None),
        ({"experts": {"exclude": ["news"], "only": []}}, None),
        ({"experts": [1]}, None),
        ({}, ""),
        ({}, "public,-news"),
        ({"model": "toy:"}, None),
        ({"experts": ["public"]}, "math"),
        ({"experts": ["public"], "model": "toy:math"}, None),
    ],
)
def test_a_malformed_selection(server, body, header):
    headers = {} if header is None else {"X-Experts": header}
    assert code_of(server.chat("alice", headers=headers, **body), 400) == "invalid_experts"


def test_purpose_reaches_the_policies(server):
    ask = {"headers": {"X-Purpose": "advertising"}}
    assert server.effective(server.chat("alice", **ask)) == STEM
    assert code_of(server.chat("alice", experts=["news"], **ask), 403) == "expert_not_permitted"


def test_a_user_without_any_grant_gets_nothing(server):
    assert code_of(server.chat("mallory"), 403) == "expert_not_permitted"
    assert server.get("/v1/experts", "mallory").json()["data"] == []


def test_experts_change_the_answer_and_users_do_not(server):
    def text(user, experts):
        body = {"prompt": "x" * 50, "max_tokens": 16, "experts": experts}
        return server.complete(user, **body).json()["choices"][0]["text"]

    assert text("alice", ["public"]) == text("bob", ["public"])
    assert text("alice", STEM) == text("dave", STEM)
    assert len({text("alice", experts) for experts in (ALL, STEM, ["public"], ["math"])}) > 1


def test_requests_of_several_sets_at_once_answer_as_alone(server):
    asks = [
        (user, experts, f"{n} bottles")
        for n in range(3)
        for user, experts in (("alice", ALL), ("alice", ["math"]), ("dave", STEM), ("bob", None))
    ]

    def text(ask):
        user, experts, prompt = ask
        body = {"prompt": prompt, "max_tokens": 8, "experts": experts}
        return server.complete(user, **body).json()["choices"][0]["text"]

    alone = [text(ask) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        assert list(pool.map(text, asks)) == alone


# --- OpenAI's own client ------------------------------------------------------------------------


class Totals(SimpleNamespace):
    """A `usage` object that came as JSON."""


def assert_usage(experts, usage, choices=1, prompts=1):
    """Each token but a choice's last is computed once, by two experts in each layer, or cached."""
    assert list(experts["usage"]) == experts["effective"]
    # OpenAI counts a prompt once, whatever `n` is; each choice has one of its own to compute.
    expected = choices * usage.prompt_tokens + usage.completion_tokens - choices * prompts
    assert experts["computed"] + experts["cached"] == expected
    slots = min(2, len(experts["effective"]))
    tokens = sum(part["tokens"] for part in experts["usage"].values())
    assert tokens == pytest.approx(slots * experts["computed"], abs=0.01)
    assert sum(part["share"] for part in experts["usage"].values()) == pytest.approx(1, abs=1e-12)
    assert all(0 <= part["share"] <= 1 for part in experts["usage"].values())


def test_prompts_from_the_cache_are_told_apart(server):
    body = {"prompt": "cached " * 60, "max_tokens": 3, "ignore_eos": True}
    cold, warm = (server.complete("dave", **body).json() for _ in range(2))
    assert cold["experts"]["cached"] == 0
    cached = warm["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert warm["experts"]["cached"] == cached == 3 * BLOCK_TOKENS
    assert warm["experts"]["computed"] == cold["experts"]["computed"] - cached


def test_openai_chat(server):
    answer = client(server, "dave").chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=4,
        n=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs.content
    assert answer.usage.completion_tokens == 8
    assert answer.model_extra["experts"]["effective"] == STEM
    assert_usage(answer.model_extra["experts"], answer.usage, choices=2)


def test_openai_completions_of_several_prompts(server):
    answer = client(server, "bob").completions.create(
        model="toy", prompt=["one", "two"], max_tokens=3, n=2, extra_body={"experts": ["public"]}
    )
    assert len(answer.choices) == 4
    experts = answer.model_extra["experts"]
    assert experts["effective"] == ["public"]
    assert experts["usage"] == {"public": {"tokens": experts["computed"], "share": 1}}
    assert_usage(experts, answer.usage, choices=2, prompts=2)


def test_openai_stream(server):
    stream = client(server, "dave").chat.completions.create(
        model="toy:-code",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    used = [chunk.model_extra["experts"] for chunk in chunks if "experts" in chunk.model_extra]
    assert [experts["effective"] for experts in used] == [["public", "math"]]
    assert_usage(used[0], chunks[-1].usage)
    assert chunks[-1].usage.completion_tokens == 4
    assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)


def test_openai_models_and_errors(server):
    api = client(server, "bob")
    assert [model.id for model in api.models.list()] == ["toy"]
    assert api.models.retrieve("toy").id == "toy"
    assert api.models.retrieve("toy:public").id == "toy:public"
    for name in ("another", "toy:typo"):
        with pytest.raises((openai.NotFoundError, openai.PermissionDeniedError)):
            api.models.retrieve(name)
    with pytest.raises(openai.PermissionDeniedError) as denied:
        api.completions.create(model="toy:math", prompt="hi")
    assert denied.value.code == "expert_not_permitted"
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="another", prompt="hi")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="eg-wrong", max_retries=0).models.list()


def test_an_answers_own_id_finds_its_receipt(server):
    api = client(server, "bob")
    chat = [{"role": "user", "content": "hi"}]
    answers = [
        api.chat.completions.create(model="toy", messages=chat, max_tokens=1),
        api.completions.create(model="toy", prompt="hi", max_tokens=1),
        api.responses.create(model="toy", input="hi", max_output_tokens=1),
    ]
    for answer in answers:
        found = server.get(f"/v1/receipts/{answer.id}", "bob")
        assert found.status_code == 200, answer.id
        assert server.get(f"/v1/receipts/{answer.id}", "alice").status_code == 404


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_a_stream_tells_with_its_usage_where_that_was_asked(server, kind):
    ask = getattr(server, kind)
    found = events(ask("dave", stream=True, stream_options={"include_usage": True}))
    assert [event for event in found if "experts" in event] == [found[-1]]
    assert found[-1]["choices"] == []
    assert found[-1]["experts"]["effective"] == STEM
    assert_usage(found[-1]["experts"], Totals(**found[-1]["usage"]))
    assert found[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_a_stream_tells_with_each_end_otherwise(server, kind):
    found = events(getattr(server, kind)("dave", stream=True, n=2, temperature=1))
    telling = [event for event in found if "experts" in event]
    ends = [event for event in found if any(c["finish_reason"] for c in event["choices"])]
    assert telling == ends
    assert len(telling) == 2
    assert all(event["experts"]["effective"] == STEM for event in telling)
    # The usage of all choices together is there when the last of them ends.
    assert sum(part["share"] for part in telling[-1]["experts"]["usage"].values()) == pytest.approx(
        1
    )


def test_a_stream_says_what_an_answer_does(server):
    body = {"prompt": "x" * 40, "max_tokens": 12}
    streamed = events(server.complete("dave", stream=True, **body))
    text = "".join(choice["text"] for event in streamed for choice in event["choices"])
    assert text == server.complete("dave", **body).json()["choices"][0]["text"]


def test_text_that_looks_like_an_end_is_no_end(server):
    # Echoed text holds the marks that are looked for, behind escaped quotes.
    prompt = 'data: {"error" "choices":[] "finish_reason":"stop"'
    found = events(server.complete("dave", prompt=prompt, echo=True, stream=True, max_tokens=2))
    assert sum("experts" in event for event in found) == 1
    text = "".join(choice["text"] for event in found for choice in event["choices"])
    assert text.startswith(prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 10_000},
        {"temperature": -1},
        {"prompt": "x" * 3000},
        {"stop_token_ids": [999]},
    ],
    ids=str,
)
def test_what_is_wrong_shows_before_a_stream_begins(server, fields):
    for stream in (False, True):
        response = server.complete("alice", stream=stream, **fields)
        assert code_of(response, 400) == "invalid_request"


# --- who asks -------------------------------------------------------------------------------------

KEYED = ["/v1/models", "/v1/experts"]


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer eg-" + "A" * 43,
        "Basic YWxpY2U6eA==",
        "eg-key",
        "Bearer null",
    ],
)
def test_no_key_or_a_wrong_one(server, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    for response in (
        *(server.get(path, **headers) for path in KEYED),
        server.post("/v1/chat/completions", {}, None, **headers),
        server.post("/v1/completions", b"not read", None, **headers),
    ):
        assert code_of(response, 401) == "invalid_credential"
        assert response.headers["www-authenticate"] == "Bearer"


def test_keys_expire_are_made_and_are_revoked_while_it_runs(server):
    path = server.folder / "keys.yaml"
    before = path.read_text()
    late = make_key(server.folder, "late")
    headers = {"Authorization": f"Bearer {late}"}

    def status():
        return server.get("/v1/models", **headers).status_code

    try:
        until(lambda: status() == 200)
        entries = yaml.safe_load(path.read_text())
        digest = hashlib.sha256(late.encode()).hexdigest()
        assert [entry["id"] for entry in entries if entry["sha256"] == digest] == ["late"]
        expired = [
            {**entry, "expires": "2020-01-01T00:00:00Z"} if entry["id"] == "late" else entry
            for entry in entries
        ]
        path.write_text(yaml.safe_dump(expired))
        until(lambda: status() == 401)
        assert code_of(server.get("/v1/models", **headers), 401) == "invalid_credential"
        path.write_text(yaml.safe_dump(entries))
        until(lambda: status() == 200)
        path.write_text(before)
        until(lambda: status() == 401)
        assert server.get("/v1/models", "bob").status_code == 200
    finally:
        path.write_text(before)
    assert late not in server.log


@pytest.mark.parametrize("header", ["X-Forwarded-User", "X-Forwarded-Groups"])
def test_an_asserted_identity_is_refused(server, header):
    assert code_of(server.chat("bob", headers={header: "research"}), 400) == "invalid_request"


def test_experts_are_listed_as_far_as_they_are_granted(server):
    for user, names in GRANTS.items():
        shown = server.get("/v1/experts", user).json()["data"]
        assert [expert["name"] for expert in shown] == names
        assert not any("index" in expert for expert in shown)
    assert shown[0]["owner"] == "ai2"


# --- bodies, routes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_request"),
        (b"", {}, 400, "invalid_request"),
        (b"[]", {}, 400, "invalid_request"),
        (b"{}", {}, 400, "invalid_request"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (
            b"{}",
            {"Content-Type": "application/x-www-form-urlencoded"},
            415,
            "unsupported_media_type",
        ),
        (b'{"prompt":"' + b"x" * (1 << 20) + b'"}', {}, 413, "body_too_large"),
        (b'{"prompt":' + b"[" * 100_000, {}, 400, "invalid_request"),
    ],
    ids=["cut", "empty", "list", "nothing", "text", "form", "large", "deep"],
)
def test_bodies_that_are_refused(server, content, headers, status, code):
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert code_of(server.post(path, content, **headers), status) == code


def test_a_large_body_without_a_length_is_cut_off(server):
    def parts():
        for _ in range(64):
            yield b"x" * (1 << 16)

    headers = {"Content-Type": "application/json", **server.headers("alice")}
    try:
        response = httpx.post(f"{server.url}/v1/completions", content=parts(), headers=headers)
    except httpx.HTTPError:
        return  # the connection was closed while parts were on their way
    assert code_of(response, 413) == "body_too_large"


def test_headers_without_end_are_cut_off(server):
    """Before anyone has said who asks, so a stranger could fill the memory with them."""
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\nX-Long: ")
        sent = 0
        try:
            while sent < 16 << 20:
                connection.sendall(b"x" * (1 << 16))
                sent += 1 << 16
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        except OSError:
            pass  # it was closed meanwhile
        assert sent < 16 << 20
    assert server.get("/health", **{"X-Long": "x" * 30_000}).status_code == 200


def test_a_purpose_is_short_and_printable(server):
    for purpose in ("x" * 257, "a\tb"):
        assert code_of(server.chat(headers={"X-Purpose": purpose}), 400) == "invalid_request"
    assert server.chat(headers={"X-Purpose": "x" * 256}).status_code == 200


def test_health_needs_no_key_and_unknown_routes_are_404(server):
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"ready": True}
    assert set(server.get("/version").json()) == {"version"}
    assert code_of(server.get("/v2"), 404) == "not_found"
    assert code_of(server.get("/v1/chat/completions"), 405) == "method_not_allowed"
    refused = server.post("/health", {})
    assert code_of(refused, 405) == "method_not_allowed"
    assert refused.headers["allow"] == "GET, HEAD"


def test_whatever_can_be_got_has_a_head(server):
    """By which load balancers ask, and HTTP has it wherever GET is (RFC 9110, 9.1)."""
    varying = ("date", "x-request-id")
    for path in [route.path for route in ROUTES if route.method == "GET"] + ["/openapi.json"]:
        url = server.url + path.replace("{model}", "toy")
        for headers in ({}, server.headers("bob")):
            whole, head = (httpx.request(m, url, headers=headers) for m in ("GET", "HEAD"))
            assert (head.status_code, head.content) == (whole.status_code, b"")
            first, second = ({**r.headers, **dict.fromkeys(varying)} for r in (whole, head))
            assert first == second


def test_the_api_is_described_with_experts_and_without_what_is_refused(server):
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "TextRequest"):
        assert "experts" in schemas[name]["properties"]
        assert "vllm_xargs" not in schemas[name]["properties"]


# --- leaving, and the end -------------------------------------------------------------------------


def send_and_leave(server, stream):
    """Asks for an answer of many seconds, and hangs up."""
    body = {"prompt": "hi", "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    content = json.dumps(body).encode()
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {server.keys['alice']}\r\n".encode()
            + f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        if stream:
            assert connection.recv(200).startswith(b"HTTP/1.1 200")
        time.sleep(0.3)
        # A reset, as of a client that was killed.
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )


def left(server):
    """What the audit log says of requests whose clients left."""
    lines = [
        line
        for path in sorted((server.folder / "audit").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    # The last line may be half written.
    results = [json.loads(line) for line in lines if '"kind":"result"' in line and line[-1] == "}"]
    return [result for result in results if result["code"] == "client_gone"]


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_frees_the_engine_and_what_was_computed_is_accounted(server, stream):
    before = len(left(server))
    for _ in range(10):  # more than the engine runs at once
        send_and_leave(server, stream)
    until(lambda: len(left(server)) >= before + 10)
    ended = left(server)[before:]
    for result in ended:
        assert result["status"] == 499
        usage = result["usage"]
        if stream:  # begun, for it has been told something
            assert usage["prompt_tokens"] == 2
            assert 0 < usage["completion_tokens"] <= usage["computed_tokens"]
        if usage is not None and usage["computed_tokens"]:
            assert sum(part["share"] for part in usage["experts"].values()) == pytest.approx(1)
    computed = [result["usage"]["computed_tokens"] for result in ended if result["usage"]]
    assert min(computed) < 1800  # far from done; not all, for this machine may stand still
    assert server.complete("bob").status_code == 200
    assert "Traceback" not in server.log


def test_after_all_that_nothing_failed_inside(server):
    assert server.get("/ready").json() == {"ready": True}
    assert "internal_error" not in server.log
    assert "never retrieved" not in server.log


def test_a_full_queue_says_when_to_come_back_and_others_still_find_a_place(server):
    # Half of the 128 places, and six times what the engine runs at once: the answers to the two
    # that are refused come long before it is done, on any machine.
    crowd = {"prompt": ["hi"] * 64, "max_tokens": 200, "ignore_eos": True, "stream": True}
    headers, url = server.headers("alice"), f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=crowd, headers=headers, timeout=120) as running:
        assert running.status_code == 200
        for stream in (False, True):
            response = server.complete("alice", stream=stream)
            assert code_of(response, 429) == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
        assert server.complete("bob").status_code == 200
    until(lambda: server.complete("alice").status_code != 429)


@pytest.mark.parametrize("stream", [False, True])
def test_more_choices_than_can_ever_run_are_refused_for_good(server, stream):
    # The engine runs 8 at once, and is given a few more.
    response = server.complete("alice", n=11, temperature=1, stream=stream)
    assert code_of(response, 400) == "invalid_request"
    assert "at most 10" in response.json()["error"]["message"]


def gone(processes):
    """Within a moment: Python's own tracker of shared memory ends just after its parent."""
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM chooses the processes")
def test_on_cpus_the_worker_lives_in_the_engines_process_and_has_its_cores(server):
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in server.children()}
    assert not [title for title in titles.values() if "Worker" in title]
    (engine,) = [pid for pid, title in titles.items() if "EngineCore" in title]
    names = {line.partition("=")[0] for line in _environment_of(engine)}
    assert names & {"GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES"}


def _environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_sigterm_lets_streams_finish_cuts_off_the_longest_and_leaves_no_orphans(tmp_path):
    prepare(tmp_path)
    with (tmp_path / "expertgate.yaml").open("a") as config:
        config.write("drain_s: 8\nkeep_alive_s: 1\n")
    keys = {user: make_key(tmp_path, user, "research") for user in ("alice", "dave")}
    own = start(tmp_path)
    own.keys = keys
    try:
        children = own.children()
        assert children
        address = own.url.removeprefix("http://").split(":")
        with socket.create_connection(address, timeout=60) as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
            while idle.recv(4096):  # until the server closes it
                pass
        # So much that no machine is done with it within the eight seconds.
        long = {"max_tokens": 1900, "ignore_eos": True, "prompt": ["hi"] * 60}
        short = {"prompt": "hi", "max_tokens": 100, "ignore_eos": True}
        with ExitStack() as stack:

            def begun(user, body):
                """The events of a stream that has begun."""
                url, headers = f"{own.url}/v1/completions", own.headers(user)
                asked = httpx.stream(
                    "POST", url, json={**body, "stream": True}, headers=headers, timeout=120
                )
                found = sse.data(stack.enter_context(asked))
                return [next(found)], found

            streams = [begun("dave", short), begun("alice", long)]
            own.process.send_signal(signal.SIGTERM)
            found, ended = ([*first, *rest] for first, rest in streams)
        found, ended = (
            [json.loads(event) for event in events if event != "[DONE]"]
            for events in (found, ended)
        )
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert ended[-1]["error"]["code"] == "engine_unavailable"
        assert "going down" in ended[-1]["error"]["message"]
        assert own.process.wait(60) == 0
        assert gone(children)
        assert "Traceback" not in own.log
        assert "leaked" not in own.log  # as libraries say of what is left when they end
    finally:
        stop(own)


def is_engines(pid):
    """Not what libraries run while they are imported, before there is anybody to hear a signal."""
    try:
        return b"multiprocessing" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_ctrl_c_in_a_terminal_lets_streams_finish(tmp_path):
    """There the signal goes to the engine's processes as well, which vLLM ends by it."""
    prepare(tmp_path)
    keys = {"alice": make_key(tmp_path, "alice", "research")}
    own = start(tmp_path)
    own.keys = keys
    try:
        children = own.children()
        body = {"prompt": "hi", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        url, headers = f"{own.url}/v1/completions", own.headers("alice")
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as asked:
            events = sse.data(asked)
            next(events)
            os.killpg(own.process.pid, signal.SIGINT)
            *_, last, _ = events
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert own.process.wait(60) == 0
        assert gone(children)
    finally:
        stop(own)


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), id="SIGTERM"),
        pytest.param(lambda pid: os.killpg(pid, signal.SIGINT), id="Ctrl-C"),
    ],
)
def test_being_stopped_while_it_starts_leaves_no_orphans(tmp_path, send):
    prepare(tmp_path)
    make_key(tmp_path, "alice")
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(
            [os.sys.executable, "-m", "expertgate.server.cli", "serve"],
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    own = Server(tmp_path, "", process)
    try:
        deadline = time.monotonic() + 60
        while not any(map(is_engines, own.children())) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3)
        children = own.children()
        send(process.pid)
        assert process.wait(60) == 0
        assert gone(children)
        assert "Traceback" not in own.log
    finally:
        stop(own)


# --- mistakes at the command line -----------------------------------------------------------------


def mistake(folder, *arguments):
    done = expertgate(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_serving_without_a_configuration_is_refused(tmp_path):
    assert "configuration" in mistake(tmp_path, "serve", "model")
    assert "configuration" in mistake(tmp_path, "serve", "--config", "nowhere.yaml")


def test_mistakes_are_one_line_each(tmp_path):
    prepare(tmp_path)
    make_key(tmp_path, "alice")
    assert "no-such" in mistake(tmp_path, "serve", "./no-such")
    assert "--no-such" in mistake(tmp_path, "serve", "--no-such")
    assert "--port" in mistake(tmp_path, "serve", "--port", "99999")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in mistake(tmp_path, "serve", "--port", str(port))
    assert "--max-model-len" in mistake(tmp_path, "serve", "--", "--max-model-len", "many")
    assert "max_model_len" in mistake(tmp_path, "serve", "--", "--max-model-len", "99999999")
    assert "--config" in mistake(tmp_path, "serve", "--", "--config", "missing.yaml")
    compilation = ("--compilation-config", '{"mode": 3, "backend": "another.backend"}')
    assert "compilation_config" in mistake(tmp_path, "serve", "--", *compilation)
    with (tmp_path / "expertgate.yaml").open("a") as config:
        config.write("tool_parser: olmo4\n")
    # Before the engine's arguments are looked at, and so before any weights are.
    too_long = ("--", "--max-model-len", "99999999")
    assert "did you mean olmo3?" in mistake(tmp_path, "serve", *too_long)
    (tmp_path / "policies" / "all.cedar").write_text("permit(")
    assert "all.cedar" in mistake(tmp_path, "serve")
    (tmp_path / "expertgate.yaml").write_text(
        "policies: policies\nidentity: {api_keys: keys.yaml}\n"
    )
    assert "no model" in mistake(tmp_path, "serve")


def test_threads_of_the_engine_that_take_and_send_run_where_the_server_may(server):
    """OpenMP binds the first of them to a core, where they would wait for each step's end."""
    server.complete("alice")
    tasks = [t for pid in server.children() for t in Path(f"/proc/{pid}/task").iterdir()]
    found = {
        frozenset(os.sched_getaffinity(int(task.name)))
        for task in tasks
        if (task / "comm").read_text().startswith("ZMQbg/IO")
    }
    assert found == {frozenset(os.sched_getaffinity(server.process.pid))}
