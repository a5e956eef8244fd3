"""The JSON schemas of answers: vLLM's own, with `experts` and receipts, without what is hidden."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponse,
    CompletionStreamResponse,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeResponse, TokenizeResponse

from expertgate.model.catalogue import Expert
from expertgate.server.answers import HIDDEN, HIDDEN_IN_CHOICE
from expertgate.server.openapi.bodies import plain
from expertgate.server.openapi.references import REFERENCE, Schema, reachable, reference

_TEXT: Schema = {"type": "string"}
_NAMES: Schema = {"type": "array", "items": _TEXT}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_RECEIPT: Schema = {
    "anyOf": [_TEXT, {"type": "null"}],
    "description": (
        "Where one was asked for: a JWS in compact form; null where its record can't be written "
        "now, and can be asked for later."
    ),
}


def _object(properties: Mapping[str, Schema], *optional: str, **more: Any) -> Schema:
    """Of which all properties are there but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, **more}


_OURS: Mapping[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": {
                        **_TEXT,
                        "description": "What is wrong, and what would be right; for people.",
                    },
                    "type": {**_TEXT, "description": "OpenAI's name for errors of this status."},
                    "param": {
                        "type": ["string", "null"],
                        "description": "The field or header that is wrong, where it is one.",
                    },
                    "code": {**_TEXT, "description": "Stays the same; for programs."},
                }
            )
        },
        examples=[
            {
                "error": {
                    "message": 'not granted to you: "news"',
                    "type": "permission_error",
                    "param": "experts",
                    "code": "expert_not_permitted",
                }
            }
        ],
    ),
    "ErrorEvent": _object(
        {
            "type": {"const": "error"},
            "sequence_number": _COUNT,
            "code": _TEXT,
            "message": _TEXT,
            "param": {"type": ["string", "null"]},
        },
        description="How a stream of a response ends that fails after it has begun.",
    ),
    "ExpertsUsed": _object(
        {
            "effective": {
                **_NAMES,
                "description": "The experts that could speak; no other was consulted.",
            },
            "usage": {
                "type": "object",
                "description": "By expert of the effective set.",
                "additionalProperties": _object(
                    {
                        "tokens": {
                            "type": "number",
                            "minimum": 0,
                            "description": (
                                "Computed tokens that the router sent to it, as the mean over "
                                "the layers."
                            ),
                        },
                        "share": {
                            "type": "number",
                            "minimum": 0,
                            "maximum": 1,
                            "description": "Its part of all routing weight; they add up to 1.",
                        },
                    }
                ),
            },
            "computed": {
                **_COUNT,
                "description": "Tokens that went through the model's layers for this request.",
            },
            "cached": {
                **_COUNT,
                "description": "Prompt tokens from the prefix cache, which no expert worked on.",
            },
        },
        "usage",
        "computed",
        "cached",
        description=(
            "Which experts spoke. `usage`, `computed` and `cached` come once all of the request "
            "has ended: in a stream, with its last choice."
        ),
        examples=[
            {
                "effective": ["public", "math"],
                "usage": {
                    "public": {"tokens": 61.5, "share": 0.642},
                    "math": {"tokens": 50.5, "share": 0.358},
                },
                "computed": 56,
                "cached": 128,
            }
        ],
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": _TEXT,
            "max_model_len": {**_COUNT, "description": "In tokens."},
        }
    ),
    "ModelList": _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": reference("Model")},
        }
    ),
    "ExpertList": _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": reference("Expert")},
        }
    ),
    "Decision": _object(
        {
            "object": {"const": "expert.decision"},
            "policies": {**_TEXT, "description": "The digest of the policies that decided."},
            "effective": {
                **_NAMES,
                "description": "Those that would speak; none beside an error.",
            },
            "error": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "object", "description": "As in the `error` of a refusal."},
                ]
            },
            "experts": {
                "type": "array",
                "description": "What is granted, and what was asked for and is not.",
                "items": _object(
                    {
                        "name": _TEXT,
                        "allowed": {"type": "boolean"},
                        "by": {**_NAMES, "description": "The policies that granted it."},
                    }
                ),
            },
        },
        examples=[
            {
                "object": "expert.decision",
                "policies": "5d0c",
                "effective": ["public"],
                "error": None,
                "experts": [{"name": "public", "allowed": True, "by": ["public-for-all"]}],
            }
        ],
    ),
    "Receipt": _object(
        {
            "object": {"const": "receipt"},
            "receipt": {
                **_TEXT,
                "description": "A JWS in compact form (RFC 7515, EdDSA).",
            },
        }
    ),
    "Keys": _object(
        {
            "keys": {
                "type": "array",
                "description": "JSON Web Keys (RFC 8037).",
                "items": _object(
                    {"kty": _TEXT, "crv": _TEXT, "x": _TEXT, "kid": _TEXT},
                ),
            }
        },
        description="None where the server keeps no audit log.",
    ),
    "Health": _object({"status": {"enum": ["ok", "dead"]}}),
    "Ready": _object(
        {"ready": {"type": "boolean"}, "why": {**_TEXT, "description": "What it waits for."}},
        "why",
    ),
    "Version": _object({"version": _TEXT}),
}

