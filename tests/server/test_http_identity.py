"""A real server, asked by users of an issuer and of a gateway."""

import pytest

from tests.server.running import Server

STEM = ["public", "math", "code"]


def granted(server: Server, **headers: str) -> list[str]:
    response = server.get("/v1/experts", **headers)
    assert response.status_code == 200, response.text
    return [expert["name"] for expert in response.json()["data"]]


def by_token(server: Server, **claims) -> dict[str, str]:
    assert server.issuer is not None
    return {"Authorization": f"Bearer {server.issuer.token(**claims)}"}


def by_gateway(server: Server, user: str, groups: str | None = None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {server.keys['portal']}", "X-Forwarded-User": user}
    return headers if groups is None else {**headers, "X-Forwarded-Groups": groups}


@pytest.mark.parametrize(
    ("claims", "experts"),
    [
        ({}, ["public"]),
        ({"groups": ["research"]}, STEM),
        ({"department": "press"}, ["public", "news"]),
        ({"department": "press", "groups": "research"}, ["public", "math", "news", "code"]),
        # Alice with a key may consult them all; whom an issuer calls so is another.
        ({"sub": "alice"}, ["public"]),
        ({"sub": "portal/alice"}, ["public"]),
    ],
)
def test_users_of_an_issuer_get_their_experts(server, claims, experts):
    assert granted(server, **by_token(server, **claims)) == experts


def test_users_of_a_gateway_get_their_experts(server):
    assert granted(server, **by_gateway(server, "ada")) == ["public"]
    assert granted(server, **by_gateway(server, "ada", "research")) == STEM
    assert granted(server, **by_gateway(server, "alice")) == ["public"]


def test_and_these_experts_answer(server):
    for headers in (
        by_token(server, groups=["research"]),
        by_gateway(server, "ada", "research"),
    ):
        assert server.effective(server.chat(None, headers=headers)) == STEM
        beyond = server.chat(None, headers=headers, experts=["news"])
        assert (beyond.status_code, beyond.json()["error"]["code"]) == (403, "expert_not_permitted")


def test_what_is_not_earned_is_refused_on_every_route(server):
    forged = server.issuer.token(aud="another")
    for headers, status in (
        ({"Authorization": f"Bearer {forged}"}, 401),
        ({"Authorization": "Bearer e30.e30."}, 401),
        (by_gateway(server, "ada", "admin"), 400),
        ({"Authorization": f"Bearer {server.keys['portal']}"}, 400),
        ({**by_gateway(server, "ada"), "Authorization": f"Bearer {server.keys['bob']}"}, 400),
        ({**by_token(server), "X-Forwarded-User": "ada"}, 400),
    ):
        for path in ("/v1/models", "/v1/experts"):
            assert server.get(path, **headers).status_code == status
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/experts/explain"):
            assert server.post(path, {}, None, **headers).status_code == status
    assert forged not in server.log
    assert server.keys["portal"] not in server.log
