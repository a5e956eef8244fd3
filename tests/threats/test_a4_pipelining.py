"""A grant in a context variable would pass to the next request of a connection."""

import json


def request(server, user, body):
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\n"
        "Host: test\r\n"
        f"Authorization: Bearer {server.keys[user]}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def replies(server, *requests):
    """Sends all at once on one connection; gives back the reply to each."""
    with server.connect() as connection:
        connection.sendall(b"".join(requests))
        reader = connection.makefile("rb")
        found = []
        for _ in requests:
            status = reader.readline().decode()
            headers = {}
            while (line := reader.readline().decode().strip()) != "":
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            content = reader.read(int(headers["content-length"]))
            found.append((int(status.split()[1]), headers, json.loads(content)))
        return found


def test_pipelined_requests_of_two_users_keep_to_their_own_grants(server):
    body = {"prompt": "x" * 200, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    alone = {user: server.complete(user, **body).json() for user in ("alice", "bob")}
    users = ["alice", "bob", "alice", "bob", "bob", "alice"]
    for user, (status, headers, found) in zip(
        users, replies(server, *(request(server, user, body) for user in users)), strict=True
    ):
        assert status == 200
        expected = "public,math,news,code" if user == "alice" else "public"
        assert headers["x-experts-effective"] == expected
        assert found["choices"][0]["text"] == alone[user]["choices"][0]["text"]


def test_a_refused_request_behind_a_granted_one_inherits_nothing(server):
    granted = request(server, "alice", {"prompt": "hi", "max_tokens": 2})
    refused = request(server, "bob", {"prompt": "hi", "max_tokens": 2, "experts": ["math"]})
    found = replies(server, granted, refused, granted)
    assert [status for status, _, _ in found] == [200, 403, 200]
    assert "x-experts-effective" not in found[1][1]
