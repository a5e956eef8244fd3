"""Request bodies: vLLM's own request models, `experts` added, and only the fields listed here.

vLLM's models accept any field. A misspelt `expert` would then mean "all that are granted", and
`vllm_xargs` or `kv_transfer_params` would reach the engine; so a field that isn't listed is an
error that names it.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMClientError

from expertgate.server.circumstances import Purpose
from expertgate.server.errors import ApiError, bad_request, said_by_vllm
from expertgate.server.limits import EXPERTS_FORM, check_limits, check_values, count_prompts

RECEIPT_HEADER = "X-Receipt"
_SHOWN_CHARS = 64

_TYPES = ("str", "int", "float", "bool", "list", "dict")
"""By which pydantic names the branches of a union that are no models."""


class Exclude(BaseModel):
    """All that are granted but these."""

    model_config = ConfigDict(extra="forbid", strict=True)

    exclude: list[str] = Field(examples=[["news"]])


Experts = Annotated[
    list[str] | Exclude | None,
    Field(
        default=None,
        description=(
            "The experts that may speak: a list names exactly these; `exclude` means all that are "
            "granted but these; absent, all that are granted. What was used is in the response."
        ),
        examples=[["public", "math"], {"exclude": ["news"]}],
    ),
]

Receipt = Annotated[
    StrictBool | None,
    Field(
        default=None,
        description=(
            "Whether the answer brings a signed receipt; a stream, in a last event before [DONE]. "
            f"The same as the header {RECEIPT_HEADER}: 1."
        ),
    ),
]

Tier = Literal["auto", "default", "flex"]
"""Of OpenAI's, those that ask for no more than all get."""


class Hints(BaseModel):
    """What OpenAI's clients and gateways send unasked. It changes no answer, and nobody reads it.

    Not the prefix cache either, which `cache_salt` alone parts further.
    """

    prompt_cache_key: str | None = Field(default=None, max_length=64)
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = Field(default=None, max_length=128)
    service_tier: Tier = "auto"


HINTS = frozenset(Hints.model_fields)

_SHARED_FIELDS = HINTS | frozenset(
    {
        "add_special_tokens",
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "echo",
        "experts",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "presence_penalty",
        "prompt_logprobs",
        "purpose",
        "receipt",
        "repetition_penalty",
        "response_format",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_interval",
        "stream_options",
        "temperature",
        "top_k",
        "top_p",
        "truncate_prompt_tokens",
        "truncation_side",
        "user",
    }
)

# Fields of OpenAI's that a body here doesn't have, with why.
_OPENAIS = {
    "audio": "answers are text alone",
    "best_of": "use n",
    "context_management": "a conversation is sent whole, and read whole",
    "conversation": "nothing is stored here",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "metadata": "nothing is stored here",
    "modalities": "answers are text alone",
    "moderation": "answers are not judged here",
    "prediction": "nothing is drafted from it",
    "prompt_cache_options": "the server decides which prefixes are cached, and how long",
    "reasoning_effort": "the model's template knows no levels of reasoning",
    "store": "nothing is stored here",
    "suffix": "the model only goes on from the end of a text",
    "verbosity": "the model's template knows no levels of it",
    "web_search_options": "no tool runs here",
}
# The same of vLLM's, where the name doesn't say why.
_VLLMS = {
    "chat_template": "the template is the server's",
    "chat_template_kwargs": "the template is the server's",
    "ec_transfer_params": "only the server speaks to the engine's transfers",
    "kv_transfer_params": "only the server speaks to the engine's transfers",
    "length_penalty": "it is for beams, which would run outside the grant of the request",
    "logprob_token_ids": "others in the batch would be told of your tokens, not of theirs",
    "priority": "requests are served in order",
    "prompt_embeds": "a prompt must be text or tokens",
    "repetition_detection": "its cost grows with everyone's step",
    "request_id": "ids are the server's",
    "session_id": "ids are the server's",
    "structured_outputs": "use response_format",
    "use_beam_search": "beams would run outside the grant of the request",
    "vllm_xargs": "only the server speaks to the engine's extensions",
}
_REFUSED = _OPENAIS | _VLLMS

