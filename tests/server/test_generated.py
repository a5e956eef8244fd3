"""Requests generated from the OpenAPI document: no answer may be other than the document says.

Two thousand meet all of the server and of vLLM but the engine's process (`coreless.py`); a few
hundred more meet a real engine. schemathesis generates them, half of them wrong on purpose, and
looks at status, content type, headers and body; a status of 500 is never right, and a wrong request
or a missing credential must not be answered with 200.
"""

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from expertgate.server.openapi.document import document
from expertgate.server.routes.table import ROUTES

# Among them those of a body that is refused by its size before it is read.
REFUSALS = ["400", "401", "403", "404", "413"]
SCHEMA = schemathesis.openapi.from_dict(
    document(),
    config=schemathesis.Config.from_dict(
        {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
    ),
)
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
REQUESTS = {"POST": 165, "GET": 4}
"""Of each route in each mode."""
REAL_REQUESTS = 60
POSTS = [route for route in ROUTES if route.method == "POST"]
# A schema can't say that `stream_options` need `stream`, or that a text is too long for a model.
EXCLUDED = [positive_data_acceptance]
# Whom a header names, and which experts, is almost never right by chance.
NAMING = ("X-Experts", "X-Forwarded-User", "X-Forwarded-Groups")
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def ask(server, route, mode, count):
    """Sends so many requests; gives the statuses of the answers."""
    statuses = []

    @hypothesis.settings(
        derandomize=True,
        database=None,
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(SCHEMA[route.path][route.method].as_strategy(generation_mode=mode))
    def send(case):
        if mode is GenerationMode.POSITIVE:
            for name in NAMING:
                case.headers.pop(name, None)
            case.body = shorter(case.body)
        headers = server.headers("alice")
        response = case.call(server.url, session, headers, timeout=60)
        statuses.append(response.status_code)
        case.validate_response(response, excluded_checks=EXCLUDED)

    with requests.Session() as session:
        send()
    return statuses


def shorter(body):
    """An answer of any length is as good, and the shorter ones come sooner."""
    if not isinstance(body, dict) or "tokens" in body:
        return body
    given = {name: min(body[name], 4) for name in LENGTHS if isinstance(body.get(name), int)}
    for holding, name in (("messages", LENGTHS[1]), ("input", LENGTHS[2])):
        if not given and holding in body:
            return body | {name: 4}
    return body | given


def test_there_are_two_thousand():
    assert sum(REQUESTS[route.method] for route in ROUTES) * len(MODES) >= 2000


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_answer_is_as_documented(coreless, route, mode):
    statuses = ask(coreless, route, mode, REQUESTS[route.method])
    assert len(statuses) >= REQUESTS[route.method]
    if mode is GenerationMode.POSITIVE and "{" not in route.path:
        assert 200 in statuses


@pytest.mark.parametrize("route", POSTS, ids=lambda route: route.path)
def test_so_are_those_of_a_real_engine(server, route):
    statuses = ask(server, route, GenerationMode.POSITIVE, REAL_REQUESTS)
    assert len(statuses) >= REAL_REQUESTS
    assert 200 in statuses
