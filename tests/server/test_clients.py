"""OpenAI's own client, unmodified, on every route: sync and async, whole and streamed.

And vLLM's own load.
"""

import asyncio
import json
import operator
import subprocess
import sys
from types import NoneType
from typing import get_args, get_type_hints

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Text
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from expertgate.server.responses import ResponsesRequest
from expertgate.server.schemas import ChatRequest, TextRequest
from tests.server.running import Server, environment

STEM = ["public", "math", "code"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["b"]}},
    "required": ["a"],
    "additionalProperties": False,
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TOOL = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
MESSAGES = [{"role": "user", "content": "hi"}]


def client(server: Server, user: str = "dave") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[user], max_retries=0)


def effective(found) -> list[str]:
    return found.model_extra["experts"]["effective"]


def bias(server: Server, text: str) -> dict[str, float]:
    """Towards one character: what a random model writes is seldom text, and seldom ends."""
    body = {"prompt": text, "add_special_tokens": False}
    (token,) = server.post("/tokenize", body).json()["tokens"]
    return {str(token): 100}


# --- what steers sampling ---------------------------------------------------------------------


def test_a_seed_repeats_and_another_does_not(server):
    def text(seed):
        found = client(server).completions.create(
            model="toy", prompt="hi", max_tokens=24, temperature=1.5, seed=seed
        )
        return found.choices[0].text

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_choices_are_several(server):
    found = client(server).completions.create(
        model="toy", prompt="hi", max_tokens=16, temperature=1.5, n=3, seed=1
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert len({choice.text for choice in found.choices}) == 3
    assert effective(found) == STEM


def test_a_bias_of_the_logits_decides(server):
    found = client(server).completions.create(
        model="toy", prompt="hi", max_tokens=5, logit_bias=bias(server, "Q")
    )
    assert found.choices[0].text == "QQQQQ"


def test_a_stop_ends_the_text(server):
    api = client(server)
    ask = {"model": "toy", "prompt": "hi", "temperature": 0, "logit_bias": {"81": 5}}
    whole = api.completions.create(**ask, max_tokens=40).choices[0].text
    stop = whole[3:5]
    found = api.completions.create(**ask, max_tokens=40, stop=[stop]).choices[0]
    assert found.finish_reason == "stop"
    assert found.text == whole[: whole.index(stop)]


def test_probabilities_are_told(server):
    found = client(server).completions.create(
        model="toy", prompt="hi", max_tokens=3, logprobs=4, temperature=0
    )
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
    assert all(probability < 0 for probability in logprobs.token_logprobs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "params", "asked"),
    [
        ("chat.completions", Chat, {"messages": MESSAGES, "max_tokens": 2}),
        ("completions", Text, {"prompt": "hi", "max_tokens": 2}),
        ("responses", ResponseCreateParamsNonStreaming, {"input": "hi", "max_output_tokens": 2}),
    ],
    ids=str,
)
def test_none_is_nothing_wherever_the_client_takes_it(server, path, params, asked, stream):
    types = get_type_hints(params)
    nothing = [name for name in params.__optional_keys__ if NoneType in get_args(types[name])]
    assert "temperature" in nothing
    create = operator.attrgetter(path)(client(server)).create
    found = create(model="toy", **{**dict.fromkeys(nothing), **asked, "stream": stream})
    if not stream:
        assert effective(found) == STEM
    else:
        *_, last = found
        assert effective(last.response if path == "responses" else last) == STEM


@pytest.mark.parametrize("asked", ["auto", "default", "flex"])
def test_no_answer_claims_another_tier_than_that_of_all(server, asked):
    api = client(server)
    chat = api.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=2, service_tier=asked
    )
    ask = {"model": "toy", "input": "hi", "max_output_tokens": 2, "service_tier": asked}
    *_, last = api.responses.create(**ask, stream=True)
    for found in (chat, api.responses.create(**ask), last.response):
        assert found.service_tier in (None, "auto", "default")


# --- structured output and tools --------------------------------------------------------------