_NULL_IS_NOTHING = {
    *_OPENAIS,
    "background",
    "n",
    "prompt",
    "service_tier",
    "stream_options",
    "truncation",
}
"""Fields that OpenAI's clients send as null for None, and that vLLM has no null for."""

# Nested objects: the path of keys to one, with [] for the items of a list → the keys it may have.
NESTED: Mapping[str, frozenset[str]] = {
    "stream_options": frozenset({"include_usage", "continuous_usage_stats"}),
    "response_format": frozenset({"type", "json_schema"}),
    "response_format.json_schema": frozenset({"name", "description", "schema", "strict"}),
}
NULLS = ("annotations", "audio", "function_call")
"""What an answer's message has besides, null in all of ours. It may come back with it."""
UNREAD = ("index", "parsed", "parsed_arguments", "provider_specific_fields", "refusal")
"""What else comes back with it: the place of a call, and what OpenAI's clients and LiteLLM add."""
MESSAGES: Mapping[str, frozenset[str]] = {
    "messages[]": frozenset(
        {
            *NULLS,
            "parsed",
            "provider_specific_fields",
            "role",
            "content",
            "name",
            "refusal",
            "reasoning",
            "reasoning_content",
            "tool_calls",
            "tool_call_id",
        }
    ),
    "messages[].content[]": frozenset({"type", "text"}),
    "messages[].tool_calls[]": frozenset({"id", "type", "function", "index"}),
    "messages[].tool_calls[].function": frozenset({"name", "arguments", "parsed_arguments"}),
}
TOOLS: Mapping[str, frozenset[str]] = {
    "tool_choice": frozenset({"type", "function"}),
    "tool_choice.function": frozenset({"name"}),
    "tools[]": frozenset({"type", "function"}),
    "tools[].function": frozenset({"name", "description", "parameters", "strict"}),
}
# Of those keys, the ones that are true or false. Kinds are strict, as in `limits`.
_NESTED_BOOLEANS = {
    "stream_options": ("include_usage", "continuous_usage_stats"),
    "response_format.json_schema": ("strict",),
    "text.format": ("strict",),
    "tools[]": ("strict",),
    "tools[].function": ("strict",),
}


class Body(Protocol):
    """A request model of vLLM's, with what this module has to know of it."""

    fields: ClassVar[frozenset[str]]
    """Those that a client may set."""
    required: ClassVar[str | None]
    """The one that a client must set."""
    nested: ClassVar[Mapping[str, frozenset[str]]]
    """The keys that objects inside may have, as `NESTED` gives them."""

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        """What is particular to this body, of plain JSON within the limits. Raises ApiError."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...

    @classmethod
    def model_json_schema(cls, *, ref_template: str) -> dict[str, Any]: ...


class ChatRequest(Hints, ChatCompletionRequest):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = _SHARED_FIELDS | {
        "add_generation_prompt",
        "continue_final_message",
        "max_completion_tokens",
        "messages",
        "parallel_tool_calls",
        "store",
        "tool_choice",
        "tools",
        "top_logprobs",
    }
    required: ClassVar[str | None] = "messages"
    nested: ClassVar[Mapping[str, frozenset[str]]] = {**NESTED, **MESSAGES, **TOOLS}

    experts: Experts = None
    purpose: Purpose = None
    receipt: Receipt = None
    store: Literal[False] | None = False

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        if body.get("store"):
            raise bad_request(f"store can't be set: {_OPENAIS['store']}", "store")
        check_messages(body)
        check_tools(body)
        _check_functions(body)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        return super().model_validate(with_read(obj), **options)


class TextRequest(Hints, CompletionRequest):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = _SHARED_FIELDS | {"prompt"}
    required: ClassVar[str | None] = "prompt"
    nested: ClassVar[Mapping[str, frozenset[str]]] = NESTED

    experts: Experts = None
    purpose: Purpose = None
    receipt: Receipt = None

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        pass


class ExplainRequest(BaseModel):
    """Body of POST /v1/experts/explain."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = frozenset({"experts", "purpose"})
    required: ClassVar[str | None] = None
    nested: ClassVar[Mapping[str, frozenset[str]]] = {}
    model: ClassVar[str | None] = None
    """None of it is asked, so none can be an alias."""

    experts: Experts = None
    purpose: Purpose = None

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        pass


