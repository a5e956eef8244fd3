"""What every client is told must say nothing of paths, of other experts or of the build."""

from tests.server.running import ADMIN_TOKEN


def test_models_has_the_served_name_and_no_path(server):
    response = server.get("/v1/models", "bob")
    (card,) = response.json()["data"]
    assert card["id"] == "toy"
    assert str(server.folder) not in response.text
    assert "math" not in response.text


def test_a_wrong_model_is_told_no_path_and_no_alias(server):
    response = server.chat("bob", model="another")
    assert response.status_code == 404
    assert str(server.folder) not in response.text
    assert "math" not in response.text


def test_the_api_description_names_no_expert(server):
    text = server.get("/openapi.json").text
    assert "quillon" not in text
    assert str(server.folder) not in text


def test_metrics_are_not_for_clients(server):
    for path in ("/metrics", "/admin/experts/math/suspend", "/admin"):
        for user in ("alice", None):
            assert server.get(path, user).status_code == 404
            assert server.post(path, {}, user).status_code == 404
    token = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    assert server.get("/metrics", **token).status_code == 404
    assert server.get("/v1/models", **token).status_code == 401
    assert server.admin("GET", "/metrics", server.keys["alice"]).status_code == 401


def test_metrics_name_nobody(server):
    server.complete("alice")
    text = server.admin("GET", "/metrics").text
    for name in ("alice", "dave", str(server.folder)):
        assert name not in text


def test_unknown_and_forbidden_experts_look_alike(server):
    unknown = server.chat("bob", experts=["public", "nosuch"])
    forbidden = server.chat("bob", experts=["public", "math"])
    assert unknown.status_code == forbidden.status_code == 403
    assert unknown.json()["error"]["code"] == "expert_not_permitted"
    assert unknown.text.replace("nosuch", "math") == forbidden.text


def test_nobody_is_told_of_experts_without_a_key(server):
    response = server.get("/v1/experts")
    assert response.status_code == 401
    assert "math" not in response.text
