import json

import pytest

from expertgate.server import schemas
from expertgate.server.counting import TokenizeChat
from expertgate.server.schemas import ChatRequest, Exclude, TextRequest, read
from tests.server.bodies import chat, refused, response, text


def test_experts_absent_listed_and_excluded():
    assert chat().experts is None
    assert chat(experts=["public", "math"]).experts == ["public", "math"]
    assert chat(experts={"exclude": ["news"]}).experts == Exclude(exclude=["news"])
    assert text(experts=["public"]).experts == ["public"]


@pytest.mark.parametrize(
    "value",
    [
        "public",
        7,
        True,
        [1],
        [None],
        [["public"]],
        {},
        {"include": []},
        {"exclude": "x"},
        {"exclude": ["x"], "also": 1},
    ],
)
def test_malformed_experts_have_their_own_code(value):
    assert refused(chat, experts=value).code == "invalid_experts"


def test_what_is_missing_inside_is_named():
    for name in ("name", "schema"):
        form = {"name": "n", "schema": {"type": "object"}}
        del form[name]
        error = refused(chat, response_format={"type": "json_schema", "json_schema": form})
        assert error.message == f"response_format.json_schema.{name} is missing"
        error = refused(response, text={"format": {"type": "json_schema", **form}})
        assert error.message == f"text.format.{name} is missing"
    for part in ({"type": "text", "txt": "x"}, {"type": "text"}):
        message = {"role": "user", "content": [part]}
        assert refused(chat, messages=[message]).param == "messages[0].content[0].text"
    part = {"role": "user", "content": [{"type": "input_text"}]}
    assert refused(response, input=[part]).param == "input[0].content[0].text"


@pytest.mark.parametrize("name", ["expert", "Experts", "EXPERTS", "extra_body", "expertz"])
def test_a_misspelt_field_is_named(name):
    error = refused(chat, **{name: ["public"]})
    assert name in error.message
    assert error.param == name


def test_a_misspelt_field_gets_a_hint():
    assert "did you mean 'experts'" in refused(chat, expert=["public"]).message
    assert "did you mean 'temperature'" in refused(text, temprature=1).message


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("best_of", "use n"),
        ("functions", "use tools"),
        ("prompt_cache_options", "the server decides"),
        ("reasoning_effort", "no levels"),
        ("web_search_options", "no tool runs here"),
        ("function_call", "use tool_choice"),
        ("length_penalty", "outside the grant"),
        ("metadata", "nothing is stored"),
        ("prediction", "nothing is drafted"),
    ],
)
def test_what_openais_clients_send_and_is_not_here_is_no_slip(field, instead):
    for call in (chat, text):
        error = refused(call, **{field: 1})
        assert (error.param, "did you mean" in error.message) == (field, False)
        assert error.message.startswith(f"{field} can't be set: ")
        assert instead in error.message


def test_a_chat_that_is_not_to_be_stored_is_one():
    assert chat(store=False).store is False
    for call, value in ((chat, True), (chat, 0), (text, False), (text, True)):
        assert refused(call, store=value).param == "store"
    assert "nothing is stored here" in refused(chat, store=True).message


@pytest.mark.parametrize("call", [chat, text, response])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("prompt_cache_key", ["", "k" * 64], ["k" * 65, 5, True, ["k"], {}]),
        ("prompt_cache_retention", ["in_memory", "24h"], ["24H", "1h", "", 24, ["24h"]]),
        ("safety_identifier", ["", "u" * 128], ["u" * 129, 5, False, ["u"], {}]),
        ("service_tier", ["auto", "default", "flex"], ["Flex", "", 1, True, ["auto"], {}]),
    ],
)
def test_hints_of_openais_clients_may_be_anything_that_openai_takes(call, name, right, wrong):
    assert getattr(call(**{name: None}), name) == getattr(call(), name)
    for value in right:
        assert getattr(call(**{name: value}), name) == value
    for value in wrong:
        assert refused(call, **{name: value}).param == name


@pytest.mark.parametrize("tier", ["priority", "fast", "scale", "ultrafast"])
@pytest.mark.parametrize("call", [chat, text, response])
def test_nobody_is_told_in_vain_that_they_go_first(call, tier):
    error = refused(call, service_tier=tier)
    assert (error.param, "all are served alike" in error.message) == ("service_tier", True)


def test_a_long_name_is_told_by_its_beginning_and_never_searched(monkeypatch):
    monkeypatch.setattr(schemas, "difflib", None)
    name = "x" * 500_000
    for error in (
        refused(chat, **{name: 1}),
        refused(chat, messages=[{"role": "user", "content": "", name: 1}]),
    ):
        assert "unknown field" in error.message
        assert (len(error.message), len(error.param)) < (120, 100)
    assert error.param.startswith("messages[0].xx")


