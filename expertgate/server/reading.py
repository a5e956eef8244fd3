"""Reads the body of a request, within limits."""

from starlette.requests import Request

from expertgate.server.errors import ApiError

MAX_BODY_BYTES = 1 << 20


async def read_body(request: Request) -> bytes:
    """Raises ApiError: 415 for another media type than JSON, 413 for more than MAX_BODY_BYTES."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "unsupported_media_type", "the body must be application/json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        parts.append(part)
    return b"".join(parts)


def _too_large() -> ApiError:
    # The rest of the body is never read, so the connection can't be used again.
    headers = {"Connection": "close"}
    message = f"the body may have {MAX_BODY_BYTES} bytes"
    return ApiError(413, "body_too_large", message, None, headers)
