"""What a body may hold, checked on plain JSON before any model of vLLM's sees it.

Kinds are strict here, as pydantic's are not: it reads `"1000"` and `16384.0` as integers, which
would then have passed every limit unseen, and `"no"` as false, which to others is true. And a long
list of junk is refused by its length or its first item, because pydantic would make several errors
of each.
"""

import json
import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from expertgate.policies.expert_set import MAX_EXPERTS
from expertgate.server.errors import ApiError, bad_request

_MAX_DEPTH = 64
_LONG_LIST = 16
"""From so many entries on, to look whether all are integers costs less than to look at each."""
_INT64_END = 1 << 63
INT32_END = 1 << 31

EXPERTS_FORM = 'experts must be a list of names or {"exclude": [names]}'
MAX_CHOICES = 64
"""`n` times prompts: what one HTTP request may ask of the engine at once."""
MAX_MESSAGES = 1024
_MAX_PARTS = 1024
"""Of all messages, or items, together."""
MAX_TOOLS = 128
_MAX_TOOL_CALLS = 512
"""Of all messages together."""
_MAX_TOKEN_IDS = 1024
"""vLLM's GPU sampler takes so many ids of `allowed_token_ids` or `logit_bias`, and dies of more."""
_MAX_STOP_TOKEN_IDS = 120
"""Likewise of 128, where `min_tokens` is set; those with which the model ends are among them."""
MAX_BAD_WORDS = 128
MAX_BAD_WORD_BYTES = 500
"""Tokenised with and without a leading space, these stay within that sampler's 1,024 tokens."""
MAX_STOPS = 4
"""As OpenAI has it, and vLLM."""
MAX_STOP_CHARS = 256

MAX_SCHEMA_BYTES = 1 << 14
MAX_SCHEMA_PROPERTIES = 200
MAX_SCHEMA_OBJECTS = 10
"""Within one another."""
_MAX_SCHEMA_NESTING = 2 * MAX_SCHEMA_OBJECTS
"""Each object has its `properties`."""
_MAX_SCHEMA_LENGTHS = 16
"""Strings of another length are another automaton, each a tenth of a second of compiling."""
_SCHEMA_BOUNDS = {
    **dict.fromkeys(
        ("minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties"),
        1_000,
    ),
    **dict.fromkeys(("minLength", "maxLength"), 10_000),
}
"""A keyword of JSON Schema that counts, and the most that it may be."""

INTEGERS = (
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens",
    "max_tool_calls",
    "min_tokens",
    "n",
    "prompt_logprobs",
    "seed",
    "stream_interval",
    "top_k",
    "top_logprobs",
    "truncate_prompt_tokens",
)
"""None of these but `seed` is of use beyond 32 bits, which is what the tensors behind them hold."""
INTEGERS_OR_BOOLEANS = ("logprobs",)
_LENGTHS = ("max_completion_tokens", "max_output_tokens")
"""To vLLM they are max_tokens, which it would say instead."""
BOOLEANS = (
    "add_generation_prompt",
    "add_special_tokens",
    "background",
    "continue_final_message",
    "echo",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "parallel_tool_calls",
    "return_token_ids",
    "return_token_strs",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "store",
    "stream",
)
NUMBERS = (
    "frequency_penalty",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
)
TOKEN_IDS = {
    "allowed_token_ids": _MAX_TOKEN_IDS,
    "stop_token_ids": _MAX_STOP_TOKEN_IDS,
}
_MESSAGE_TEXTS = ("name", "reasoning", "reasoning_content", "refusal", "tool_call_id")


