"""Where keys and tokens stand in a request."""

from starlette.datastructures import Headers


def bearer_token(headers: Headers) -> str:
    """What follows `Authorization: Bearer` (RFC 6750 §2.1), or nothing."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""
