"""The JSON schemas of request bodies: vLLM's own, narrowed to what this server takes of them.

vLLM's schemas allow more than is read here (images, tools that run on servers, grammars), and say
little of what a field does. A field that is not listed here is described as vLLM describes it.
"""

from collections.abc import Mapping
from typing import Any, get_args

from expertgate.policies.expert_set import MAX_EXPERTS
from expertgate.server import limits
from expertgate.server.logprobs import MAX_HELD_LOGPROBS, MAX_LOGPROBS
from expertgate.server.openapi.references import REFERENCE, Schema, reference
from expertgate.server.response_items import NULLS, ROLES, STATUSES
from expertgate.server.responses import MAX_METADATA, ResponsesRequest
from expertgate.server.schemas import Body, Tier

_SCHEMA_KIB = limits.MAX_SCHEMA_BYTES >> 10
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_BOOLEAN: Schema = {"type": "boolean"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list_of(items: Schema, most: int | None = None, **more: Any) -> Schema:
    bound = {} if most is None else {"maxItems": most}
    return {"type": "array", "items": items, **bound, **more}


def _integer(least: int, most: int = limits.INT32_END - 1) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _reasoned(kind: str) -> Schema:
    return _object(("type", "text"), type=_one_of(kind), text=_TEXT)


# --- objects inside of bodies ---------------------------------------------------------------------

_FUNCTION = {
    "name": _TEXT,
    "description": _or_null(_TEXT),
    "parameters": _or_null(
        {**_OBJECT, "description": "JSON Schema of the arguments, bounded as `response_format` is."}
    ),
    "strict": _or_null(_BOOLEAN),
}
_UNREAD = {
    **_or_null(_list_of({})),
    "description": "Of an assistant's part alone, as the answer had it; nobody reads it.",
}
_ADDED: Schema = {"description": "What a client added to an answer; nobody reads it."}
_NULL: Schema = {"type": "null"}
_CALL_NULLS = {name: _NULL for name in NULLS if name != "phase"}
_STATUS = _or_null(_one_of(*STATUSES))
_CALLED = {"name": _TEXT, "arguments": {**_TEXT, "description": "JSON, as the model wrote it."}}

COMPONENTS: Mapping[str, Schema] = {
    "Exclude": {
        **_object(("exclude",), exclude=_list_of(_TEXT, MAX_EXPERTS)),
        "description": "All that are granted but these.",
        "examples": [{"exclude": ["news"]}],
    },
    "TextPart": _object(("type", "text"), type=_one_of("text"), text=_TEXT),
    "MessageToolCall": _object(
        ("id", "type", "function"),
        id=_TEXT,
        type=_one_of("function"),
        index={"type": "integer"},
        function=_object(("name", "arguments"), **_CALLED, parsed_arguments=_ADDED),
    ),
    "Message": {
        **_object(
            ("role",),
            role={**_TEXT, "description": "`system`, `user`, `assistant`, `tool`, ..."},
            content=_or_null({"anyOf": [_TEXT, _list_of(reference("TextPart"))]}),
            name=_or_null(_TEXT),
            annotations=_or_null(_list_of({}, 0)),
            audio=_NULL,
            function_call=_NULL,
            parsed=_ADDED,
            provider_specific_fields=_ADDED,
            refusal=_or_null(_TEXT),
            reasoning=_or_null(_TEXT),
            reasoning_content=_or_null(_TEXT),
            tool_calls=_or_null(_list_of(reference("MessageToolCall"))),
            tool_call_id=_or_null(_TEXT),
        ),
        "examples": [{"role": "user", "content": "hi"}],
    },
    "Tool": _object(
        ("type", "function"),
        type=_one_of("function"),
        function=_object(("name",), **_FUNCTION),
    ),
    "ToolChoice": _object(
        ("type", "function"),
        type=_one_of("function"),
        function=_object(("name",), name=_TEXT),
    ),
    "StreamOptions": _object(
        include_usage={
            **_or_null(_BOOLEAN),
            "description": "Whether a last event, without choices, brings `usage` and `experts`.",
        },
        continuous_usage_stats={
            **_or_null(_BOOLEAN),
            "description": "Whether every event brings the `usage` so far.",
        },
    ),
    "ResponseFormat": {
        **_object(
            ("type",),
            type=_one_of("text", "json_object", "json_schema"),
            json_schema=_or_null(
                _object(
                    ("name", "schema"),
                    name=_TEXT,
                    description=_or_null(_TEXT),
                    schema={"type": "object"},
                    strict=_or_null(_BOOLEAN),
                )
            ),
        ),
        "description": (
            f"A schema has at most {_SCHEMA_KIB} KiB, {limits.MAX_SCHEMA_PROPERTIES} properties, "
            f"{limits.MAX_SCHEMA_OBJECTS} levels of objects and no `pattern`; a `$ref` lies within "
            "it, as `#/...`."
        ),
    },
    "InputItem": {
        "description": "One item of a conversation, by its `type`.",
        "anyOf": [
            _object(
                ("role", "content"),
                type=_one_of("message"),
                role=_one_of(*ROLES),
                content={
                    "anyOf": [
                        _TEXT,
                        _list_of(
                            _object(
                                ("type", "text"),
                                type=_one_of("input_text", "output_text"),
                                text=_TEXT,
                                annotations=_UNREAD,
                                logprobs=_UNREAD,
                            ),
                            minItems=1,
                        ),
                    ]
                },
                id=_or_null(_TEXT),
                status=_STATUS,
                phase=_NULL,
            ),
            _object(
                ("type", "call_id", "name", "arguments"),
                type=_one_of("function_call"),
                call_id=_TEXT,
                id=_or_null(_TEXT),
                status=_STATUS,
                **_CALL_NULLS,
                **_CALLED,
            ),
            _object(
                ("type", "call_id", "output"),
                type=_one_of("function_call_output"),
                call_id=_TEXT,
                output=_TEXT,
                id=_or_null(_TEXT),
                status=_STATUS,
            ),
            _object(
                ("type", "summary"),
                type=_one_of("reasoning"),
                id=_or_null(_TEXT),
                summary=_list_of(_reasoned("summary_text")),
                content=_or_null(_list_of(_reasoned("reasoning_text"))),
                encrypted_content=_or_null(_TEXT),
                status=_STATUS,
            ),
        ],
    },
    "ResponsesTool": _object(("type", "name"), type=_one_of("function"), **_FUNCTION),
    "ResponsesToolChoice": _object(("type", "name"), type=_one_of("function"), name=_TEXT),
    "TextConfig": _object(
        format=_or_null(
            _object(
                ("type",),
                type=_one_of("text", "json_object", "json_schema"),
                name=_TEXT,
                description=_or_null(_TEXT),
                schema=_OBJECT,
                strict=_or_null(_BOOLEAN),
            )
        ),
        verbosity=_or_null(_one_of("low", "medium", "high")),
    ),
    "Reasoning": _object(
        effort=_or_null(_TEXT),
        summary=_or_null(_one_of("auto", "concise", "detailed")),
    ),
}
"""What fields hold, of which vLLM's own schemas allow more."""

# --- fields ---------------------------------------------------------------------------------------

_TOKEN_ID = _integer(0)
_NARROWED: Mapping[str, Schema] = {
    "allowed_token_ids": _or_null(_list_of(_TOKEN_ID, limits.TOKEN_IDS["allowed_token_ids"])),
    "bad_words": _list_of(_TEXT, limits.MAX_BAD_WORDS),
    "cache_salt": _or_null({"type": "string", "pattern": "^[^@/\\\\\\0]{1,128}$"}),
    "experts": {"anyOf": [_list_of(_TEXT, MAX_EXPERTS), reference("Exclude"), {"type": "null"}]},
    "frequency_penalty": _or_null({"type": "number", "minimum": -2, "maximum": 2}),
    "logit_bias": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number"},
            "maxProperties": limits.TOKEN_IDS["allowed_token_ids"],
        }
    ),
    "max_completion_tokens": _or_null(_integer(1)),
    "max_output_tokens": _or_null(_integer(1)),
    "max_tokens": _or_null(_integer(1)),
    "max_tool_calls": _or_null(_integer(-1)),
    "messages": _list_of(reference("Message"), limits.MAX_MESSAGES),
    "min_p": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
    "min_tokens": _integer(0),
    "n": _or_null(_integer(1, limits.MAX_CHOICES)),
    "presence_penalty": _or_null({"type": "number", "minimum": -2, "maximum": 2}),
    "prompt_logprobs": _or_null(_integer(-1)),
    "purpose": _or_null({"type": "string", "pattern": "^[ -~]{1,256}$"}),
    "repetition_penalty": _or_null({"type": "number", "exclusiveMinimum": 0}),
    "response_format": _or_null(reference("ResponseFormat")),
    "service_tier": _or_null(_one_of(*get_args(Tier))),
    "stop": _or_null(
        {
            "anyOf": [
                {"type": "string", "maxLength": limits.MAX_STOP_CHARS},
                _list_of({"type": "string", "maxLength": limits.MAX_STOP_CHARS}, limits.MAX_STOPS),
            ]
        }
    ),
    "stop_token_ids": _or_null(_list_of(_TOKEN_ID, limits.TOKEN_IDS["stop_token_ids"])),
    "stream_interval": _or_null(_integer(1)),
    "stream_options": _or_null(reference("StreamOptions")),
    "temperature": _or_null({"type": "number", "minimum": 0, "maximum": 2}),
    "tool_choice": _or_null(
        {"anyOf": [_one_of("none", "auto", "required"), reference("ToolChoice")]}
    ),
    "tools": _or_null(_list_of(reference("Tool"), limits.MAX_TOOLS)),
    "top_k": _or_null(_integer(-1)),
    "top_logprobs": _or_null(_integer(-1)),
    "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "truncate_prompt_tokens": _or_null(_integer(-1)),
    "user": _or_null(_TEXT),
}
_NARROWED_IN_RESPONSES: Mapping[str, Schema] = {
    "background": _or_null({"const": False}),
    "input": {"anyOf": [_TEXT, _list_of(reference("InputItem"), limits.MAX_MESSAGES, minItems=1)]},
    "metadata": _or_null({**_OBJECT, "additionalProperties": _TEXT, "maxProperties": MAX_METADATA}),
    "previous_response_id": {"type": "null"},
    "reasoning": _or_null(reference("Reasoning")),
    "text": _or_null(reference("TextConfig")),
    "tool_choice": {
        "anyOf": [_one_of("none", "auto", "required"), reference("ResponsesToolChoice")]
    },
    "tools": _list_of(reference("ResponsesTool"), limits.MAX_TOOLS),
}

