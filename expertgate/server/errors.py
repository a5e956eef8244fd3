"""Errors as a client sees them, in OpenAI's shape: each has a code that stays the same."""

import re
from collections.abc import Mapping

CODES: Mapping[str, tuple[int, str]] = {
    "invalid_request": (400, "a field, header or body that is not as it should be"),
    "invalid_experts": (
        400,
        "`experts` is malformed, contradicts itself, or leaves nobody to speak",
    ),
    "invalid_credential": (401, "no credential, or none that holds"),
    "expert_not_permitted": (403, "an expert outside the grant, whether or not it exists"),
    "expert_withdrawn": (403, "an expert was taken from the caller while the request ran"),
    "not_found": (404, "no such route, or nothing of this id that is the caller's"),
    "model_not_found": (404, "no such model"),
    "method_not_allowed": (405, "the route has other methods"),
    "request_timeout": (408, "the body did not come in time"),
    "body_too_large": (413, "the body has more bytes than this route takes"),
    "unsupported_media_type": (415, "the body is not `application/json`, or compressed"),
    "overloaded": (429, "too many requests, of all or of the caller's own"),
    "internal_error": (500, "the server's own fault; the cause is in its log alone"),
    "issuer_unavailable": (503, "the keys of a token's issuer can't be fetched"),
    "engine_unavailable": (503, "the engine is starting, going down or dead"),
    "audit_unavailable": (503, "what has to be on record can't be written, or not yet"),
}
"""Every code of the public listener: the status that it comes with, and what it means."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


_OF_ITSELF = re.compile(
    r"""
    \[\d\d:\d\d:\d\d\]\ \S+:\d+:\   # where in its source the grammar library raised it
    | \ \((parameter|value)=.*\)$   # arguments of the error itself
    """,
    re.VERBOSE | re.DOTALL,
)

FULL = "the server has as many requests as it can hold"


class ApiError(Exception):
    """Ends a request with this status, and a body that says why."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's name for errors of this status."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPES.get(self.status, other)

    def body(self) -> dict[str, dict[str, str | None]]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def said_by_vllm(message: str) -> str:
    """Its words, or a library's of its, without what they say of its own insides."""
    return _OF_ITSELF.sub("", message.strip())


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request", message, param)


def invalid_credential(message: str) -> ApiError:
    """A 401, with the challenge that RFC 9110 (§11.6.1) asks of one."""
    return ApiError(401, "invalid_credential", message, None, {"WWW-Authenticate": "Bearer"})


def withdrawn(error: Exception) -> ApiError:
    return ApiError(403, "expert_withdrawn", str(error), "experts")


def overloaded(message: str, retry_after_s: int = 1) -> ApiError:
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, "overloaded", f"{message}; try again in {retry_after_s} s", None, headers)
