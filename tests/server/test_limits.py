import json
import typing

import pytest
from tokenizers import normalizers
from vllm import SamplingParams, envs
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_STOP_TOKEN_IDS

from expertgate.server import limits, schemas
from expertgate.server.counting import TokenizeChat, TokenizeText
from expertgate.server.responses import ResponsesRequest
from expertgate.server.schemas import ChatRequest, TextRequest, read
from tests.server.bodies import CHAT, chat, refused, text
from tests.support.checkpoints import tokenizer

HUGE = 10**300


def schema_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def tools_of(schema):
    return [{"type": "function", "function": {"name": "f", "parameters": schema}}]


def test_stop_tokens_leave_room_for_those_with_which_the_model_ends():
    """Threat d1: vLLM's GPU sampler counts both, and dies of too many."""
    most = limits.TOKEN_IDS["stop_token_ids"]
    params = SamplingParams(stop_token_ids=list(range(most)), min_tokens=1)
    # As the engine does with the tokenizer's and with those of generation_config.json.
    params.update_from_generation_config({"eos_token_id": [1001, 1002]}, eos_token_id=1000)
    assert most < len(params.all_stop_token_ids) <= MAX_NUM_STOP_TOKEN_IDS


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC()])
@pytest.mark.parametrize("letter", ["\U0001d160", "\ufdfa"], ids=ascii)
def test_bad_words_are_measured_as_a_tokenizer_may_read_them(letter, normalizer):
    """Threat d1: vLLM's GPU sampler dies of too many tokens, and a letter may be 33 of them."""
    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizer
    most = 1
    while True:
        try:
            chat(bad_words=[letter * (most + 1)])
        except schemas.ApiError:
            break
        most += 1
    params = SamplingParams(bad_words=[letter * most])
    params.update_from_tokenizer(get_cached_tokenizer(words))
    total = sum(map(len, params.bad_words_token_ids))
    assert 0 < total <= envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [chat, text])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", "1000"),
        ("n", 16384.0),
        ("n", 2.0),
        ("n", True),
        ("max_tokens", "99999999999"),
        ("max_tokens", 1e15),
        ("seed", "9223372036854775807"),
        ("seed", 1.0),
        ("top_k", "99999999999999999999"),
        ("top_k", "9" * 5000),
        ("min_tokens", "1"),
        ("prompt_logprobs", "1"),
        ("truncate_prompt_tokens", "1"),
        ("logprobs", "1"),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", ["99999999999999999999"]),
        ("allowed_token_ids", [1.0]),
        ("temperature", "nan"),
        ("temperature", "0.5"),
        ("top_p", "Infinity"),
        ("min_p", True),
        ("presence_penalty", []),
        ("logit_bias", {"1": "nan"}),
        ("logit_bias", {"1": "inf"}),
    ],
)
def test_a_number_is_written_as_one(ask, name, value):
    assert refused(ask, **{name: value}).param == name


@pytest.mark.parametrize(
    "prompt",
    [["1", 2], [1, "2"], [1.0], [True], [[1], "a"], [["99999999999999999999"]], [-1], [{}], [None]],
    ids=str,
)
def test_a_prompt_is_text_or_token_ids(prompt):
    assert refused(text, prompt=prompt).param == "prompt"


@pytest.mark.parametrize("kind", [ChatRequest, TextRequest])
def test_every_field_that_may_hold_a_number_is_checked(kind):
    """vLLM's models read text as numbers, so a field that isn't listed would have no limit."""
    listed = {
        *limits.INTEGERS,
        *limits.INTEGERS_OR_BOOLEANS,
        *limits.NUMBERS,
        *limits.TOKEN_IDS,
        "logit_bias",
        "prompt",
    }
    for name in kind.fields - listed:
        hints = typing.get_type_hints(kind, include_extras=False)
        assert not {"int", "float"} & set(_names(hints[name])), name


@pytest.mark.parametrize(
    "kind", [ChatRequest, TextRequest, ResponsesRequest, TokenizeText, TokenizeChat]
)
def test_every_field_that_may_be_true_is_checked(kind):
    listed = {*limits.BOOLEANS, *limits.INTEGERS_OR_BOOLEANS, "receipt"}  # which is strict itself
    hints = typing.get_type_hints(kind, include_extras=False)
    assert {name for name in kind.fields if "bool" in _names(hints[name])} <= listed


@pytest.mark.parametrize("value", ["yes", "true", "false", 1, 0, 1.0, []])
def test_a_boolean_is_written_as_one(value):
    # To whatever stands in front of the server, "no" may be true.
    for ask, name in ((chat, "stream"), (text, "echo"), (text, "ignore_eos")):
        assert refused(ask, **{name: value}).param == name
    error = refused(chat, parallel_tool_calls=value)
    assert error.message == "parallel_tool_calls must be true or false"
    assert text(stream=None, echo=False)


