"""One client's many choices and prompts must not make others wait until all of them are done."""

import json
import threading

import httpx
import pytest

from tests.support import sse

CROWD = 64


def test_a_newcomer_goes_before_most_of_a_crowd(server):
    """In order of arrival it would come last: the engine runs 8 at once, of 64 that are before."""
    body = {"prompt": ["hi"] * CROWD, "max_tokens": 300, "ignore_eos": True, "stream": True}
    url, headers = f"{server.url}/v1/completions", server.headers("alice")
    ended, begun = [], threading.Event()

    def read():
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
            for event in sse.data(response):
                if event != "[DONE]":
                    choices = json.loads(event)["choices"]
                    ended.extend(c["index"] for c in choices if c["finish_reason"])
                    begun.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert begun.wait(60)
    assert server.complete("bob", max_tokens=2).status_code == 200
    before = len(ended)
    reading.join(120)
    assert sorted(ended) == list(range(CROWD))
    assert before < CROWD / 2


@pytest.mark.parametrize(
    "fields", [{"n": 65}, {"n": 16_384}, {"prompt": ["a"] * 65}, {"prompt": ["a"] * 13, "n": 5}]
)
def test_more_at_once_than_one_may_ask_is_refused(server, fields):
    response = server.complete("alice", temperature=1, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