_ROOM = (
    "Absent, what `max_new_tokens` of the model's `generation_config.json` says, or as many as it "
    "has room for."
)

_MANY = (
    f"Several choices may have {MAX_HELD_LOGPROBS} in all tokens of theirs, with the tokens' own. "
    "Of more than 20, where the server's `max_logprobs` allows it, there are at most "
    f"{MAX_LOGPROBS} in all tokens that the choices may have, with those along the prompts."
)

DESCRIPTIONS: Mapping[str, str] = {
    "add_generation_prompt": "Whether the template opens the assistant's turn after the messages.",
    "add_special_tokens": "Whether the tokenizer adds its own tokens, such as one for the start.",
    "allowed_token_ids": "Only these tokens may be generated.",
    "background": "Nothing is stored here, so there is nothing to fetch later.",
    "bad_words": (
        f"Text that may not be generated; {limits.MAX_BAD_WORD_BYTES} bytes in all, as NFKD."
    ),
    "cache_salt": (
        "Parts the prefix cache further. It is never shared between principals or sets of experts; "
        "with this, only requests of the same salt share it. 1 to 128 characters without "
        "`@`, `/`, `\\` and NUL."
    ),
    "continue_final_message": (
        "Whether the last message is left open for the model to go on with; not together with "
        "`add_generation_prompt`."
    ),
    "echo": "Whether the answer begins with what was asked.",
    "frequency_penalty": "Makes tokens less likely by how often they are there already.",
    "ignore_eos": "Whether generation goes on past the model's own end.",
    "include": "Which further parts of the output are wanted.",
    "include_reasoning": "Whether the answer shows reasoning, where the model writes some.",
    "include_stop_str_in_output": "Whether the text that stopped it is in the answer.",
    "input": "What is asked: text, or the whole conversation so far; nothing of it is stored.",
    "instructions": "A system message before the input.",
    "logit_bias": "By token id, what is added to its logit.",
    "logprobs": f"The log probabilities of generated tokens: whether, or of how many. {_MANY}",
    "max_completion_tokens": f"How many tokens each choice may have. {_ROOM}",
    "max_output_tokens": f"How many tokens the answer may have. {_ROOM}",
    "max_tokens": "How many tokens each choice may have.",
    "max_tool_calls": "Taken for compatibility; no tool runs here.",
    "messages": "The conversation; parts of text alone.",
    "metadata": f"At most {MAX_METADATA} texts, which go back with the response.",
    "min_p": "The least probability of a token, as a part of the most likely one's.",
    "min_tokens": "How many tokens are generated before anything may stop it.",
    "model": (
        "The model's name, or an alias that names experts: `NAME:public+math`, `NAME:-news`. "
        "Absent, the one that there is."
    ),
    "n": (
        "How many choices for each prompt; with the prompts, at most "
        f"{limits.MAX_CHOICES} in all, and with `temperature` 0 one."
    ),
    "parallel_tool_calls": "Whether one answer may call several tools.",
    "presence_penalty": "Makes tokens less likely that are there already.",
    "previous_response_id": "Nothing is stored here: send the whole conversation as `input`.",
    "prompt": "What is asked: text or, where the type admits it, token ids or a list of either.",
    "prompt_cache_key": "Taken for compatibility; `cache_salt` parts the prefix cache.",
    "prompt_cache_retention": (
        "Taken for compatibility; a prefix stays in memory alone, until its room is needed."
    ),
    "prompt_logprobs": (
        "Of how many tokens log probabilities are given, along the prompt. With the prompt's own, "
        f"of all prompts and choices together, at most {MAX_LOGPROBS}."
    ),
    "reasoning": "Taken where the model reasons.",
    "repetition_penalty": "Above 1 makes tokens of prompt and answer less likely, below 1 more.",
    "response_format": "What the text has to be; a JSON Schema is followed.",
    "return_token_ids": "Whether token ids stand beside the text.",
    "return_token_strs": "Whether each token's text is given.",
    "return_tokens_as_token_ids": "Whether log probabilities name tokens as `token_id:ID`.",
    "safety_identifier": "Taken for compatibility; who asks is told by the credential.",
    "seed": "Of the sampling, so that it can be repeated.",
    "service_tier": "Taken for compatibility; all are served alike.",
    "skip_special_tokens": "Whether the tokenizer's own tokens are left out of the text.",
    "spaces_between_special_tokens": "Whether they have spaces between them, where they are shown.",
    "stop": "Text that ends generation.",
    "stop_token_ids": "Tokens that end generation.",
    "store": "Taken for compatibility; nothing is stored.",
    "stream": "Whether the answer comes as server-sent events.",
    "stream_interval": "How many tokens make one event.",
    "stream_options": "Only with `stream`.",
    "temperature": (
        "0 always takes the likeliest token. Absent, what the model's `generation_config.json` "
        "says, or 1."
    ),
    "text": "What the text has to be; a JSON Schema is followed.",
    "tokens": "Token ids of the model's vocabulary, no more than the model can read at once.",
    "tool_choice": "Whether, or which, tool is called.",
    "tools": (
        f"Functions that the model may call; their schemas together have at most {_SCHEMA_KIB} KiB."
    ),
    "top_k": "How many of the likeliest tokens are drawn from; 0 or -1 for all.",
    "top_logprobs": f"Of how many other tokens log probabilities are given. {_MANY}",
    "top_p": "The likeliest tokens of this probability together are drawn from.",
    "truncate_prompt_tokens": "Cuts the prompt to so many tokens; -1 to what the model can read.",
    "truncation": "Whether input that is too long is cut.",
    "truncation_side": "Which end a cut prompt loses.",
    "user": "Taken for compatibility; who asks is told by the credential.",
}
"""What a field does."""


