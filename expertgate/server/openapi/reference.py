"""The API reference, `docs/api.md`, from the OpenAPI document.

`python -m expertgate.server.openapi.reference > docs/api.md` writes it anew; a test holds that it
is what this writes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from expertgate.server.errors import CODES, ApiError
from expertgate.server.openapi.document import document
from expertgate.server.openapi.references import REFERENCE, Schema, references

_HEAD = """\
# API reference

<!-- Made from the OpenAPI document by `python -m expertgate.server.openapi.reference`. -->
"""
_CREDENTIAL = """\
A request says who asks by `Authorization: Bearer CREDENTIAL`; which kinds a server takes is in
[identity.md](identity.md). The same document for programs is at `/openapi.json`.
"""
_ERRORS = """\
## Errors

Every error has a body of this form. `code` stays the same; `message` is for people; `param` is the
field or header that is wrong, where it is one. Whatever is no route is a 404 `not_found`, another
method a 405 `method_not_allowed`; HEAD goes wherever GET does. What is no HTTP at all gets a 400
without a body of ours.
"""


def page() -> str:
    """The whole page, as Markdown."""
    known = document()
    schemas = known["components"]["schemas"]
    parts = [_HEAD, known["info"]["description"], _CREDENTIAL]
    parts += _contents(known["paths"])
    for path, operations in known["paths"].items():
        for method, operation in operations.items():
            parts += _route(method.upper(), path, operation, schemas)
    parts += _headers(known["paths"])
    parts += _errors(schemas["Error"])
    parts.append("## Objects\n\nWhat bodies and answers hold, by name.\n")
    bodies = set(_body_names(known["paths"]))
    for name, schema in schemas.items():
        if name not in bodies and name != "Error":
            parts += _object(name, schema)
    return "\n".join(parts)


def _contents(paths: Mapping[str, Any]) -> Iterator[str]:
    yield "| route | |\n| --- | --- |"
    for path, operations in paths.items():
        for method, operation in operations.items():
            title = f"{method.upper()} {path}"
            yield f"| [`{title}`](#{_anchor(title)}) | {operation['summary']} |"
    yield ""


def _route(
    method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Schema]
) -> Iterator[str]:
    yield f"## {method} {path}\n"
    yield f"{operation['description']}\n"
    headers = [f"`{p['name']}`" for p in operation["parameters"] if p["in"] == "header"]
    who = "Asks for a credential." if operation["security"] else "Asks for no credential."
    yield f"{who} Headers: {', '.join(headers)}.\n"
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]
        yield "```json"
        yield _pretty(content["example"])
        yield "```\n"
        names = list(references(content["schema"]))
        for name in names:
            if len(names) > 1:
                yield f"Either this body, `{name}`:\n" if name == names[0] else "Or this:\n"
            yield from _fields(schemas[name])
    yield from _answers(operation["responses"])


def _answers(responses: Mapping[str, Any]) -> Iterator[str]:
    content = responses["200"]["content"]
    kinds = [_type(content["application/json"]["schema"])]
    events = set(references(content.get("text/event-stream", {}))) - {"Error", "ErrorEvent"}
    kinds += [f"or a stream of {_link(name)} events" for name in sorted(events)]
    yield f"Answers {', '.join(kinds)}.\n"
    for status, response in responses.items():
        if status == "200":
            continue
        schema = response["content"]["application/json"]["schema"]
        if "$ref" in schema:
            yield f"- **{status}** {_type(schema)}"
        else:
            codes = schema["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"]
            yield f"- **{status}** {', '.join(f'`{code}`' for code in codes)}"
    yield ""


def _headers(paths: Mapping[str, Any]) -> Iterator[str]:
    yield "## Headers\n\n| header | example | what it says |\n| --- | --- | --- |"
    seen: dict[str, Any] = {}
    for operations in paths.values():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["in"] == "header":
                    seen.setdefault(parameter["name"], parameter)
    for name, parameter in seen.items():
        yield f"| `{name}` | `{parameter['example']}` | {_cell(parameter['description'])} |"
    yield (
        "\nEvery answer has `X-Request-Id`, the client's or ours; one of experts has "
        "`X-Experts-Effective`, the\nexperts that may speak; a 429 has `Retry-After`.\n"
    )


def _errors(schema: Schema) -> Iterator[str]:
    yield _ERRORS
    yield "```json"
    yield _pretty(schema["examples"][0])
    yield "```\n"
    yield "| status | code | type | when |\n| --- | --- | --- | --- |"
    for code, (status, meaning) in CODES.items():
        yield f"| {status} | `{code}` | `{ApiError(status, code, '').type}` | {meaning} |"
    yield ""


def _object(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{schema['description'].strip()}\n"
    if "properties" in schema:
        yield from _fields(schema)
    else:
        for kind in schema.get("anyOf", []):
            title = kind["properties"]["type"]["enum"][0]
            yield f"`{title}`:\n"
            yield from _fields(kind)
    for example in schema.get("examples", []):
        yield "```json"
        yield _pretty(example)
        yield "```\n"


def _fields(schema: Schema) -> Iterator[str]:
    required = schema.get("required", [])
    yield "| field | type | default | |\n| --- | --- | --- | --- |"
    for name, field in schema["properties"].items():
        default = field.get("default")
        shown = "required" if name in required else "" if default is None else f"`{_json(default)}`"
        says = _cell(field.get("description", ""))
        yield f"| `{name}` | {_cell(_type(field))} | {shown} | {says} |"
    yield ""


def _type(schema: Schema) -> str:
    """What a value is, in words."""
    if "$ref" in schema:
        return _link(schema["$ref"].removeprefix(REFERENCE))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [_type(kind) for kind in schema[key]]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{_json(value)}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        items = _type(schema["items"]) if "items" in schema else "any"
        most = f" (at most {schema['maxItems']})" if "maxItems" in schema else ""
        return f"list of ({items}){most}" if " or " in items else f"list of {items}{most}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    if kind == "object" and schema.get("properties"):
        inner = ", ".join(f"`{name}`" for name in schema["properties"])
        return f"object with {inner}"
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: Schema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        upper = "" if most is None else f", at most {most}"
        return f" above {schema['exclusiveMinimum']}{upper}"
    if schema.get("maxLength"):
        return f" (at most {schema['maxLength']} characters)"
    if least is None and most is None:
        return ""
    if most is None or most >= (1 << 31) - 1:
        return f" from {least}" if least is not None and least > -(1 << 31) else ""
    return f" {least} to {most}"


def _link(name: str) -> str:
    return f"[{name}](#{_anchor(name)})"


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _body_names(paths: Mapping[str, Any]) -> Iterator[str]:
    for operations in paths.values():
        for operation in operations.values():
            yield from references(operation.get("requestBody", {}))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _pretty(value: Mapping[str, Any]) -> str:
    """JSON with a line for each of its fields."""
    fields = [f"  {_json(name)}: {_json(inner)}" for name, inner in value.items()]
    return "{\n" + ",\n".join(fields) + "\n}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
