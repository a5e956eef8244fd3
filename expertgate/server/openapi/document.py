"""The OpenAPI document (3.1) of the public listener, from the table of its routes."""

from copy import deepcopy
from typing import Any

import expertgate
from expertgate.server.edge import HEADER as REQUEST_ID
from expertgate.server.errors import CODES
from expertgate.server.openapi import bodies, replies
from expertgate.server.openapi.references import Schema, reachable, reference
from expertgate.server.reading import MAX_BODY_BYTES
from expertgate.server.routes.table import ROUTES, Route

_ABOUT = f"""\
An inference server for mixtures of experts in which every request consults exactly the experts its
user may. The routes are OpenAI's, and answer as OpenAI's do; `experts` is ours, in bodies and in
answers. A field that is not listed is refused, not ignored, unless it is one of OpenAI's and null.
A body is JSON of at most {MAX_BODY_BYTES >> 20} MiB.
"""

_KEY = "credential"
_JSON = "application/json"
_SSE = "text/event-stream"

_HEADERS: dict[str, tuple[str, Schema, str]] = {
    "X-Experts": (
        "As the field `experts`: `public,math` names exactly these, `-news` all but these.",
        {"type": "string"},
        "public,math",
    ),
    "X-Purpose": (
        "What the answer is for; policies may grant or refuse experts by it.",
        {"type": "string", "pattern": "^[ -~]{1,256}$"},
        "care",
    ),
    "X-Receipt": (
        "Asks for a signed receipt with the answer, as the field `receipt` does.",
        {"type": "string", "enum": ["1"]},
        "1",
    ),
    "X-Forwarded-User": (
        "From a gateway whose key may say so, and only from one: who asks.",
        {"type": "string"},
        "alice",
    ),
    "X-Forwarded-Groups": (
        "From such a gateway: the user's groups, of those that its key has.",
        {"type": "string"},
        "research,staff",
    ),
    REQUEST_ID: (
        "An id of the client's own, for the server's log; it goes back in the response.",
        {"type": "string", "pattern": "^[A-Za-z0-9._:/+=-]{1,128}$"},
        "order-66",
    ),
}
"""Of requests: what each says, its schema, and an example."""

_IN_PATH: dict[str, tuple[str, Schema, str]] = {
    "request_id": (
        "The id of the request's answer.",
        {"type": "string", "minLength": 1},
        "chatcmpl-" + "4f2c" * 8,
    ),
    "model": (
        "The model's name, or an alias.",
        {"type": "string", "minLength": 1},
        "demo:public+formulary",
    ),
}
"""What a path has in braces, likewise."""


def document() -> dict[str, Any]:
    """The whole document, which whoever asks may change."""
    components = {**bodies.COMPONENTS, **replies.components()}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
        components |= {kind.__name__: bodies.schema(kind) for kind in route.bodies}
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "expertgate",
            "version": expertgate.__version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": reachable(paths, components),
            "securitySchemes": {
                _KEY: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": (
                        "An API key, or a token of an issuer that the server knows. It may take a "
                        "client's certificate, or nobody's credential, instead, where its "
                        "configuration says so."
                    ),
                }
            },
        },
    }
    # What it is made of stands in the modules, for the next who asks.
    return deepcopy(whole)


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.endpoint.__name__,
        "summary": route.summary,
        "description": route.says,
        "parameters": _parameters(route),
        "responses": _responses(route),
        "security": [{_KEY: []}] if route.keyed else [],
    }
    if route.bodies:
        found = [reference(kind.__name__) for kind in route.bodies]
        schema = found[0] if len(found) == 1 else {"oneOf": found}
        operation["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": schema, "example": route.example}},
        }
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    in_path = [name for name in _IN_PATH if f"{{{name}}}" in route.path]
    return [
        *(_parameter(name, "path", *_IN_PATH[name]) for name in in_path),
        *(_parameter(name, "header", *_HEADERS[name]) for name in (*route.headers, REQUEST_ID)),
    ]


def _parameter(name: str, where: str, says: str, schema: Schema, example: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": says,
        "schema": schema,
        "example": example,
    }


def _responses(route: Route) -> dict[str, Any]:
    own = {REQUEST_ID: {"description": "The client's id, or ours.", "schema": {"type": "string"}}}
    headers: dict[str, Any] = dict(own)
    if route.event is not None:
        headers["X-Experts-Effective"] = {
            "description": "The experts that may speak, separated by commas.",
            "required": True,
            "schema": {"type": "string"},
            "example": "public,math",
        }
    content: dict[str, Any] = {_JSON: {"schema": reference(route.answer)}}
    if route.event is not None:
        content[_SSE] = {"schema": _events(route.event)}
    responses = {"200": {"description": route.summary, "headers": headers, "content": content}}
    for status, schema in route.more:
        responses[str(status)] = {
            "description": "Not now.",
            "headers": own,
            "content": {_JSON: {"schema": reference(schema)}},
        }
    for status in sorted({CODES[code][0] for code in route.codes}):
        codes = [code for code in route.codes if CODES[code][0] == status]
        responses[str(status)] = {
            "description": "; ".join(f"`{code}`: {CODES[code][1]}" for code in codes) + ".",
            "headers": {**own, **_headers_of_errors(status)},
            "content": {_JSON: {"schema": _error(codes)}},
        }
    return dict(sorted(responses.items()))


def _headers_of_errors(status: int) -> dict[str, Any]:
    seconds = {"type": "integer", "minimum": 1}
    if status == 401:
        says = "The challenge that HTTP asks of a 401."
        return {"WWW-Authenticate": {"description": says, "schema": {"type": "string"}}}
    if status == 429:
        says = "Seconds until it may be tried again."
        return {"Retry-After": {"description": says, "required": True, "schema": seconds}}
    if status == 503:
        says = "Seconds until it may be tried again, where that is known."
        return {"Retry-After": {"description": says, "schema": seconds}}
    return {}


def _error(codes: list[str]) -> Schema:
    code = {"type": "object", "properties": {"code": {"enum": codes}}}
    return {"allOf": [reference("Error"), {"type": "object", "properties": {"error": code}}]}


def _events(name: str) -> Schema:
    """One event of a stream: its data, and for responses its name."""
    if name == "ResponseEvent":
        data: Schema = {
            "type": "object",
            "required": ["type", "sequence_number"],
            "properties": {"type": {"type": "string"}, "response": reference("Response")},
            "description": "OpenAI's event of this name, or `ErrorEvent`.",
            "anyOf": [
                {"properties": {"type": {"not": {"const": "error"}}}},
                reference("ErrorEvent"),
            ],
        }
        return {
            "type": "object",
            "required": ["event", "data"],
            "properties": {"event": {"type": "string"}, "data": _json(data)},
        }
    parsed = _json({"anyOf": [reference(name), reference("Error")]})
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, parsed]}},
    }


def _json(schema: Schema) -> Schema:
    return {"type": "string", "contentMediaType": _JSON, "contentSchema": schema}