@pytest.mark.parametrize("value", [0, -1])
def test_a_length_is_told_by_the_name_that_was_sent(value):
    error = refused(read, ResponsesRequest, json.dumps({"input": "a", LONG[1]: value}).encode())
    assert (error.param, error.message) == (LONG[1], f"{LONG[1]} must be at least 1")
    assert refused(chat, **{LONG[0]: value}).param == LONG[0]


LONG = ("max_completion_tokens", "max_output_tokens")


def _names(hint):
    inner = typing.get_args(hint)
    return [n for part in inner for n in _names(part)] if inner else [getattr(hint, "__name__", "")]


@pytest.mark.parametrize("value", [HUGE, -HUGE, 1 << 63])
def test_an_integer_of_more_than_64_bits_reaches_no_engine(value):
    refused(chat, response_format=schema_of({"const": value}))
    refused(chat, tools=tools_of({"enum": [1, value]}), tool_choice="none")
    refused(text, seed=value)
    for others in (
        [],
        [1, 2],
        [1] * 40,
        [*range(40), True],
        [1, True, "a", 0.5],
    ):  # where it stands shouldn't matter
        for place in range(len(others) + 1):
            listed = [*others[:place], value, *others[place:]]
            assert "64 bits" in refused(chat, metadata=listed).message


def test_a_list_of_integers_is_as_deep_as_any():
    def nested(inner, depth):
        return inner if depth == 0 else [nested(inner, depth - 1)]

    for inner in ([1, 2], [1] * 40, [], ["a"], [1, "a"]):
        for depth in (62, 63, 64):
            message = refused(chat, metadata=nested(inner, depth)).message
            # The body is one level, and what is in the innermost list another.
            assert ("nested" in message) == (depth + bool(inner) > 63), (inner, depth)


@pytest.fixture
def unread(monkeypatch):
    """Fails where a model of vLLM's, which makes errors of each item, sees a body."""

    def read(_):
        raise AssertionError("it was read")

    for kind in (ChatRequest, TextRequest, TokenizeChat):
        monkeypatch.setattr(kind, "model_validate", read)


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "fields"),
    [
        (chat, {"messages": [{}] * 100_000}),
        (chat, {"messages": [{"role": "user", "content": ""}] * 1025}),
        (chat, {"messages": [[]] * 100}),
        (chat, {"messages": [{"role": "user", "content": [[]] * 100_000}]}),
        (chat, {"messages": [{"role": "user", "content": ["a"]}]}),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]}),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 600}] * 2},
        ),
        (chat, {"messages": [{"role": "user", "content": {}}]}),
        (chat, {"messages": [{"role": "user", "content": 5}]}),
        (chat, {"messages": [{"role": None, "content": "a"}]}),
        (chat, {"messages": [{"role": 5, "content": "a"}]}),
        (chat, {"messages": [{"role": "user", "content": "a", "name": [{}] * 10_000}]}),
        (chat, {"messages": [{"role": "assistant", "tool_calls": [[]] * 100_000}]}),
        (chat, {"messages": [{"role": "assistant", "tool_calls": [{}] * 513}]}),
        (chat, {"messages": {"role": "user"}}),
        (chat, {"messages": "hi"}),
        (chat, {"tools": [[]] * 100_000}),
        (chat, {"tools": [{}] * 129}),
        (chat, {"tools": [1]}),
        (chat, {"tool_choice": {"type": "function", "function": {"name": "f", "x": 1}}}),
        (chat, {"bad_words": [[]] * 100_000}),
        (chat, {"bad_words": [""] * 129}),
        (chat, {"bad_words": [1]}),
        (chat, {"stop": [[]] * 100_000}),
        (chat, {"stop_token_ids": [[]] * 100_000}),
        (chat, {"logit_bias": {str(i): [] for i in range(1024)}}),
        (text, {"prompt": [{}] * 100_000}),
        (text, {"prompt": [-1] * 100_000}),
        (text, {"prompt": [[-1] * 100_000]}),
        (text, {"prompt": [""] * 100_000}),
    ],
)
def test_junk_is_refused_before_a_model_reads_it(unread, ask, fields):
    error = refused(ask, **fields)
    assert error.code == "invalid_request"
    assert error.param


@pytest.mark.parametrize(
    "experts",
    [
        [[]] * 100_000,
        {"exclude": [1] * 100_000},
        ["a"] * 65,
        {str(name): [] for name in range(80_000)},
    ],
    ids=lambda experts: str(experts)[:20],
)
def test_many_experts_are_refused_before_a_model_reads_them(unread, experts):
    assert refused(chat, experts=experts).code == "invalid_experts"


