"""Whatever a client sends, nothing breaks, and no grant is wider than Cedar itself would give."""

import json
from contextlib import suppress

import cedarpy
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from expertgate.server.app import create_app
from expertgate.server.grants import HANDLE_ARG
from expertgate.server.handlers import Handlers
from expertgate.server.suspensions import SuspensionError
from tests.server.running import EXPERTS
from tests.server.sites import ALICE, PUBLIC, RESEARCH, Site

RULES = (
    PUBLIC
    + RESEARCH
    + ALICE.replace(
        "resource)", 'resource) when { context has purpose && context.purpose like "c*" }'
    )
    + "forbid(principal, action, resource) when { context has purpose && "
    'context.purpose == "ads" } unless { resource == Expert::"public" };'
    'forbid(principal, action, resource == Expert::"code")'
    'unless { context has address && context.address == ip("10.0.0.7") };'
)
USERS = {"alice": [], "dave": ["research"]}
NAMES = [expert["name"] for expert in EXPERTS]
ADDRESS = "10.0.0.7"


def oracle(user: str, purpose: str | None, address: str) -> set[str]:
    """What Cedar permits, asked one by one, without our schema, cache or context."""
    entities = [
        {
            "uid": {"type": "User", "id": user},
            "attrs": {},
            "parents": [{"type": "Group", "id": group} for group in USERS[user]],
        },
        *(
            {
                "uid": {"type": "Expert", "id": expert["name"]},
                "attrs": {key: expert[key] for key in ("owner", "license", "tags")},
                "parents": [],
            }
            for expert in EXPERTS
        ),
    ]
    context = {"address": {"__extn": {"fn": "ip", "arg": address}}}
    if purpose is not None:
        context["purpose"] = purpose
    return {
        name
        for name in NAMES
        if cedarpy.is_authorized(
            {
                "principal": {"type": "User", "id": user},
                "action": {"type": "Action", "id": "consult"},
                "resource": {"type": "Expert", "id": name},
                "context": context,
            },
            RULES,
            entities,
        ).allowed
    }


class Handler:
    """Redeems what it is given, as the engine does, and answers nothing."""

    def __init__(self, service):
        self.service = service
        self.granted = None

    async def create_completion(self, body):
        grant = self.service.grants.redeem(body.vllm_xargs[HANDLE_ARG])
        self.granted = grant.tenant, set(self.service.catalogue.names(grant.experts))
        return ErrorResponse(error=ErrorInfo(message="that's all", type="t", code=400))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("fuzz"), RULES)
    made.handler = Handler(made.service)
    made.service.handlers = Handlers(*[made.handler] * 4, "toy", 2048, 0)
    app = create_app(made.service)
    made.client = TestClient(app, raise_server_exceptions=False, client=(ADDRESS, 1))
    return made


names = st.sampled_from([*NAMES, "nwes", "Public", "public ", "", "-math", "*"]) | st.text(
    max_size=8
)
selections = st.lists(names, max_size=5) | st.fixed_dictionaries({"exclude": st.lists(names)})
purposes = st.sampled_from(["care", "ads", "cure", "c", "Care", "", "a" * 300]) | st.text(
    max_size=8
)
junk = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers())
# A client may send any bytes but those that end a header.
header_texts = st.binary(max_size=12).map(
    lambda raw: bytes(b for b in raw if b not in b"\0\r\n").strip()
)
bodies = st.fixed_dictionaries(
    {"prompt": st.just("a")},
    optional={
        "experts": selections | junk,
        "purpose": purposes | junk,
        "model": st.sampled_from(["toy", "toy:public", "toy:-math", "toy:math+news", "all"]),
        "expert": junk,
        "context": st.just({"purpose": "care"}),
        "principal": st.just("alice"),
        "claims": junk,
    },
)
headers = st.lists(
    st.tuples(st.just(b"X-Purpose"), purposes.filter(str.isascii).map(str.encode) | header_texts)
    | st.tuples(st.just(b"X-Experts"), st.sampled_from([b"math", b"-news", b"public, math"]))
    | st.tuples(st.just(b"X-Experts"), header_texts)
    | st.tuples(
        st.sampled_from([b"X-Forwarded-User", b"X-Forwarded-Groups", b"X-Forwarded-For"]),
        st.sampled_from([b"alice", b"research", b"10.0.0.7"]),
    ),
    max_size=3,
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([*USERS, None]), bodies, headers)
@example("dave", {"prompt": "a", "purpose": "ads", "experts": ["public", "math"]}, [])
@example("alice", {"prompt": "a", "experts": ["news"]}, [(b"X-Purpose", b"care")])
@example("dave", {"prompt": "a"}, [(b"X-Purpose", b"ads"), (b"X-Purpose", b"care")])
def test_no_grant_is_wider_than_cedars(site, user, body, headers):
    site.handler.granted = None
    sent = [(b"Content-Type", b"application/json"), *headers]
    if user is not None:
        sent.append((b"Authorization", f"Bearer {site.keys[user]}".encode()))
    try:
        content = json.dumps(body).encode()
    except UnicodeEncodeError:
        return
    for path in ("/v1/completions", "/v1/experts/explain"):
        asked = content if path == "/v1/completions" else explained(body)
        response = site.client.post(path, content=asked, headers=sent)
        assert response.status_code < 500, response.text
        assert response.status_code == 200 or response.json()["error"]["code"]
        if path == "/v1/experts/explain" and response.status_code == 200:
            allowed = oracle(user, purpose_of(body, headers), ADDRESS)
            answer = response.json()
            assert {e["name"] for e in answer["experts"] if e["allowed"]} == allowed
            assert set(answer["effective"]) <= allowed
    if site.handler.granted is not None:
        tenant, granted = site.handler.granted
        assert tenant == user
        assert granted
        assert granted <= oracle(user, purpose_of(body, headers), ADDRESS)
    assert len(site.service.grants) == 0


def explained(body) -> bytes:
    kept = {key: value for key, value in body.items() if key not in ("prompt", "model")}
    return json.dumps(kept).encode()


def purpose_of(body, headers) -> str | None:
    said = [value.decode() for name, value in headers if name == b"X-Purpose"]
    return said[0] if said else body.get("purpose")


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=200) | st.binary(max_size=200))
@example("- &a [*a]")
@example("- !!python/object/apply:os.system [x]")
def test_no_file_of_suspensions_breaks_or_resumes(site, content):
    site.suspended.write_text("- news\n")
    site.oversight._read_suspensions()
    raw = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    site.suspended.write_bytes(raw)
    with suppress(SuspensionError):  # told, and nothing else comes of it
        site.oversight._read_suspensions()
    suspended = {e["name"] for e in EXPERTS if e["index"] in site.service.suspended}
    if suspended != {"news"}:  # then it is a list of names that says so
        assert raw.strip().startswith((b"[", b"-"))
    site.suspended.write_text("[]")
    site.oversight._read_suspensions()