def test_chat_of_a_schema(server):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    found = client(server).chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=60, response_format=form, seed=0
    )
    assert json.loads(found.choices[0].message.content) == {"a": "b"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_chat_that_calls_a_tool(server, choice, stream):
    found = client(server).chat.completions.create(
        model="toy",
        messages=MESSAGES,
        max_tokens=200,
        tools=[CHAT_TOOL],
        tool_choice=choice,
        stream=stream,
        seed=0,
        logit_bias=bias(server, "]"),
    )
    if stream:
        calls = [c for chunk in found for c in (chunk.choices[0].delta.tool_calls or [])]
        name = "".join(call.function.name or "" for call in calls)
        arguments = "".join(call.function.arguments or "" for call in calls)
    else:
        assert effective(found) == STEM
        call = found.choices[0].message.tool_calls[0]
        name, arguments = call.function.name, call.function.arguments
    assert name.startswith("weather")
    first, _ = json.JSONDecoder().raw_decode(arguments)
    assert first["city"] in ("Rome", "Oslo")


def test_chat_goes_on_behind_a_tools_answer(server):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    found = client(server).chat.completions.create(
        model="toy",
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
        tools=[CHAT_TOOL],
        max_tokens=4,
    )
    assert effective(found) == STEM


def test_an_answer_goes_back_as_it_came(server):
    api = client(server)
    text = {"extra_body": {"logit_bias": bias(server, "Q")}}
    asked = {"model": "toy", "messages": MESSAGES, "max_tokens": 4, "stop": ["QQ"]}
    said = [api.chat.completions.create(**asked, **text).choices[0].message]
    with api.chat.completions.stream(**asked, **text) as stream:
        said.append(stream.get_final_completion().choices[0].message)
    for message in (*said, *(each.model_dump() for each in said)):
        again = [*MESSAGES, message, {"role": "user", "content": "go on"}]
        found = api.chat.completions.create(model="toy", messages=again, max_tokens=4)
        assert effective(found) == STEM


@pytest.mark.parametrize("calls", [{}, {"tools": [CHAT_TOOL], "tool_choice": "required"}], ids=str)
def test_chat_goes_on_behind_an_answer_as_it_came(server, calls):
    """As examples have it: `messages.append(answer.choices[0].message)`, with all that is null."""
    api = client(server)
    steered = {"seed": 0, "logit_bias": bias(server, "]")}
    first = api.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=200, **calls, **steered
    )
    answer = first.choices[0].message
    made = [{"role": "tool", "tool_call_id": c.id, "content": "a"} for c in answer.tool_calls or []]
    messages = [*MESSAGES, answer, *made]
    again = api.chat.completions.create(model="toy", messages=messages, max_tokens=4)
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


# --- responses ----------------------------------------------------------------------------------


def test_responses(server):
    found = client(server).responses.create(
        model="toy:-code",
        instructions="be brief",
        input="hi",
        max_output_tokens=4,
        temperature=0,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        metadata={"a": "b"},
        extra_body={"logit_bias": bias(server, "Q")},
    )
    assert found.output_text == "QQQQ"
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.output_tokens == 4
    assert len(found.output[0].content[0].logprobs) == 4
    assert found.metadata == {"a": "b"}
    assert effective(found) == ["public", "math"]


def test_a_response_says_what_chat_does(server):
    api = client(server)
    chat = api.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=12, temperature=0)
    found = api.responses.create(model="toy", input="hi", max_output_tokens=12, temperature=0)
    assert found.output_text == chat.choices[0].message.content
    with api.responses.create(
        model="toy", input="hi", max_output_tokens=12, temperature=0, stream=True
    ) as stream:
        events = list(stream)
    assert "".join(e.delta for e in events if e.type.endswith("text.delta")) == found.output_text
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert effective(events[-1].response) == STEM
    assert events[-1].response.usage.output_tokens == 12


def test_a_response_brings_a_receipt_where_one_is_wanted(server):
    body = {"receipt": True}
    assert server.respond("dave", **body).json()["receipt"].count(".") == 2
    with client(server).responses.create(
        model="toy", input="hi", max_output_tokens=2, stream=True, extra_body=body
    ) as stream:
        last = list(stream)[-1]
    assert last.response.model_extra["receipt"].count(".") == 2


def test_a_conversation_is_sent_whole(server):
    api = client(server)
    text = {"logit_bias": bias(server, "Q")}
    first = api.responses.create(model="toy", input="hi", max_output_tokens=4, extra_body=text)
    history = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    for output in (first.output, [item.model_dump() for item in first.output]):
        asked = [*history, *output, {"role": "user", "content": "go on"}]
        again = api.responses.create(model="toy", input=asked, max_output_tokens=4)
        assert again.usage.input_tokens > first.usage.input_tokens


def test_a_response_of_a_schema(server):
    form = {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}
    found = client(server).responses.create(
        model="toy", input="hi", max_output_tokens=60, text={"format": form}, temperature=0
    )
    assert json.loads(found.output_text) == {"a": "b"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=str)
