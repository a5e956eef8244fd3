"""What vLLM's own server answers, this one does: the same requests to both, on the same model.

vLLM's has the plug-in and the worker, so that answers are the same to the last bit; which experts
speak is asked of it as no client of this server can, and what it tells besides is left out.
"""

import json
import re
import secrets
import socket
import subprocess
import sys
import time

import httpx
import pytest

from expertgate.model.masks import EXTRA_ARG
from expertgate.policies.expert_set import ExpertSet
from expertgate.server.answers import HIDDEN, HIDDEN_IN_CHOICE
from expertgate.server.engine import _worker
from tests.server.running import EXPERTS, environment
from tests.support import sse

KEY = secrets.token_hex(32)
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKED = [{"role": "user", "content": "Who may consult which expert? 😀"}]
BODIES = {
    CHAT: {"messages": ASKED, "max_tokens": 12, "temperature": 0},
    TEXT: {"prompt": "Which expert? 漢", "max_tokens": 12, "temperature": 0},
    RESPONSES: {"input": ASKED, "max_output_tokens": 12, "temperature": 0},
}
DRAWN = {"temperature": 1.5, "seed": 7}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Malmö 😀"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
CALLED = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
OBJECT = {"type": "json_schema", "json_schema": {"name": "s", "schema": PARAMETERS}}
LONG = {"max_tokens": 40, "logit_bias": {"93": 20, "125": 20}}
"""Enough for an object, and towards its end: else a random model writes blanks for ever."""

