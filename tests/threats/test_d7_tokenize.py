"""Counting is work on the one thread that also renders what others ask.

That texts are counted by turns of principals: tests/server/test_turns.py.
"""


def test_a_large_text_is_refused_unread(server):
    for content in (
        b'{"prompt":"' + b"x" * (1 << 20) + b'"}',
        b'{"prompt":"' + b"x" * 40_000 + b'"}',
        b'{"messages":[{"role":"user","content":"' + b"x" * 40_000 + b'"}]}',
    ):
        response = server.post("/tokenize", content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


def test_strangers_have_nothing_counted(server):
    for path in ("/tokenize", "/detokenize"):
        assert server.post(path, b"not read", None).status_code == 401