def test_a_response_that_calls_a_tool_and_goes_on(server, choice):
    api = client(server)
    found = api.responses.create(
        model="toy",
        input="hi",
        max_output_tokens=200,
        tools=[TOOL],
        tool_choice=choice,
        extra_body={"logit_bias": bias(server, "]"), "seed": 0},
    )
    call = next(item for item in found.output if item.type == "function_call")
    assert call.name == "weather"
    first, _ = json.JSONDecoder().raw_decode(call.arguments)
    assert first["city"] in ("Rome", "Oslo")
    called = {**call.model_dump(), "arguments": json.dumps(first)}
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = api.responses.create(
        model="toy",
        input=[{"role": "user", "content": "hi"}, called, answer],
        tools=[TOOL],
        tool_choice="none",
        max_output_tokens=4,
    )
    assert effective(again) == STEM


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"input": [{"role": "assistant", "content": []}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": []}]}, "input[0].type"),
        ({"input": [{"type": {}}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
        ({"input": [{"type": "reasoning"}]}, "input[0].summary"),
        ({"max_output_tokens": "4"}, "max_output_tokens"),
        ({"temperature": -1}, None),
        ({"logit_bias": {"320": 1}}, None),
        ({"input": "x" * 3000}, None),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"$ref": "#"}}}}, None),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_response_shows_before_it_begins(server, fields, param, stream):
    response = server.respond("alice", stream=stream, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert param is None or error["param"] == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("min_tokens", 100),
        ("n", 2),
        ("stop", ["a", ""]),
        ("bad_words", [""]),
        ("top_logprobs", 21),
    ],
    ids=str,
)
def test_a_field_that_vllm_refuses_is_named(server, name, value, stream):
    fields = {"temperature": 0, "stream": stream, name: value}
    for ask, kind, more in (
        (server.chat, ChatRequest, {"logprobs": True} if name == "top_logprobs" else {}),
        (server.complete, TextRequest, {}),
        (server.respond, ResponsesRequest, {"include": ["message.output_text.logprobs"]}),
    ):
        if name in kind.fields:
            error = ask("alice", **fields, **more).json()["error"]
            assert (error["code"], error["param"]) == ("invalid_request", name)


# --- async --------------------------------------------------------------------------------------


def test_the_async_client_on_all_routes_at_once(server):
    async def ask():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=server.keys["dave"], max_retries=0
        ) as api:

            async def streamed():
                stream = await api.chat.completions.create(
                    model="toy", messages=MESSAGES, max_tokens=4, stream=True
                )
                return [chunk async for chunk in stream][-1]

            return await asyncio.gather(
                api.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=4),
                api.completions.create(model="toy", prompt="hi", max_tokens=4),
                api.responses.create(model="toy", input="hi", max_output_tokens=4),
                streamed(),
            )

    for found in asyncio.run(ask()):
        assert effective(found) == STEM


# --- counting -----------------------------------------------------------------------------------


def test_text_to_tokens_and_back(server):
    for body in (
        {"prompt": "hello"},
        {"prompt": "hello", "model": "toy"},
        {"prompt": "hello", "model": "toy:-news", "return_token_strs": True},
    ):
        found = server.post("/tokenize", body, "bob").json()
        assert found["count"] == len(found["tokens"]) >= 5
        assert found["max_model_len"] == 2048
    back = server.post("/detokenize", {"tokens": found["tokens"]}, "bob").json()
    assert "hello" in back["prompt"]
    chat = server.post("/tokenize", {"messages": MESSAGES, "tools": [CHAT_TOOL]}).json()
    used = server.chat(messages=MESSAGES).json()["usage"]["prompt_tokens"]
    assert chat["count"] == used


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": ["a", "b"]}, 400),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400),
        ("/tokenize", {"prompt": "hi", "model": "another"}, 404),
        ("/tokenize", {"prompt": "x" * 40_000}, 413),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [320]}, 400),
        ("/detokenize", {"tokens": [True]}, 400),
        ("/detokenize", {"tokens": [1] * 2049}, 400),
        ("/detokenize", {"tokens": [1 << 70]}, 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_counted(server, path, body, status):
    response = server.post(path, body)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_counting_needs_a_key(server):
    for path, body in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [1]})):
        assert server.post(path, body, None).status_code == 401


# --- load ---------------------------------------------------------------------------------------


def test_vllms_own_benchmark(server, tmp_path):
    # What `vllm bench serve` runs; the command itself asks for a version that only the GPU build's
    # package has.
    code = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    command = [sys.executable, "-c", code]
    command += ["--backend", "openai-chat", "--base-url", server.url]
    command += ["--endpoint", "/v1/chat/completions"]
    command += ["--model", "toy", "--tokenizer", str(server.folder / "toy")]
    command += ["--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "8"]
    command += ["--num-prompts", "16", "--max-concurrency", "8", "--ignore-eos"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "found.json"]
    done = subprocess.run(
        command,
        env={**environment(), "OPENAI_API_KEY": server.keys["dave"], "VLLM_PLUGINS": "none"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"]) == (16, 0)
    assert found["total_output_tokens"] == 16 * 8