SHARED = [
    {},
    {"max_tokens": 1},
    {"n": 3, **DRAWN},
    {"top_p": 0.5, "top_k": 20, "min_p": 0.01, **DRAWN},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    {"logit_bias": {"81": 100}, "stop": "QQQ"},
    {"logit_bias": {"81": 100}, "stop": ["QQ"], "include_stop_str_in_output": True},
    {"logit_bias": {"81": 100}, "stop": ["QQ"], "min_tokens": 5},
    {"logit_bias": {"81": 100}, "stop_token_ids": [81]},
    {"logit_bias": {"256": 100}},
    {"logit_bias": {"256": 100}, "min_tokens": 3},
    {"logit_bias": {"258": 100}, "skip_special_tokens": False, "ignore_eos": True},
    {"allowed_token_ids": [81, 82], **DRAWN},
    {"logit_bias": {"81": 100, "82": 99}, "bad_words": ["Q"]},
    {"return_token_ids": True},
    {"truncate_prompt_tokens": 7, "return_token_ids": True},
    {"truncate_prompt_tokens": 7, "truncation_side": "right", "return_token_ids": True},
    {"echo": True},
    {"stream_interval": 5},
    {"response_format": OBJECT, **LONG},
    {"response_format": {"type": "json_object"}, **LONG},
    {"response_format": {"type": "text"}},
    {"model": "toy", "user": "me", "cache_salt": "mine"},
]
CHATS = [
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3, "n": 2, **DRAWN},
    {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True},
    {"response_format": OBJECT, "logprobs": True, "top_logprobs": 2, **LONG},
    {"max_tokens": None, "max_completion_tokens": 3},
    {"messages": [{"role": "system", "content": "a"}, *ASKED, *ASKED]},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, *ASKED]},
    {"messages": [{"role": "user", "name": "b", "content": ""}]},
    {"messages": [*ASKED, {"role": "assistant", "content": "On", "reasoning": "c"}, *ASKED]},
    {
        "messages": [*ASKED, {"role": "assistant", "content": "On"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "echo": True,
    },
    {"messages": [*ASKED, *CALLED, {"role": "tool", "tool_call_id": "c", "content": "sun"}]},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "required", **LONG},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, **LONG},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": NAMED, **LONG},
    {"tools": [TOOL], "tool_choice": NAMED},
]
TEXTS = [
    {"logprobs": 0},
    {"logprobs": 3, "echo": True},
    {"logprobs": 2, "return_tokens_as_token_ids": True},
    {"prompt": [72, 105]},
    {"prompt": [[72, 105], [33]], "echo": True, "logprobs": 1},
    {"prompt": ["a", "b"], "n": 2, **DRAWN},
    {"prompt": "😀 \u2028 e\u0301", "allowed_token_ids": [172, 253, 246, 222], "logprobs": 1},
]
RESPONDED = [
    {},
    {"max_output_tokens": 1},
    {"instructions": "a", "input": "b", "metadata": {"a": "b"}, "user": "me", "truncation": "auto"},
    {"input": [{"role": "developer", "content": [{"type": "input_text", "text": "a"}]}, *ASKED]},
    {"input": [*ASKED, {"role": "assistant", "content": "On"}, *ASKED], **DRAWN},
    # Of a token that is only a part of a character, vLLM's streams tell no probability, or tell it
    # where it comes together with the next.
    {
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "logit_bias": {"81": 100},
    },
    {"stop": ["QQ"], "logit_bias": {"81": 100}},
    {"logit_bias": {"256": 100}},
    {"text": {"format": {"type": "json_schema", "name": "s", "schema": PARAMETERS}}, **LONG},
    {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto"},
    {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", **LONG},
    {
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "weather"},
        **LONG,
    },
]
REQUESTS = [
    *((path, more) for path in (CHAT, TEXT) for more in SHARED),
    *((CHAT, more) for more in CHATS),
    *((TEXT, more) for more in TEXTS),
    *((RESPONSES, more) for more in RESPONDED),
]
USAGE = {"stream_options": {"include_usage": True}}
RUNNING = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
STREAMED = [
    *((path, {}) for path in (CHAT, TEXT)),
    *((path, {**RUNNING, "logit_bias": {"81": 100}, "n": 2, **DRAWN}) for path in (CHAT, TEXT)),
    *((path, more | ({} if path == RESPONSES else USAGE)) for path, more in REQUESTS),
]
WHOLE = [
    (CHAT, {"prompt_logprobs": 2}),
    (TEXT, {"prompt_logprobs": 2, "prompt": ["ab", "😀"]}),
    *(("/tokenize", body) for body in ({"prompt": "a😀"}, {"messages": ASKED, "tools": [TOOL]})),
    ("/tokenize", {"messages": [*ASKED, *CALLED], "return_token_strs": True}),
    ("/detokenize", {"tokens": [72, 105, 256, 172, 253]}),
]
WRONG = [
    (CHAT, {"messages": []}),
    (CHAT, {"model": "another"}),
    (CHAT, {"temperature": -1}),
    (CHAT, {"max_tokens": 4096}),
    (CHAT, {"top_logprobs": 2}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"tool_choice": "required"}),
    (CHAT, {"continue_final_message": True}),
    (TEXT, {"prompt": ""}),
    (TEXT, {"prompt": [320]}),
    (TEXT, {"prompt": "a" * 3000}),
    (TEXT, {"n": 2}),
    (TEXT, {"response_format": {"type": "xml"}}),
    (RESPONSES, {"input": 5}),
    (RESPONSES, {"previous_response_id": "resp_1"}),
    ("/tokenize", {}),
    ("/detokenize", {"tokens": [-1]}),
]


