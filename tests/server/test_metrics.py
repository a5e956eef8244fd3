"""What the operators' listener shows of a running server."""

from pathlib import Path

import pytest

from tests.server.running import Server


def value(server: Server, name: str, **labels: str) -> float:
    """Of one sample, which is nothing where there is none yet."""
    found = 0.0
    for line in server.admin("GET", "/metrics").text.splitlines():
        sample, _, number = line.rpartition(" ")
        head, _, labelled = sample.partition("{")
        wanted = all(f'{key}="{text}"' in labelled for key, text in labels.items())
        if head == name and wanted and not line.startswith("#"):
            found += float(number)
    return found


@pytest.mark.parametrize(
    ("user", "fields", "size"),
    [("alice", {}, "4"), ("bob", {}, "1"), ("alice", {"experts": ["public", "math"]}, "2")],
)
def test_requests_are_counted_by_how_many_experts_may_speak(server, user, fields, size):
    before = value(server, "expertgate_requests_total", experts=size)
    for ask in server.asks:
        assert ask(user, **fields).status_code == 200
    after = value(server, "expertgate_requests_total", experts=size)
    assert after - before == len(server.asks)


@pytest.mark.parametrize(
    ("user", "fields", "code"),
    [
        ("bob", {"experts": ["math"]}, "expert_not_permitted"),
        ("alice", {"expert": ["math"]}, "invalid_request"),
        ("alice", {"experts": []}, "invalid_experts"),
        ("alice", {"model": "another"}, "model_not_found"),
    ],
)
def test_denials_are_counted_by_code(server, user, fields, code):
    before = value(server, "expertgate_denials_total", code=code)
    for ask in server.asks:
        assert ask(user, **fields).status_code >= 400
    assert value(server, "expertgate_denials_total", code=code) - before == len(server.asks)


def test_decisions_are_timed(server):
    before = value(server, "expertgate_policy_decision_seconds_count")
    server.complete("alice")
    assert value(server, "expertgate_policy_decision_seconds_count") > before


def test_each_write_of_the_audit_log_is_timed(server):
    before = value(server, "expertgate_audit_write_seconds_count")
    server.complete("alice")
    assert value(server, "expertgate_audit_write_seconds_count") > before


def test_nothing_is_held_when_nobody_asks(server):
    server.complete("alice")
    assert value(server, "expertgate_places_held") == 0
    assert value(server, "expertgate_calls_waiting") == 0


@pytest.mark.parametrize(
    "name",
    [
        "vllm:num_requests_running",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:prefix_cache_hits_total",
    ],
)
def test_vllms_own_are_there_under_their_names(server, name):
    server.complete("alice")
    assert f"\n{name}" in server.admin("GET", "/metrics").text


def test_every_metric_of_ours_is_in_the_table(server):
    table = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for line in server.admin("GET", "/metrics").text.splitlines():
        if line.startswith("# TYPE expertgate_") and not line.split()[2].endswith("_created"):
            assert f"`{line.split()[2]}`" in table