def schema(kind: type[Body]) -> Schema:
    """The JSON schema of a body, with the fields that are accepted and no others."""
    found = plain(kind.model_json_schema(ref_template=f"{REFERENCE}{{model}}"))
    narrowed = {**_NARROWED, **(_NARROWED_IN_RESPONSES if kind is ResponsesRequest else {})}
    properties = {}
    for name in sorted(kind.fields):
        field = found["properties"][name]
        if name in narrowed:
            kept = ("default", "deprecated", "description", "examples")
            field = {**narrowed[name], **{k: v for k, v in field.items() if k in kept}}
            if "anyOf" not in field or {"type": "null"} not in field["anyOf"]:
                field = {k: v for k, v in field.items() if (k, v) != ("default", None)}
        if name == kind.required and "anyOf" in field:
            field = {**field, "anyOf": [each for each in field["anyOf"] if each != _NULL]}
        if name in DESCRIPTIONS:
            field = {**field, "description": DESCRIPTIONS[name]}
        properties[name] = field
    required = [] if kind.required is None else [kind.required]
    return {
        "type": "object",
        "description": kind.__doc__,
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def plain(value: Any) -> Any:
    """A schema without pydantic's titles, which repeat the names."""
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    titled = isinstance(value.get("title"), str)
    return {k: plain(v) for k, v in value.items() if not (titled and k == "title")}