@pytest.fixture(scope="module")
def stock(server, tmp_path_factory):
    """The URL of vLLM's own server on the checkpoint of `server`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {
        "model": server.folder / "toy",
        "served-model-name": "toy",
        "worker-cls": _worker(),
        "host": "127.0.0.1",
        "port": port,
        "api-key": KEY,
        "max-model-len": 2048,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 1 << 27,
        "structured-outputs-config": '{"backend": "xgrammar"}',
        "tool-call-parser": "olmo3",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    command += ["--enforce-eager", "--enable-auto-tool-choice", "--enable-prompt-tokens-details"]
    quiet = {"VLLM_PLUGINS": "expertgate", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    log = tmp_path_factory.mktemp("stock") / "log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env={**environment(), **quiet}, stdout=said, stderr=said, cwd=log.parent
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 500
        while not _answers(url):
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, log.read_text()[-4000:]
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def both(server, stock):
    """Asks both; gives the answers of this server and of vLLM's."""
    everyone = {"vllm_xargs": {EXTRA_ARG: ExpertSet.first(len(EXPERTS)).mask}}
    with (
        httpx.Client(base_url=server.url, headers=server.headers("alice"), timeout=120) as ours,
        httpx.Client(
            base_url=stock, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
        ) as them,
    ):

        def ask(path, more):
            body = {**BODIES.get(path, {}), **more}
            if path == RESPONSES and "max_tokens" in body:
                body["max_output_tokens"] = body.pop("max_tokens")
            told = everyone if path in BODIES else {}
            return ours.post(path, json=body), them.post(path, json=body | told)

        yield ask


def plain(value, name=""):
    """An answer without what is each server's own, and without what is random in an id."""
    if isinstance(value, dict):
        own = ("experts", *HIDDEN, *HIDDEN_IN_CHOICE)
        return {inner: plain(found, inner) for inner, found in value.items() if inner not in own}
    if isinstance(value, list):
        return [plain(found) for found in value]
    if name in ("created", "created_at"):
        return type(value)
    return re.sub("[0-9a-f]{16,}$", "", value) if name.endswith("id") and value else value


def merged(events):
    """The events of a stream as one, because how many tokens one brings depends on the clock."""
    whole = {}
    for event in events:
        _add(whole, plain(event))
    whole["choices"].sort(key=lambda choice: choice["index"])
    return whole


def _add(whole, part):
    for name, value in part.items():
        known = whole.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            _add(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            for item in value:
                place = item.get("index") if isinstance(item, dict) else None
                same = [found for found in known if place is not None and found["index"] == place]
                _add(same[0], item) if same else known.append(item)
        elif name in ("content", "text", "arguments", "delta") and isinstance(known, str):
            whole[name] = known + (value or "")
        elif value is not None or known is None:
            whole[name] = value


def steps(events):
    """The events of a response; those that bring a piece of the same thing are one."""
    found = []
    for event in events:
        del event["sequence_number"]
        if found and found[-1]["type"] == event["type"]:
            assert event["type"].endswith(".delta")
            _add(found[-1], plain(event))
        else:
            found.append(plain(event))
    return found


@pytest.mark.parametrize(("path", "more"), [*REQUESTS, *WHOLE], ids=str)
def test_an_answer_is_vllms(both, path, more):
    ours, theirs = both(path, more)
    assert (ours.status_code, theirs.status_code) == (200, 200), ours.text + theirs.text
    assert plain(ours.json()) == plain(theirs.json())


@pytest.mark.parametrize(("path", "more"), STREAMED, ids=str)
def test_a_stream_is_vllms(both, path, more):
    answers = both(path, {**more, "stream": True})
    first, second = ([*sse.data(answer)] for answer in answers)
    assert (first[-1] == "[DONE]") == (second[-1] == "[DONE]") == (path != RESPONSES)
    first, second = ([json.loads(e) for e in found if e != "[DONE]"] for found in (first, second))
    if path == RESPONSES:
        assert steps(first) == steps(second)
        return
    assert merged(first) == merged(second)
    if path == CHAT:  # before there is a token, it says whose turn it is
        assert plain(first[0]) == plain(second[0])
    if "stream_options" in more:
        assert plain(first[-1]) == plain(second[-1])
        assert not first[-1]["choices"]


@pytest.mark.parametrize(("path", "more"), WRONG, ids=str)
def test_what_vllm_refuses_is_refused_alike(both, path, more):
    ours, theirs = both(path, more)
    assert 400 <= ours.status_code == theirs.status_code < 500
    assert ours.json()["error"].keys() == theirs.json()["error"].keys()
