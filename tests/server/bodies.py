"""Bodies of requests as the schemas read them, and what they are refused with."""

import json

import pytest

from expertgate.server.errors import ApiError
from expertgate.server.responses import ResponsesRequest
from expertgate.server.schemas import ChatRequest, TextRequest, read

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}


def chat(**fields):
    return read(ChatRequest, json.dumps({**CHAT, **fields}).encode())


def text(**fields):
    return read(TextRequest, json.dumps({**TEXT, **fields}).encode())


def response(**fields):
    return read(ResponsesRequest, json.dumps({"input": "hi", **fields}).encode())


def refused(call, *args, **kwargs):
    """The 400 that a call raises, in a client's words and not in pydantic's."""
    with pytest.raises(ApiError) as error:
        call(*args, **kwargs)
    assert error.value.status == 400
    assert "pydantic" not in error.value.message
    assert "Dict" not in error.value.message
    return error.value