_MESSAGE: Schema = _object(
    {
        "type": {"const": "message"},
        "id": _TEXT,
        "role": {"const": "assistant"},
        "status": _TEXT,
        "content": {
            "type": "array",
            "items": _object(
                {
                    "type": {"const": "output_text"},
                    "text": _TEXT,
                    "annotations": {"type": "array"},
                    "logprobs": {"type": ["array", "null"]},
                },
                "logprobs",
            ),
        },
    }
)
_CALL: Schema = _object(
    {
        "type": {"const": "function_call"},
        "id": {"type": ["string", "null"]},
        "call_id": _TEXT,
        "name": _TEXT,
        "arguments": _TEXT,
        "status": {"type": ["string", "null"]},
    },
    "id",
    "status",
)
_THOUGHT: Schema = _object(
    {"type": {"const": "reasoning"}, "id": _TEXT, "summary": {"type": "array"}}
)
# What came in the request goes back as it came.
_NARROWED_IN_RESPONSE: Mapping[str, Schema] = {
    "output": {"type": "array", "items": {"anyOf": [_MESSAGE, _CALL, _THOUGHT]}},
    "tool_choice": {"type": ["string", "object"]},
    "tools": {"type": "array", "items": {"type": "object"}},
    "text": {"type": ["object", "null"]},
    "reasoning": {"type": ["object", "null"]},
}
_NEVER_IN_RESPONSE = ("input_messages", "output_messages", "prompt")

_MODELS: Mapping[str, type[BaseModel]] = {
    "ChatAnswer": ChatCompletionResponse,
    "ChatEvent": ChatCompletionStreamResponse,
    "TextAnswer": CompletionResponse,
    "TextEvent": CompletionStreamResponse,
    "Response": ResponsesResponse,
    "Tokens": TokenizeResponse,
    "Detokenized": DetokenizeResponse,
    "Expert": Expert,
}
_WITH_EXPERTS = ("ChatAnswer", "ChatEvent", "TextAnswer", "TextEvent", "Response")
_ALWAYS_WITH_EXPERTS = ("ChatAnswer", "TextAnswer")
_DESCRIPTIONS: Mapping[str, str] = {
    "ChatAnswer": "OpenAI's, and which experts spoke.",
    "ChatEvent": (
        "One event of a stream. `experts` is in the last, which has no choices, where "
        "`stream_options.include_usage` asks for it; else in the last of each choice."
    ),
    "TextAnswer": "OpenAI's, and which experts spoke.",
    "TextEvent": "One event of a stream; `experts` as in those of chat.",
    "Response": "OpenAI's, and which experts spoke; in a stream, within `response.completed`.",
    "Tokens": "What the text is to the model.",
    "Detokenized": "What the tokens say.",
}


def components() -> dict[str, Schema]:
    """Every answer's schema by its name, and those that they refer to."""
    found: dict[str, Schema] = {}
    for name in _MODELS:
        found[name], inner = _answer(name)
        referred = reachable(found[name]["properties"], {**inner, **_OURS})
        for kind, definition in referred.items():
            if found.setdefault(kind, definition) != definition:
                raise ValueError(f"{kind} means two things in vLLM's answers")
    return {**found, **_OURS}


def _answer(name: str) -> tuple[Schema, dict[str, Schema]]:
    """The schema of one of `_MODELS` as a client gets it, and those inside it by their names."""
    schema = plain(
        _MODELS[name].model_json_schema(mode="serialization", ref_template=f"{REFERENCE}{{model}}")
    )
    inner: dict[str, Schema] = schema.pop("$defs", {})
    properties = schema["properties"]
    if name == "Expert":
        del properties["index"]  # it would tell how many there are
        schema["required"] = ["name"]
    else:
        schema["description"] = _DESCRIPTIONS[name]
    if name == "Response":
        properties.update(_NARROWED_IN_RESPONSE)
        for hidden in _NEVER_IN_RESPONSE:
            del properties[hidden]
    for hidden in HIDDEN:
        properties.pop(hidden, None)
    for choice in inner.values():
        for hidden in HIDDEN_IN_CHOICE:
            choice.get("properties", {}).pop(hidden, None)
    if name in _WITH_EXPERTS:
        properties["experts"] = reference("ExpertsUsed")
        properties["receipt"] = _RECEIPT
    if name in _ALWAYS_WITH_EXPERTS:
        schema["required"] = [*schema["required"], "experts"]
    return schema, inner
