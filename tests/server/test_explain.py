"""POST /v1/experts/explain: a decision with its reasons, and nothing of what isn't granted."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient

from expertgate.policies.principal import Principal
from expertgate.server.admission import Admission
from expertgate.server.app import create_app
from expertgate.server.config import EVERYONE, Limits
from tests.server.sites import ALICE, NEWS, PUBLIC, RESEARCH, Site

RULES = PUBLIC + ALICE + RESEARCH + NEWS


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path, RULES)


@pytest.fixture
def explain(site):
    client = TestClient(create_app(site.service), raise_server_exceptions=False)

    def ask(user, body=None, **headers):
        sent = {"Authorization": f"Bearer {site.keys[user]}", **headers} if user else headers
        return client.post("/v1/experts/explain", json=body or {}, headers=sent)

    return ask


def test_all_that_is_granted_with_its_policies(site, explain):
    assert explain("alice").json() == {
        "object": "expert.decision",
        "policies": site.service.policies.version,
        "effective": ["public", "math", "code"],
        "error": None,
        "experts": [
            {"name": "public", "allowed": True, "by": ["alice", "public"]},
            {"name": "math", "allowed": True, "by": ["alice"]},
            {"name": "code", "allowed": True, "by": ["alice"]},
        ],
    }


def test_a_selection_by_body_or_header(explain):
    for found in (
        explain("dave", {"experts": {"exclude": ["math"]}}),
        explain("dave", **{"X-Experts": "-math"}),
    ):
        assert found.json()["effective"] == ["public", "code"]
    differing = explain("dave", {"experts": ["math"]}, **{"X-Experts": "-math"})
    assert differing.json()["error"]["code"] == "invalid_experts"
    assert differing.status_code == 400


def test_forbidden_suspended_and_unknown_look_alike(site, explain):
    asyncio.run(site.oversight.suspend("math"))
    answers = [
        explain("alice", {"experts": ["public", name]}).text.replace(name, "NAME")
        for name in ("news", "math", "nwes")
    ]
    assert len(set(answers)) == 1
    found = json.loads(answers[0])
    assert found["effective"] == []
    assert found["error"]["code"] == "expert_not_permitted"
    assert found["experts"][-1] == {"name": "NAME", "allowed": False, "by": []}
    assert "no-news" not in answers[0]
    assert [e["name"] for e in found["experts"] if e["allowed"]] == ["public", "code"]


def test_a_purpose_is_part_of_the_question(explain, site):
    site.write(
        "permit(principal, action, resource)\n"
        'when { context has purpose && context.purpose == "a" };'
    )
    asyncio.run(site.look())
    assert explain("dave").json()["error"]["message"] == "no expert is granted to you"
    for found in (explain("dave", {"purpose": "a"}), explain("dave", **{"X-Purpose": "a"})):
        assert len(found.json()["effective"]) == 4


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"expert": []}, "invalid_request"),
        ({"experts": []}, "invalid_experts"),
        ({"experts": "math"}, "invalid_experts"),
        ({"model": "x"}, "invalid_request"),
        ({"purpose": 1}, "invalid_request"),
        ([], "invalid_request"),
    ],
)
def test_what_is_malformed_is_a_400(explain, body, code):
    response = explain("alice", body or [1])
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


def test_nobody_learns_anything(explain):
    assert explain(None).json()["error"]["code"] == "invalid_credential"


def test_it_takes_a_place_and_counts_as_other_requests_do(site, explain):
    """Each holds its body, and half a minute for it: one client could fill the memory."""
    site.service.admission = Admission({EVERYONE: Limits(requests_per_minute=2)}, places=2)
    assert explain("alice").status_code == 200
    with site.service.admission.enter(Principal("dave")):
        refused = explain("dave", {"experts": 7})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert explain("alice").status_code == 200
    assert explain("alice").status_code == 429