class Name(str):
    """Counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other):
        Name.compared += 1
        return str(self) == str(other)

    __hash__ = str.__hash__


def test_the_name_that_is_given_twice_is_found_in_one_pass():
    names = [Name(n) for n in range(5_000)]
    Name.compared = 0
    with pytest.raises(ValueError, match="'4999' is given twice"):
        schemas._object([(name, 1) for name in [*names, Name("4999")]])
    assert Name.compared < len(names)  # and not each with every other
    error = refused(read, TextRequest, b'{"prompt":"a","user":"b","user":"c"}')
    assert "'user' is given twice" in error.message


@pytest.mark.parametrize("kind", [ChatRequest, TokenizeChat])
def test_arguments_of_a_call_are_no_deeper_than_a_body(unread, kind):
    def body(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        made = {"role": "assistant", "tool_calls": [call]}
        return json.dumps({"messages": [*CHAT["messages"], made]}).encode()

    for deep in (
        "[" * 200_000,
        "[" * 66 + "]" * 66,
        "[" * 65 + "1" + "]" * 65,
        '{"a":' * 66 + "1" + "}" * 66,
    ):
        error = refused(read, kind, body(deep))
        assert error.param == "messages[1].tool_calls[0].function.arguments"
    for plain in ("", "no JSON", '{"a": ' + "1" * 5000 + "}", "[" * 65 + "]" * 65, '"x"'):
        with pytest.raises(AssertionError, match="it was read"):
            read(kind, body(plain))


def test_as_much_as_is_allowed_passes():
    part = {"type": "text", "text": "a"}
    assert chat(messages=[{"role": "user", "content": [part]}] * 1024)
    assert text(prompt=["a"] * 64)
    assert text(prompt=[[1]] * 32, n=2)
    assert text(logit_bias={"1": -100, "2": 0.5}, temperature=0, top_k=-1, logprobs=None)
    assert chat(logprobs=True, top_logprobs=0, seed=-(1 << 63))


# --- schemas --------------------------------------------------------------------------------------


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD_SCHEMAS = [
    {"type": "string", "pattern": "\\p{L}"},
    {"type": "string", "pattern": "((a*)*)*"},
    {"patternProperties": {"(": {}}},
    {"anyOf": [{"items": {"pattern": "a"}}]},
    {"$defs": {"a": {"pattern": "a"}}, "$ref": "#/$defs/a"},
    # A reference may make a schema of what looks like data, or like properties.
    {"const": {"pattern": "a"}, "$ref": "#/const"},
    {"properties": {"pattern": "a"}, "$ref": "#/properties"},
    {"$ref": "https://example.com/schema"},
    {"items": {"$ref": "#a"}},
    {"$ref": "#\n"},
    {"type": "array", "minItems": 10**6},
    {"type": "array", "maxItems": 1e9},
    {"type": "string", "minLength": -5},
    {"type": "string", "maxLength": 10**5},
    {"type": "object", "minProperties": 10**5},
    {"properties": {f"p{n}": {} for n in range(201)}},
    {"anyOf": [{"type": "string", "maxLength": 100 + n} for n in range(17)]},
    {"enum": ["x" * 17_000]},
    nested(11),
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda schema: str(schema)[:40])
def test_a_schema_is_bounded_wherever_it_stands(schema):
    refused(chat, response_format=schema_of(schema))
    refused(text, response_format=schema_of(schema))
    refused(chat, tools=tools_of(schema), tool_choice="required")
    refused(chat, tools=tools_of(schema))
    # Where it is only a part of the prompt, it is the template's.
    assert chat(tools=tools_of(schema), tool_choice="none")


@pytest.mark.parametrize(
    "schema",
    [
        nested(10),
        {"properties": {"pattern": {"type": "string"}, "minItems": {"type": "integer"}}},
        {"properties": {f"p{n}": {"type": "string", "maxLength": 10_000} for n in range(200)}},
        {"anyOf": [{"type": "string", "maxLength": 100 + n} for n in range(16)]},
        {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 1, "maxItems": 1000},
        {"$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "$ref": "#/$defs/a"},
        {"properties": {"$ref": {"type": "string"}}},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_schemas_of_every_day_pass(schema):
    assert chat(response_format=schema_of(schema))
    assert chat(tools=tools_of(schema), tool_choice="required")


def test_a_schema_and_chosen_tokens_are_two_masters():
    error = refused(text, response_format={"type": "json_object"}, allowed_token_ids=[1])
    assert error.param == "allowed_token_ids"
    assert text(response_format={"type": "text"}, allowed_token_ids=[1])
