"""While an answer with log probabilities is put together, others are served."""

import asyncio
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from expertgate.server import answers, building, logs
from expertgate.server.beside import ANSWER, Lane, beside
from expertgate.server.routes import generate
from tests.server.audit.logs import records
from tests.server.coreless import Coreless
from tests.support.waiting import until

ASKED = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 20,
        "n": 3,
        "temperature": 1,
    },
    "/v1/completions": {"prompt": ["hi", "ho"], "logprobs": 20, "n": 2, "temperature": 1},
    "/v1/responses": {
        "input": "hi",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 20,
    },
}
EXTRA = ("logprobs", "top_logprobs", "include")
BUILT = {
    "/v1/chat/completions": (OpenAIServingChat, "_create_chat_logprobs", 3),
    "/v1/completions": (OpenAIServingCompletion, "_create_completion_logprobs", 4),
    "/v1/responses": (OpenAIServingResponses, "_create_response_logprobs", 1),
}


def ask(coreless, path, **more):
    body = {**ASKED[path], **more}
    return httpx.post(coreless.url + path, json=body, headers=coreless.headers(), timeout=60)


@pytest.fixture
def watched(coreless, monkeypatch):
    """Has each call of a function answer another request before it goes on."""
    calls = []

    def watch(holder, name):
        original = getattr(holder, name)

        def call(*args, **kwargs):
            health = []
            asking = threading.Thread(
                target=lambda: health.append(httpx.get(coreless.url + "/health", timeout=20))
            )
            asking.start()
            asking.join(20)
            calls.append([answer.status_code for answer in health])
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)
        return calls

    return watch


@pytest.mark.parametrize("path", ASKED)
def test_others_are_served_while_it_is_built(coreless, watched, path):
    holder, name, times = BUILT[path]
    calls = watched(holder, name)
    answer = ask(coreless, path)
    assert answer.status_code == 200, answer.text
    assert calls == [[200]] * times


@pytest.mark.parametrize("path", ASKED)
def test_and_while_it_is_rendered(coreless, watched, path):
    calls = watched(answers, "rendered")
    answer = ask(coreless, path)
    assert answer.status_code == 200, answer.text
    assert calls == [[200]]


@pytest.fixture
def held(monkeypatch):
    """Holds up what is put together, each until it is let go; tells how many wait so."""
    begun, gates = [], []
    original = answers.rendered

    def rendered(response):
        gate = threading.Event()
        gates.append(gate)
        begun.append(response.id)
        assert gate.wait(60)
        return original(response)

    monkeypatch.setattr(answers, "rendered", rendered)
    yield begun, gates
    for gate in gates:
        gate.set()


def waiting(server):
    """How many large answers wait to be put together."""
    return server.service.handlers.chat._lanes._turns.waiting


def test_large_ones_are_put_together_one_at_a_time_and_small_ones_past_them(
    coreless, held, monkeypatch
):
    begun, gates = held
    monkeypatch.setattr(building, "_SMALL", 12)
    large = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    with ThreadPoolExecutor(5) as clients:
        asked = [clients.submit(ask, coreless, path) for path in large]
        until(lambda: len(begun) == 1)
        small = clients.submit(ask, coreless, "/v1/chat/completions", n=1, top_logprobs=2)
        until(lambda: len(begun) == 2)
        gates[1].set()
        assert small.result().json()["id"] == begun[1], "a small one waits for large ones"
        for left, place in [(2, 0), (1, 2), (0, 3)]:
            until(lambda place=place: len(begun) == max(place + 1, 2))
            until(lambda left=left: waiting(coreless) == left)
            assert len(begun) == max(place + 1, 2), "large ones are put together side by side"
            gates[place].set()
    assert {each.result().status_code for each in asked} == {200}
    assert {each.result().json()["id"] for each in asked} == {*begun} - {begun[1]}


def test_large_ones_of_one_user_let_those_of_others_pass(coreless, held, monkeypatch):
    begun, gates = held
    monkeypatch.setattr(building, "_SMALL", 0)
    path = "/v1/chat/completions"

    def ask_as(user):
        body = {**ASKED[path], "user": user}
        url, headers = coreless.url + path, coreless.headers(user)
        return httpx.post(url, json=body, headers=headers, timeout=60).json()["id"]

    with ThreadPoolExecutor(5) as clients:
        alices = [clients.submit(ask_as, "alice") for _ in range(3)]
        until(lambda: len(begun) == 1 and waiting(coreless) == 2)
        bobs = clients.submit(ask_as, "bob")
        until(lambda: waiting(coreless) == 3)
        for place in range(4):
            until(lambda place=place: len(begun) == place + 1)
            gates[place].set()
    assert begun.index(bobs.result()) == 1
    assert {each.result() for each in alices} == {*begun} - {bobs.result()}


def test_a_server_that_is_cut_off_tells_whoever_waits_for_a_lane(tmp_path, held, monkeypatch):
    """The engine is done with them, so what ends its calls ends nothing there."""
    begun, _ = held
    monkeypatch.setattr(building, "_SMALL", 0)
    server = Coreless(tmp_path)
    try:
        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(ask, server, "/v1/completions") for _ in range(2)]
            until(lambda: len(begun) == 1 and waiting(server) == 1)
            loop = server.llm.output_handler.get_loop()
            asyncio.run_coroutine_threadsafe(server.engine.cut(), loop).result(60)
            errors = [each.result().json()["error"]["code"] for each in asked]
        assert errors == ["engine_unavailable"] * 2
        assert len(server.service.grants) == 0
    finally:
        server.close()
    ended = [each for each in records(tmp_path) if each["kind"] == "result"]
    assert [(each["status"], each["code"]) for each in ended] == [(503, "engine_unavailable")] * 2
    assert all(each["usage"] for each in ended), "what was computed is not on record"


