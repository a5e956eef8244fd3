"""Headers of every kind, good and bad parts mixed: nothing fails, and nobody gets in unearned."""

import asyncio
import base64
import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.app import create_app
from expertgate.server.errors import ApiError
from expertgate.server.identity import Identity
from expertgate.server.identity_config import GroupRule, IdentityConfig, IssuerConfig
from expertgate.server.key_edits import create_key
from tests.server import test_app
from tests.support.issuer import AUDIENCE, Issuer

script, service = test_app.script, test_app.service  # the application, around fakes

GROUPS = frozenset({"research", "staff"})


class World:
    """A server's users: alice with a key, the gateway portal, and ada of the issuer corp."""

    def __init__(self, folder):
        self.issuer = Issuer()
        keys, jwks = folder / "keys.yaml", folder / "jwks.json"
        self.alice = create_key(keys, "alice", ["research"], None)
        self.portal = create_key(keys, "portal", GROUPS, None, may_assert=True)
        past = datetime.now(UTC) - timedelta(days=1)
        self.expired = create_key(keys, "old", GROUPS, past)
        jwks.write_text(json.dumps({"keys": self.issuer.jwks()}))
        self.token = self.issuer.token(exp=4_000_000_000)
        self.late = self.issuer.token(exp=1)
        issuer = IssuerConfig(
            name="corp",
            issuer=self.issuer.url,
            audience=AUDIENCE,
            jwks_file=jwks,
            groups=(GroupRule(claim="groups"),),
            claims=("level",),
        )
        self.identity = Identity(IdentityConfig(api_keys=keys, jwt=(issuer,)))

    def earned(self, headers: list[tuple[bytes, bytes]]) -> set[str]:
        """Who may come of these headers: nobody, or one. Said once more, and more strictly."""
        sent = [value for name, value in headers if name == b"authorization"]
        asserted = [value for name, value in headers if name.startswith(b"x-forwarded")]
        if len(sent) != 1:
            return set()
        scheme, _, credential = sent[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return set()
        credential = credential.strip(b" ")
        if credential == self.portal.encode():
            users = [value for name, value in headers if name == b"x-forwarded-user"]
            return {f"portal/{user.decode('utf-8', 'replace')}" for user in users[:1]}
        if asserted:
            return set()
        own = {self.alice.encode(): "alice", self.token.encode(): "corp:ada"}
        return {own[credential]} if credential in own else set()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.issuer.stop()


@pytest.fixture
def app(world, service):
    service.identity = world.identity
    return create_app(service)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["alg", "kid", "typ", "crit", "jwk", "jku", "x5u", "b64", "iss", "aud", "sub", "exp", "nbf",
     "iat", "jti", "groups", "level"]
)  # fmt: skip
PARTS = st.dictionaries(NAMES, JSON, max_size=6)


def encoded(value) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@st.composite
def credentials(draw, world) -> bytes:
    whole = [world.alice, world.portal, world.expired, world.token, world.late]
    text = draw(st.sampled_from(whole)).encode()
    how = draw(st.sampled_from(["as it is", "changed", "cut", "made up", "forged"]))
    if how == "changed":
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(st.binary(max_size=2)) + text[place + 1 :]
    elif how == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif how == "made up":
        text = draw(st.binary(max_size=40))
    elif how == "forged":
        parts = world.token.split(".")
        header = {"alg": "ES256", "kid": "one", **draw(PARTS)}
        claims = {**world.issuer.claims(), "groups": ["staff"], **draw(PARTS)}
        parts[0] = encoded(header) if draw(st.booleans()) else parts[0]
        parts[1] = encoded(claims)
        text = ".".join(parts).encode()
    return text


@st.composite
def sent(draw, world) -> list[tuple[bytes, bytes]]:
    headers = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2]))):
        scheme = draw(st.sampled_from([b"Bearer ", b"bearer ", b"Bearer  ", b"Basic ", b"Bearer"]))
        headers.append((b"authorization", scheme + draw(credentials(world))))
    users = st.sampled_from([b"ada", b"alice", b"portal/alice", "zoë".encode()]) | st.binary()
    groups = st.sampled_from([b"research", b"research, staff", b"admin", b""]) | st.binary()
    for name, values in ((b"x-forwarded-user", users), (b"x-forwarded-groups", groups)):
        count = draw(st.sampled_from([0, 0, 1, 1, 2]))
        headers.extend((name, draw(values)) for _ in range(count))
    return draw(st.permutations(headers))


def identify(world, headers) -> Principal | ApiError:
    connection = HTTPConnection({"type": "http", "headers": headers})
    try:
        return asyncio.run(world.identity.identify(connection))
    except ApiError as error:
        return error


@settings(max_examples=200)
@given(data=st.data())
def test_nobody_is_whom_their_headers_do_not_earn(world, data):
    headers = data.draw(sent(world))
    found = identify(world, headers)
    if isinstance(found, ApiError):
        assert found.status in (400, 401)
        return
    assert {found.id} == world.earned(headers)
    assert found.groups <= (GROUPS if found.id.startswith("portal/") else {"research"})
    assert found.id.isprintable()
    assert found.claims == {}


def test_what_is_earned_is_given(world):
    """Else the test above would hold for a server that lets nobody in."""
    for credential, more, user in (
        (world.alice, [], "alice"),
        (world.token, [], "corp:ada"),
        (world.portal, [(b"x-forwarded-user", b"ada")], "portal/ada"),
    ):
        headers = [(b"authorization", b"Bearer " + credential.encode()), *more]
        assert world.earned(headers) == {user}
        assert identify(world, headers).id == user


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_headers_make_it_fail_or_run_for_somebody_else(world, app, service, script, data):
    script.result = test_app.failed(404)  # what happens to those who get as far as the engine
    script.seen.clear()
    headers = data.draw(sent(world))
    status = asyncio.run(ask(app, headers))
    # Cached prefixes are kept apart by the tenant, so it must be the one who asks.
    tenants = {tenant for tenant, *_ in script.seen}
    assert tenants <= world.earned(headers)
    assert status == (404 if tenants else status)
    assert status in (400, 401, 404)
    assert len(service.grants) == 0


OPEN = {"/health", "/ready", "/version", "/openapi.json", "/.well-known/expertgate-keys"}


def test_every_other_route_asks_who_it_is(app):
    """Gateways have been broken by the one route that didn't."""
    closed = [
        (method, route.path)
        for route in app.routes
        for method in route.methods
        if route.path not in OPEN
    ]
    assert ("POST", "/v1/chat/completions") in closed
    for method, path in closed:
        for headers in ([], [(b"authorization", b"Bearer eg-" + b"A" * 43)]):
            path = re.sub(r"\{\w+\}", "x", path)
            assert asyncio.run(ask(app, headers, method, path)) == 401, (method, path)


async def ask(app, headers, method="POST", path="/v1/chat/completions") -> int:
    """The status of a request with these headers, of whatever bytes they are."""
    statuses = []
    messages = [{"type": "http.request", "body": json.dumps(test_app.BODY).encode()}]

    async def receive():
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
    }
    await app(scope, receive, send)
    return statuses[0]
