"""Reads the body of a request, within limits."""

import asyncio

from starlette.requests import Request

from expertgate.server.errors import ApiError

MAX_BODY_BYTES = 1 << 20
BODY_S = 30.0
"""In which a body has to be there; until then it holds a place that another could have."""


async def read_body(request: Request) -> bytes:
    """Raises ApiError: 415 for what is no plain JSON, 413 for too much of it, 408 for too slow."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "unsupported_media_type", "the body must be application/json")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        message = "the body must not be compressed: Content-Encoding is not read here"
        raise ApiError(415, "unsupported_media_type", message)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                parts.append(part)
    except TimeoutError:
        raise _too_slow() from None
    return b"".join(parts)


def _too_slow() -> ApiError:
    message = f"the body was not there after {BODY_S:.0f} s"
    return ApiError(408, "request_timeout", message, None, {"Connection": "close"})


def _too_large() -> ApiError:
    # The rest of the body is never read, so the connection can't be used again.
    headers = {"Connection": "close"}
    message = f"the body may have at most {MAX_BODY_BYTES} bytes"
    return ApiError(413, "body_too_large", message, None, headers)