Kind = TypeVar("Kind", bound=Body)


def read(kind: type[Kind], raw: bytes) -> Kind:
    """The request in a body of JSON. Raises ApiError, naming the first thing that's wrong."""
    return check(kind, parse(raw))


def check(kind: type[Kind], body: Mapping[str, Any]) -> Kind:
    """The request in a JSON object. Raises ApiError, naming the first thing that's wrong."""
    body = {k: v for k, v in body.items() if v is not None or k not in _NULL_IS_NOTHING}
    _check_fields(kind, body)
    check_limits(body)
    if body.get("service_tier", "auto") not in get_args(Tier):
        message = f"service_tier must be {', '.join(get_args(Tier))}: all are served alike"
        raise bad_request(message, "service_tier")
    kind.check(body)
    _check_nested(body, kind.nested)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        shown = _furthest(error)
        # A union's or a validator's own name is no part of the place.
        place = ".".join(str(part) for part in shown["loc"] if _is_place(part))
        message = str(shown["msg"]).removeprefix("Value error, ")
        if shown["loc"][:1] == ("experts",):
            raise ApiError(400, "invalid_experts", EXPERTS_FORM, "experts") from None
        raise bad_request(f"{place}: {message}" if place else message, place or None) from None
    except VLLMClientError as error:
        words = said_by_vllm(str(error))
        raise bad_request(words, getattr(error, "parameter", None)) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None


def choices(body: Any) -> int:
    """How many choices a body asks for, over all its prompts."""
    return (getattr(body, "n", None) or 1) * count_prompts(getattr(body, "prompt", None))


def parse(raw: bytes) -> dict[str, Any]:
    """The object that a body of JSON holds. Raises ApiError 400."""
    try:
        # Decoded here: given bytes, json would guess at UTF-16 and UTF-32 as well.
        text = raw.decode("utf-8")
        body = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    check_values(body)
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        # A gateway may have read the first of the two, and this server would read the last.
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:_SHOWN_CHARS]!r} is given twice")
            seen.add(name)
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_fields(kind: type[Body], body: Mapping[str, Any]) -> None:
    for name in body:
        if name not in kind.fields:
            raise _unknown(name, name, kind.fields)
    if kind.required is not None and body.get(kind.required) is None:
        raise bad_request(f"{kind.required} is missing", kind.required)


def check_messages(body: Mapping[str, Any]) -> None:
    """Messages are of text alone: anything else would be fetched. Raises ApiError 400."""
    for place, message in _at(body, "messages[]"):
        for name in NULLS:
            # A list without an entry is how OpenAI says that there are none.
            if message.get(name) is not None and (name, message[name]) != ("annotations", []):
                where = f"{place}.{name}"
                hint = ": calls stand in tool_calls" if name == "function_call" else ""
                raise bad_request(f"{where} must be null{hint}", where)
    for place, part in _at(body, "messages[].content[]"):
        if part.get("type") != "text":
            raise bad_request(f"{place}: only parts of type 'text' can be read", place)
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{place}.text must be text", f"{place}.text")
    for place, message in _at(body, "messages[]"):
        if not isinstance(message.get("tool_calls"), list | None):
            where = f"{place}.tool_calls"
            raise bad_request(f"{where} must be a list", where)
    for place, call in _at(body, "messages[].tool_calls[]"):
        _check_call(call, place)


def _check_call(call: Mapping[str, Any], place: str) -> None:
    """Of one that isn't whole, vLLM's words don't say where it stands. Raises ApiError 400."""
    if call.get("type") != "function":
        raise bad_request(f"{place}.type must be 'function'", f"{place}.type")
    function = call.get("function")
    if not isinstance(function, dict):
        raise bad_request(f"{place}.function must be an object", f"{place}.function")
    for found, where, name in (
        (call, place, "id"),
        (function, f"{place}.function", "name"),
        (function, f"{place}.function", "arguments"),
    ):
        if not isinstance(found.get(name), str):
            raise bad_request(f"{where}.{name} must be text", f"{where}.{name}")


