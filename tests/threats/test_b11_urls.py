"""No part of a request makes the server fetch anything."""

import socket
import threading

import pytest


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        waiting.settimeout(0.2)
        met = []
        stop = threading.Event()

        def watch():
            while not stop.is_set():
                try:
                    met.append(waiting.accept())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=watch)
        thread.start()
        yield f"http://127.0.0.1:{waiting.getsockname()[1]}/x.png", met
        stop.set()
        thread.join()


def test_parts_with_urls_are_refused_unfetched(server, listener):
    url, met = listener
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "file", "file": {"file_id": url}},
        {"image_url": {"url": url}},
    ):
        content = [{"role": "user", "content": [part]}]
        response = server.chat("alice", messages=content)
        assert response.status_code == 400
        assert "type 'text'" in response.json()["error"]["message"]
        assert server.post("/tokenize", {"messages": content}).status_code == 400
        response = server.respond("alice", input=content)
        assert response.status_code == 400
        assert "input[0].content[0]" in response.json()["error"]["param"]
    assert met == []


def test_tools_that_would_fetch_are_refused(server, listener):
    url, met = listener
    for tool in (
        {"type": "mcp", "server_label": "x", "server_url": url},
        {"type": "web_search_preview"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
        {"type": "file_search", "vector_store_ids": ["x"]},
    ):
        assert server.respond("alice", tools=[tool]).status_code == 400
    assert met == []