@pytest.mark.parametrize("read_one", [chat, text])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm_xargs", {"expertgate_mask": 127}),
        ("vllm_xargs", {"expertgate_grant": "00"}),
        ("vllm_xargs", None),
        ("kv_transfer_params", {"prompt_token_ids": [1]}),
        ("ec_transfer_params", {}),
        ("request_id", "mine"),
        ("session_id", "mine"),
        ("priority", -1),
        ("use_beam_search", True),
        ("use_beam_search", False),
        ("repetition_detection", {}),
        ("logprob_token_ids", None),
        ("structured_outputs", {"regex": "((a*)*)*"}),
        ("prompt_embeds", "AAAA"),
        ("mm_processor_kwargs", {}),
        ("media_io_kwargs", {}),
        ("routed_experts_prompt_start", 0),
        ("watermarking", False),
        ("thinking_token_budget", 1),
    ],
)
def test_fields_that_are_the_servers_are_refused(read_one, name, value):
    error = refused(read_one, **{name: value})
    assert error.param == name


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs", "documents"])
def test_the_template_is_the_servers(name):
    assert refused(chat, **{name: None}).param == name


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"stream": True, "stream_options": {"include_usage": True, "x": 1}}, "stream_options.x"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format.format"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
            "tools[0].function.x",
        ),
    ],
)
def test_fields_of_nested_objects_are_listed_too(fields, place):
    assert refused(chat, **fields).param == place


FLAT = {"type": "function", "name": "f"}
TOOL = {"type": "function", "function": {"name": "f"}}
FORM = {"name": "n", "schema": {}}


@pytest.mark.parametrize("value", ["yes", "true", 1, 0.0, []])
@pytest.mark.parametrize(
    ("call", "place", "fields"),
    [
        (chat, "stream_options.include_usage", lambda v: {"stream_options": {"include_usage": v}}),
        (
            text,
            "stream_options.continuous_usage_stats",
            lambda v: {"stream_options": {"continuous_usage_stats": v}},
        ),
        (
            chat,
            "response_format.json_schema.strict",
            lambda v: {
                "response_format": {"type": "json_schema", "json_schema": FORM | {"strict": v}}
            },
        ),
        (
            chat,
            "tools[1].function.strict",
            lambda v: {"tools": [TOOL, {**TOOL, "function": {"name": "f", "strict": v}}]},
        ),
        (response, "tools[0].strict", lambda v: {"tools": [FLAT | {"strict": v}]}),
        (
            response,
            "text.format.strict",
            lambda v: {"text": {"format": {"type": "json_schema", **FORM, "strict": v}}},
        ),
    ],
)
def test_a_boolean_inside_of_an_object_is_written_as_one_too(call, place, fields, value):
    error = refused(call, stream=True, **fields(value))
    assert (error.message, error.param) == (f"{place} must be true or false", place)


@pytest.mark.parametrize("value", [True, 5, "x", []])
def test_stream_options_are_an_object(value):
    error = refused(chat, stream=True, stream_options=value)
    assert error.message == "stream_options must be an object"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"type": []}]}, "input[0].type"),
        ({"input": [{"type": {}}]}, "input[0].type"),
        ({"tools": 5}, "tools"),
        ({"tools": {"a": []}}, "tools"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": []}}, "tool_choice.name"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": {}}}, "tool_choice.name"),
    ],
)
def test_what_is_looked_at_before_its_type_is_of_that_type(fields, param):
    """By this server, or by vLLM."""
    assert refused(response, **fields).param == param


@pytest.mark.parametrize("wrong", [{}, 5, "x", True, [5], [{}], [{"function": {}}]])
def test_so_are_the_tools_of_a_chat(wrong):
    named = {"type": "function", "function": {"name": "f"}}
    for fields in ({"tools": wrong}, {"tools": wrong, "tool_choice": named}):
        assert refused(chat, **fields).param.startswith("tools")


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ANSWERED = {
    "role": "assistant",
    "content": "a",
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": None,
    "name": None,
    "tool_calls": None,
}


@pytest.mark.parametrize("annotations", [None, []])
def test_an_answers_message_comes_back_as_it_was(annotations):
    asked = [{"role": "user", "content": "a"}, {**ANSWERED, "annotations": annotations}]
    for kind in (ChatRequest, TokenizeChat):
        found = read(kind, json.dumps({"messages": asked}).encode()).messages[1]
        assert found == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("value", [None, {"a": 1}, [1], "a", 5], ids=str)
def test_what_clients_add_to_an_answer_comes_back_unread(value):
    parsed = {**CALL, "function": {**CALL["function"], "parsed_arguments": value}}
    message = {"role": "assistant", "content": None, "tool_calls": [parsed], "parsed": value}
    message["provider_specific_fields"] = value  # LiteLLM's, of what isn't OpenAI's
    found = chat(messages=[message]).messages[0]
    assert found == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert refused(chat, messages=[{**message, "tool_calls": [{**CALL, "parsed": 1}]}])