def check_values(value: Any, depth: int = 0) -> None:
    """Refuses what JSON allows and code behind stumbles over. Raises ApiError 400.

    Lone surrogates, deep nesting, and numbers that the engine's messages can't carry.
    """
    if depth > _MAX_DEPTH:
        raise bad_request(f"the body is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad_request("the body holds half of a surrogate pair") from None
    elif isinstance(value, int):
        if not -_INT64_END <= value < _INT64_END:
            raise bad_request("the body holds an integer of more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise bad_request("the body holds a number that is too large")
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_values(key, depth)
            check_values(inner, depth + 1)
    elif isinstance(value, list):
        # A prompt may be a quarter of a million token ids, and everybody waits meanwhile.
        long = len(value) > _LONG_LIST and _are_integers(value)
        for inner in (min(value), max(value)) if long else value:
            check_values(inner, depth + 1)


def check_arguments(text: Any, place: str) -> None:
    """Those of a call that a model made, which vLLM and its templates read. Raises ApiError 400."""
    try:
        deep = isinstance(text, str) and _is_deep(json.loads(text), _MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError:
        return  # vLLM takes what is no JSON for none
    if deep:
        raise bad_request(f"{place} is nested more than {_MAX_DEPTH} deep", place)


def _is_deep(value: Any, most: int) -> bool:
    """Whether anything lies more than `most` deep in it. By levels, in a third of the time."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def check_limits(body: Mapping[str, Any]) -> None:
    """Limits on what costs everyone, or what vLLM's GPU sampler dies of. Raises ApiError."""
    _check_numbers(body)
    _check_choices(body)
    _check_words(body)
    _check_experts(body.get("experts"))
    if "messages" in body:
        _check_messages(body["messages"])
    if "input" in body:
        _check_input(body["input"])
    _check_objects("tools", body.get("tools"), MAX_TOOLS)
    _check_grammar(body)


def count_prompts(prompt: Any) -> int:
    """How many there are: a list is one of token ids, or several of either kind."""
    if not isinstance(prompt, list):
        return 1
    if not prompt:
        raise bad_request("prompt is an empty list", "prompt")
    if type(prompt[0]) is int:
        if not _are_token_ids(prompt):
            raise bad_request("prompt must be text, token ids, or a list of either", "prompt")
        return 1
    if len(prompt) > MAX_CHOICES:  # too many, whatever they are
        return len(prompt)
    texts = all(isinstance(item, str) for item in prompt)
    if not texts and not all(isinstance(item, list) and _are_token_ids(item) for item in prompt):
        raise bad_request("prompt must be text, token ids, or a list of either", "prompt")
    return len(prompt)


def _check_numbers(body: Mapping[str, Any]) -> None:
    for name in (*INTEGERS, *INTEGERS_OR_BOOLEANS):
        value = body.get(name)
        if value is None or (name in INTEGERS_OR_BOOLEANS and isinstance(value, bool)):
            continue
        if type(value) is not int:
            raise bad_request(f"{name} must be an integer", name)
        if name != "seed" and not -1 <= value < INT32_END:
            raise bad_request(f"{name} must lie between -1 and {INT32_END - 1}", name)
        if name in _LENGTHS and value < 1:
            raise bad_request(f"{name} must be at least 1", name)
    for name in BOOLEANS:
        if not isinstance(body.get(name), bool | None):
            raise bad_request(f"{name} must be true or false", name)
    for name in NUMBERS:
        if body.get(name) is not None and not _is_number(body[name]):
            raise bad_request(f"{name} must be a number", name)
    for name, most in TOKEN_IDS.items():
        value = body.get(name)
        if isinstance(value, list):
            _check_length(name, value, most)
            if not _are_integers(value):
                raise bad_request(f"{name} must be a list of integers", name)
    bias = body.get("logit_bias")
    if isinstance(bias, dict):
        _check_length("logit_bias", bias, _MAX_TOKEN_IDS)
        if not all(map(_is_number, bias.values())):
            raise bad_request("logit_bias must have numbers as values", "logit_bias")


def _check_choices(body: Mapping[str, Any]) -> None:
    n = body.get("n")
    choices = 1 if n is None else n
    if choices < 1:
        raise bad_request("n must be at least 1", "n")
    prompts = count_prompts(body.get("prompt"))
    if choices * prompts > MAX_CHOICES:
        raise bad_request(f"n times prompts is {choices * prompts}; at most {MAX_CHOICES}", "n")
    seed = body.get("seed")
    # Each choice has a seed of its own, counted on from this one.
    if seed is not None and seed >= _INT64_END - choices:
        raise bad_request("seed, plus n, must lie within 64 bits", "seed")


def _check_words(body: Mapping[str, Any]) -> None:
    words = body.get("bad_words")
    if isinstance(words, list):
        _check_length("bad_words", words, MAX_BAD_WORDS)
        if not all(isinstance(word, str) for word in words):
            raise bad_request("bad_words must be a list of text", "bad_words")
        whole = "".join(f" {word}" for word in words)
        # As a tokenizer may read them that takes letters apart; no more than could pass.
        apart = unicodedata.normalize("NFKD", whole[:MAX_BAD_WORD_BYTES])
        size = max(len(whole.encode()), len(apart.encode()))
        if size > MAX_BAD_WORD_BYTES:
            raise bad_request(
                f"bad_words is {size} bytes; at most {MAX_BAD_WORD_BYTES}", "bad_words"
            )
    stops = body.get("stop")
    if isinstance(stops, list):
        _check_length("stop", stops, MAX_STOPS)
    for stop in stops if isinstance(stops, list) else [stops]:
        if isinstance(stop, str) and len(stop) > MAX_STOP_CHARS:
            raise bad_request(f"a stop string may have at most {MAX_STOP_CHARS} characters", "stop")


def _check_experts(experts: Any) -> None:
    if isinstance(experts, dict) and len(experts) != 1:
        raise ApiError(400, "invalid_experts", EXPERTS_FORM, "experts")
    listed = experts.get("exclude") if isinstance(experts, dict) else experts
    if isinstance(listed, list) and len(listed) > MAX_EXPERTS:
        message = f"experts: has {len(listed)} names; at most {MAX_EXPERTS}"
        raise ApiError(400, "invalid_experts", message, "experts")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise bad_request("messages must be a list of objects", "messages")
    _check_objects("messages", messages, MAX_MESSAGES)
    parts, calls = _MAX_PARTS, _MAX_TOOL_CALLS
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message.get("role"), str):
            raise bad_request(f"{place}.role must be text", f"{place}.role")
        for name in _MESSAGE_TEXTS:
            if not isinstance(message.get(name), str | None):
                raise bad_request(f"{place}.{name} must be text", f"{place}.{name}")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            where = f"{place}.content"
            raise bad_request(f"{where} must be text, or a list of parts of text", where)
        parts -= _check_objects(f"{place}.content", content, parts)
        made = message.get("tool_calls")
        calls -= _check_objects(f"{place}.tool_calls", made, calls)
        for number, call in enumerate(made if isinstance(made, list) else []):
            if isinstance(call.get("function"), dict):
                where = f"{place}.tool_calls[{number}].function.arguments"
                check_arguments(call["function"].get("arguments"), where)


def _check_input(items: Any) -> None:
    if isinstance(items, str):
        return
    if not isinstance(items, list) or not items:
        raise bad_request("input must be text, or a list of objects", "input")
    _check_objects("input", items, MAX_MESSAGES)
    parts = _MAX_PARTS
    for index, item in enumerate(items):
        for name in ("content", "summary"):
            parts -= _check_objects(f"input[{index}].{name}", item.get(name), parts)


def _check_grammar(body: Mapping[str, Any]) -> None:
    """A schema is made into a grammar, for which other requests wait."""
    text = body.get("text")
    for place, form, key in (
        ("response_format", body.get("response_format"), "json_schema"),
        ("text.format", text.get("format") if isinstance(text, dict) else None, "schema"),
    ):
        if not isinstance(form, dict):
            continue
        kind = form.get("type")
        if kind not in (None, "text") and body.get("allowed_token_ids"):
            name = "allowed_token_ids"
            raise bad_request(f"{name} can't go with {place} {kind}", name)
        if key in form:
            _check_schema(form[key], f"{place}.{key}")
    if body.get("tool_choice") != "none" and isinstance(body.get("tools"), list):
        # Together, because where a tool is required all of them make one grammar.
        _check_schema([_parameters(tool) for tool in body["tools"]], "tools")


def _parameters(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function", tool)  # in Responses, a tool is its function
    return function.get("parameters") if isinstance(function, dict) else None


def _check_schema(schema: Any, place: str) -> None:
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > MAX_SCHEMA_BYTES:
        raise bad_request(f"{place} is {size} bytes; at most {MAX_SCHEMA_BYTES}", place)
    # A `$ref` may point anywhere, so anything inside may come to be read as a schema. A property
    # may be called as a keyword is: its value is an object then, never text or a number.
    properties = 0
    lengths: set[tuple[str, ...]] = set()
    reached: list[tuple[Any, int]] = [(schema, -1)]  # what holds it is no part of the schema
    while reached:
        value, depth = reached.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > _MAX_SCHEMA_NESTING:
            raise bad_request(f"{place} is nested more than {_MAX_SCHEMA_NESTING} deep", place)
        if isinstance(value, list):
            reached += [(inner, depth + 1) for inner in value]
            continue
        lengths.add(tuple(str(value.get(key)) for key in ("minLength", "maxLength")))
        if len(lengths) > _MAX_SCHEMA_LENGTHS + 1:  # and that of no length
            message = f"{place} bounds the length of text in more than {_MAX_SCHEMA_LENGTHS} ways"
            raise bad_request(message, place)
        for key, inner in value.items():
            if key == "patternProperties" or (key == "pattern" and isinstance(inner, str)):
                raise bad_request(f"{place}: {key} can't be used here", place)
            if key == "$ref" and isinstance(inner, str) and not f"{inner}/".startswith("#/"):
                # Another one stands for anything, and is written into our log as it is.
                raise bad_request(f"{place}: $ref must lie within the schema, as '#/...'", place)
            most = _SCHEMA_BOUNDS.get(key)
            if most is not None and _is_number(inner) and not 0 <= inner <= most:
                raise bad_request(f"{place}: {key} must lie between 0 and {most}", place)
            if key == "properties" and isinstance(inner, dict):
                properties += len(inner)
            reached.append((inner, depth + 1))
    if properties > MAX_SCHEMA_PROPERTIES:
        raise bad_request(
            f"{place} has {properties} properties; at most {MAX_SCHEMA_PROPERTIES}", place
        )


def _check_objects(place: str, value: Any, most: int) -> int:
    """How many items `value` has, where it is a list, whose items must be objects."""
    if not isinstance(value, list):
        return 0
    _check_length(place, value, most)
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise bad_request(f"{place}[{index}] must be an object", f"{place}[{index}]")
    return len(value)


def _check_length(place: str, value: list[Any] | dict[str, Any], most: int) -> None:
    if len(value) > most:
        raise bad_request(f"{place} has {len(value)} entries; at most {most}", place)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_integers(values: Iterable[Any]) -> bool:
    return set(map(type, values)) <= {int}


def _are_token_ids(values: Collection[Any]) -> bool:
    return _are_integers(values) and (not values or 0 <= min(values) <= max(values) < INT32_END)
