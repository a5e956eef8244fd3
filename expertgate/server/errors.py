"""Errors as a client sees them, in OpenAI's shape.

| status | code | when |
| --- | --- | --- |
| 400 | `invalid_request` | a field, header or body that is not as it should be |
| 400 | `invalid_experts` | `experts` is malformed, contradicts itself, or leaves nobody to speak |
| 401 | `invalid_credential` | no credential, or none that holds |
| 403 | `expert_not_permitted` | an expert outside the grant, whether or not it exists |
| 403 | `expert_withdrawn` | an expert was taken from the caller while the request ran |
| 404 | `not_found`, `model_not_found` | no such route; no such model |
| 405 | `method_not_allowed` | the route has other methods |
| 408 | `request_timeout` | the body did not come in time |
| 413 | `body_too_large` | |
| 415 | `unsupported_media_type` | the body is not JSON |
| 429 | `overloaded` | too many requests, of all or of yours; `Retry-After` says when to come back |
| 500 | `internal_error` | the server's own fault; the cause is in its log alone |
| 503 | `issuer_unavailable` | the keys of a token's issuer can't be fetched |
| 503 | `engine_unavailable` | the engine is starting, going down or dead |
| 503 | `audit_unavailable` | the request can't be recorded, and so it is not run |
"""

from collections.abc import Mapping

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


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
