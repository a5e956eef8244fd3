"""The tests' own reader of streams: a token may bring any character."""

import json

import httpx

from tests.support import sse


def test_an_event_ends_at_a_line_feed_alone_wherever_the_pieces_end():
    event = json.dumps({"text": "a\u2028b\u0085c\x1cd"}, ensure_ascii=False)
    text = f"data: {event}\n\n: a comment\n\ndata: [DONE]\n\n".encode()
    for size in (1, 7, len(text)):
        pieces = (text[at : at + size] for at in range(0, len(text), size))
        assert list(sse.data(httpx.Response(200, content=pieces))) == [event, "[DONE]"]