def with_read(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's body that has been checked, without what nobody reads of its messages.

    Nor with nulls: to vLLM's models `name` may be missing, but not null.
    """
    return {**body, "messages": [_message(message) for message in body["messages"]]}


def _message(found: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = _read(found)
    # vLLM's former name for it, which its chat still takes, and its tokenizing doesn't.
    thought = message.pop("reasoning_content", None)
    return message if thought is None else {"reasoning": thought, **message}


def _read(value: Any, name: str = "") -> Any:
    if name in ("", "function") and isinstance(value, dict):
        return {
            inner: _read(found, inner)
            for inner, found in value.items()
            if inner not in (*NULLS, *UNREAD) and (found is not None or inner == "content")
        }
    if name == "tool_calls" and isinstance(value, list):
        return [_read(call) for call in value]
    return value


def check_tools(body: Mapping[str, Any]) -> None:
    """Tools are a list, which vLLM takes them for before it looks. Raises ApiError 400."""
    if not isinstance(body.get("tools"), list | None):
        raise bad_request("tools must be a list", "tools")


def _check_functions(body: Mapping[str, Any]) -> None:
    """What vLLM takes for granted of functions before it looks."""
    for place, tool in _at(body, "tools[]"):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            where = f"{place}.function.name"
            raise bad_request(f"{where} must be text", where)


def _check_nested(body: Mapping[str, Any], nested: Mapping[str, frozenset[str]]) -> None:
    for path, allowed in nested.items():
        for place, found in _at(body, path):
            # What is null in a message or an item that comes back says nothing.
            back = path.startswith(("messages[]", "input[]"))
            for name, value in found.items():
                if name not in allowed and not (back and value is None):
                    raise _unknown(name, f"{place}.{name}", allowed)
    if not isinstance(body.get("stream_options"), dict | None):
        raise bad_request("stream_options must be an object", "stream_options")
    for path, names in _NESTED_BOOLEANS.items():
        for place, found in _at(body, path):
            for name in names:
                if not isinstance(found.get(name), bool | None):
                    where = f"{place}.{name}"
                    raise bad_request(f"{where} must be true or false", where)
    for place in ("response_format", "text.format"):
        for _, form in _at(body, place):
            if form.get("type") not in ("text", "json_object", "json_schema"):
                where = f"{place}.type"
                raise bad_request(f"{where} must be text, json_object or json_schema", where)
    formats = [each for each in _at(body, "text.format") if each[1]["type"] == "json_schema"]
    for place, form in (*_at(body, "response_format.json_schema"), *formats):
        for name in ("name", "schema"):
            if form.get(name) is None:  # vLLM's words for it are of its own insides
                raise bad_request(f"{place}.{name} is missing", f"{place}.{name}")


def _unknown(name: str, place: str, allowed: Iterable[str]) -> ApiError:
    if name in _REFUSED and place == name:
        return bad_request(f"{name} can't be set: {_REFUSED[name]}", place)
    if len(name) > _SHOWN_CHARS:  # it may be a whole body, in which nobody looks for a slip
        place = f"{place.removesuffix(name)}{name[:_SHOWN_CHARS]}…"
        return bad_request(f"unknown field {place!r}", place)
    near = difflib.get_close_matches(name.lower(), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return bad_request(f"unknown field {place!r}{hint}", place)


def _at(value: Any, path: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Every object of `value` at `path`, with its place in words."""
    reached: list[tuple[str, Any]] = [("", value)]
    for step in path.split("."):
        name, items = step.removesuffix("[]"), step.endswith("[]")
        found = [
            (f"{place}.{name}".lstrip("."), inner[name])
            for place, inner in reached
            if isinstance(inner, dict) and name in inner
        ]
        reached = (
            [
                (f"{place}[{index}]", inner)
                for place, listed in found
                if isinstance(listed, list)
                for index, inner in enumerate(listed)
            ]
            if items
            else found
        )
    return [(place, inner) for place, inner in reached if isinstance(inner, dict)]


def _furthest(error: ValidationError) -> Any:
    """Of the errors of a union's many branches, the one that went furthest into the value."""
    return max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))


def _is_place(part: int | str) -> bool:
    """A key or an index; not the branch of a union, which pydantic names by its type."""
    return isinstance(part, int) or (part.islower() and part.isidentifier() and part not in _TYPES)