@pytest.mark.parametrize("kind", [ChatRequest, TokenizeChat])
def test_what_the_reference_lists_of_a_message_is_read(kind):
    """By vLLM `reasoning` alone; a call that a client put together of a stream has its place."""
    said = {"role": "assistant", "content": "a", "refusal": "b", "reasoning": "c"}
    thought = {"role": "assistant", "content": "a", "reasoning_content": "c"}
    both = {**thought, "reasoning": "c", "tool_calls": [{**CALL, "index": 0}]}
    asked = {"messages": [said, thought, both]}
    first, second, third = read(kind, json.dumps(asked).encode()).messages
    assert first == second == {"role": "assistant", "content": "a", "reasoning": "c"}
    assert {**third, "tool_calls": list(third["tool_calls"])} == {**first, "tool_calls": [CALL]}


@pytest.mark.parametrize("wrong", [None, 5, [], {}], ids=str)
@pytest.mark.parametrize("name", ["id", "type", "function", "function.name", "function.arguments"])
@pytest.mark.parametrize("kind", [ChatRequest, TokenizeChat])
def test_what_is_wrong_with_a_call_is_named(kind, name, wrong):
    outer, _, inner = name.partition(".")
    value = {**CALL["function"], inner: wrong} if inner else wrong
    messages = [{"role": "assistant", "tool_calls": [CALL, {**CALL, outer: value}]}]
    error = refused(read, kind, json.dumps({"messages": messages}).encode())
    assert error.param.startswith(f"messages[0].tool_calls[1].{name}")


@pytest.mark.parametrize("kind", [ChatRequest, TokenizeChat])
def test_calls_are_a_list(kind):
    for wrong in ({}, 5, "x", True):
        messages = [{"role": "assistant", "content": "a", "tool_calls": wrong}]
        error = refused(read, kind, json.dumps({"messages": messages}).encode())
        assert error.param == "messages[0].tool_calls"


@pytest.mark.parametrize("value", [{}, [{}], "a", 0, False, {"name": "f", "arguments": "{}"}])
@pytest.mark.parametrize("name", ["annotations", "audio", "function_call"])
def test_what_nobody_would_read_of_it_is_refused(name, value):
    error = refused(chat, messages=[{**ANSWERED, name: value}])
    assert error.param == f"messages[0].{name}"
    assert "must be null" in error.message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "prompt_embeds", "data": ""},
        {"image_url": "http://127.0.0.1/"},
    ],
)
def test_only_parts_of_text_are_read(part):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    error = refused(chat, messages=messages)
    assert error.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "experts": ["public"], "experts": ["math"]}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "user": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "top_k": 99999999999999999999}',
        b'{"prompt": "a", "user": -9223372036854775809}',
        '{"prompt": "a"}'.encode("utf-16"),
        '{"prompt": "a"}'.encode("utf-32-be"),
        '{"prompt": "a"}'.encode("utf-8-sig"),
    ],
)
def test_bytes_that_are_no_request(raw):
    refused(read, TextRequest, raw)


@pytest.mark.parametrize(
    ("read_one", "fields"),
    [
        (chat, {"n": 65}),
        (chat, {"n": 0}),
        (chat, {"n": -1}),
        (text, {"prompt": ["a"] * 33, "n": 2}),
        (text, {"prompt": []}),
        (text, {"prompt": None}),
        (text, {"prompt": [1 << 31]}),
        (text, {"prompt": [[1], [1 << 32]]}),
        (chat, {"n": 2, "temperature": 1, "seed": (1 << 63) - 1}),
        (chat, {"seed": 1 << 63}),
        (chat, {"allowed_token_ids": [1] * 1025}),
        (chat, {"logit_bias": {str(i): 1 for i in range(1025)}}),
        (chat, {"stop_token_ids": [1] * 121, "min_tokens": 1}),
        (chat, {"bad_words": ["word"] * 101}),
        (chat, {"bad_words": ["w" * 501]}),
        (chat, {"stop": ["a"] * 5}),
        (chat, {"stop": "a" * 257}),
        (chat, {"top_k": 1 << 31}),
        (chat, {"min_tokens": 1 << 40}),
        (chat, {"stream_options": {"include_usage": True}}),
        (chat, {"messages": [{"role": "user", "content": None}]}),
    ],
)
def test_limits(read_one, fields):
    refused(read_one, **fields)


def test_what_clients_send_every_day_passes():
    request = chat(
        model="toy",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        tool_choice="none",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=1,
        stop=["\n"],
        logprobs=True,
        top_logprobs=2,
        user="someone",
        cache_salt="mine",
        n=2,
    )
    assert request.n == 2
    assert text(prompt=[[1, 2], [3]], logprobs=1, echo=True).prompt == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (text(prompt="a"), 1),
        (text(prompt="a", n=3), 3),
        (text(prompt=["a", "b"], n=3), 6),
        (text(prompt=[[1, 2], [3]]), 2),
        (text(prompt=[1, 2, 3], n=2), 2),
        (chat(n=3), 3),
        (response(), 1),
    ],
)
def test_each_choice_of_each_prompt_takes_a_place(body, count):
    assert schemas.choices(body) == count