def test_no_garbage_is_looked_for_in_a_large_one(coreless, monkeypatch):
    seen = []
    original = answers.rendered

    def rendered(response):
        seen.append(gc.isenabled())
        return original(response)

    monkeypatch.setattr(answers, "rendered", rendered)
    ask(coreless, "/v1/completions")
    monkeypatch.setattr(building, "_SMALL", 0)
    ask(coreless, "/v1/completions")
    assert (seen, gc.isenabled()) == ([True, False], True)


class End(StopIteration):
    """A kind of error that no future takes."""


def test_a_lane_is_free_again_whatever_is_raised_in_it():
    def ends():
        raise End("here")

    async def go():
        lane = Lane()
        with pytest.raises(RuntimeError, match="here"):
            await asyncio.wait_for(lane.run(ends, "test"), 60)
        assert await asyncio.wait_for(lane.run(lambda: "next", "test"), 60) == "next"

    asyncio.run(go())


def test_what_is_logged_beside_the_loop_is_of_the_same_request():
    async def go():
        logs.request_id.set("mine")
        return await beside(logs.request_id.get, "test")

    assert asyncio.run(go()) == "mine"


@pytest.mark.parametrize("size", [2, generate._PIECE, generate._PIECE + 1, 5 * generate._PIECE])
def test_a_whole_answer_goes_out_in_pieces_each_of_which_is_waited_for(size):
    """Else a client must read all of it in the time in which any reader must read something."""
    text = "".join(chr(65 + place % 26) for place in range(size))
    sent = []

    async def send(message):
        assert not sent or sent[-1]["taken"]
        sent.append({**message, "taken": False})
        await asyncio.sleep(0)
        sent[-1]["taken"] = True

    asyncio.run(generate._Whole(text, media_type="application/json")({}, None, send))
    start, *parts = sent
    assert dict(start["headers"])[b"content-length"] == str(size).encode()
    assert b"".join(part["body"] for part in parts).decode() == text
    assert max(len(part["body"]) for part in parts) <= generate._PIECE
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]


LEAVING = """
import threading, time
from expertgate.server import beside
threading.Thread(target=time.sleep, args=(600,), name=NAME, daemon=True).start()
print("closed", flush=True)
beside.leave()
print("by itself", flush=True)
"""


@pytest.mark.parametrize(("name", "last"), [(ANSWER, "closed"), ("other", "by itself")])
def test_a_process_ends_at_once_where_an_answer_is_being_put_together(name, last):
    code = LEAVING.replace("NAME", repr(name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == last


def test_a_lane_is_taken_until_its_thread_is_done():
    """Whoever waits may leave: what a thread has begun goes on."""
    gate, ran = threading.Event(), []

    async def go():
        lane = Lane()

        def first():
            gate.wait(20)
            ran.append("first")

        waiting = asyncio.create_task(lane.run(first, "test"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        second = asyncio.create_task(lane.run(lambda: ran.append("second"), "test"))
        left = asyncio.create_task(lane.run(lambda: ran.append("left"), "test"))
        await asyncio.wait({second}, timeout=0.2)
        left.cancel()
        gate.set()
        await second
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 / 0, "test")
        assert await lane.run(lambda: "next", "test") == "next"

    asyncio.run(go())
    assert ran == ["first", "second"]


def test_a_lane_is_free_again_where_no_thread_could_be_had(monkeypatch):
    def none(_):
        raise RuntimeError("can't start new thread")

    async def go():
        lane = Lane()
        with monkeypatch.context() as without:
            without.setattr(threading.Thread, "start", none)
            with pytest.raises(RuntimeError, match="new thread"):
                await lane.run(lambda: "never", "test")
        assert await asyncio.wait_for(lane.run(lambda: "next", "test"), 60) == "next"

    asyncio.run(go())


@pytest.mark.parametrize("path", ASKED)
def test_what_fails_while_it_is_built_is_told_and_ends_the_request(coreless, monkeypatch, path):
    def broken(*_, **__):
        raise RuntimeError("no such thing")

    holder, name, _ = BUILT[path]
    monkeypatch.setattr(holder, name, broken)
    answer = ask(coreless, path)
    assert answer.status_code == 500, answer.text
    assert answer.json()["error"]["code"] == "internal_error"
    assert len(coreless.service.grants) == 0
    monkeypatch.undo()
    assert ask(coreless, path).status_code == 200


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("logprobs", [True, False])
def test_what_clients_may_not_see_is_left_out(coreless, path, logprobs):
    body = {name: value for name, value in ASKED[path].items() if logprobs or name not in EXTRA}
    url, headers = coreless.url + path, coreless.headers()
    answer = httpx.post(url, json=body, headers=headers, timeout=60).json()
    assert not set(answers.HIDDEN) & set(answer)
    assert answer["experts"]["effective"]
    for choice in answer.get("choices", []):
        assert not set(answers.HIDDEN_IN_CHOICE) & set(choice)
    if path == "/v1/responses":
        told = httpx.post(url, json={**body, "stream": True}, headers=headers, timeout=60).text
        for name in answers.HIDDEN:
            assert f'"{name}":' not in told
        assert '"experts":' in told


def test_a_builder_that_would_wait_is_an_error():
    async def waits():
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waits"):
        building._finished(waits)
