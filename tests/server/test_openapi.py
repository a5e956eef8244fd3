"""The OpenAPI document says what there is, and the page made from it says the same."""

from pathlib import Path

import jsonschema
import pytest

from expertgate.server.errors import CODES
from expertgate.server.openapi import bodies
from expertgate.server.openapi.document import document
from expertgate.server.openapi.reference import page
from expertgate.server.openapi.references import references
from expertgate.server.responses import ResponsesRequest
from expertgate.server.routes.table import ROUTES
from expertgate.server.schemas import ChatRequest, ExplainRequest, TextRequest

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
BODIES = sorted({kind for route in ROUTES for kind in route.bodies}, key=lambda kind: kind.__name__)
PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def validator(schema):
    return jsonschema.Draft202012Validator({**schema, "components": {"schemas": SCHEMAS}})


def names(kind):
    return kind.__name__


def test_the_page_is_what_the_document_makes():
    made = "python -m expertgate.server.openapi.reference > docs/api.md"
    lines = PAGE.read_text().splitlines()
    assert lines == page().splitlines(), f"write it anew: {made}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_one(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    for example in SCHEMAS[name].get("examples", []):
        validator(SCHEMAS[name]).validate(example)


def test_whatever_is_referred_to_is_there():
    assert set(references(DOCUMENT)) == SCHEMAS.keys()


@pytest.mark.parametrize("kind", BODIES, ids=names)
def test_every_accepted_field_is_described_and_no_other(kind):
    schema = SCHEMAS[kind.__name__]
    assert set(schema["properties"]) == kind.fields <= set(kind.model_fields)
    for name, field in schema["properties"].items():
        assert field.get("description"), name
        # In our own words: vLLM's tell of what isn't here.
        assert name in bodies.DESCRIPTIONS or name in ("experts", "purpose", "receipt"), name
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("kind", BODIES, ids=names)
def test_what_fields_hold_is_what_is_read(kind):
    """The keys of nested objects, which `schemas` refuses others of, are those of the document."""
    for path, allowed in kind.nested.items():
        if path.partition(".")[0].removesuffix("[]") not in kind.fields:
            continue  # of a table that several bodies share
        assert allowed == _keys(SCHEMAS[kind.__name__], path.replace("[]", ".[]").split(".")), path


def _keys(schema, steps):
    """The properties of all the objects at a path, in which [] is any item of a list."""
    if "$ref" in schema:
        return _keys(SCHEMAS[schema["$ref"].rpartition("/")[2]], steps)
    if "anyOf" in schema:
        return frozenset().union(*(_keys(branch, steps) for branch in schema["anyOf"]))
    if not steps:
        return frozenset(schema.get("properties", ()))
    inner = schema.get("items") if steps[0] == "[]" else schema.get("properties", {}).get(steps[0])
    return frozenset() if inner is None else _keys(inner, steps[1:])


@pytest.mark.parametrize("kind", [ChatRequest, TextRequest, ResponsesRequest, ExplainRequest])
def test_our_fields_have_examples_that_hold(kind):
    properties = SCHEMAS[kind.__name__]["properties"]
    assert {"experts", "purpose"} <= properties.keys()
    assert ("receipt" in properties) == (kind is not ExplainRequest)
    for name in ("experts", "purpose"):
        for example in properties[name]["examples"]:
            validator(properties[name]).validate(example)
    with pytest.raises(jsonschema.ValidationError):
        validator(properties["experts"]).validate({"only": []})


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_a_routes_examples_are_requests(route):
    operation = DOCUMENT["paths"][route.path][route.method.lower()]
    for parameter in operation["parameters"]:
        validator(parameter["schema"]).validate(parameter["example"])
    if route.bodies:
        content = operation["requestBody"]["content"]["application/json"]
        validator(content["schema"]).validate(content["example"])
        with pytest.raises(jsonschema.ValidationError):
            validator(content["schema"]).validate({**content["example"], "expert": ["public"]})


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_errors_stand_under_their_statuses(route):
    responses = DOCUMENT["paths"][route.path][route.method.lower()]["responses"]
    documented = set()
    for status, response in responses.items():
        schema = response["content"]["application/json"]["schema"]
        if "allOf" in schema:
            codes = schema["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"]
            assert {CODES[code][0] for code in codes} == {int(status)}
            documented |= set(codes)
    assert documented == set(route.codes)


def test_a_caller_may_change_its_document():
    changed = document()
    for schema in changed["components"]["schemas"].values():
        schema.clear()
    assert all(document()["components"]["schemas"].values())
    assert document() == DOCUMENT
