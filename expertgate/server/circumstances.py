"""From a request to its context: what it is for, when it came and from where.

The purpose stands in the header `X-Purpose` or the body's field `purpose`. The client says it
itself, so policies may take something away by it, and log it; whoever needs it proved has it
asserted by a token.
"""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from expertgate.policies.context import Context
from expertgate.server.errors import ApiError
from expertgate.server.slips import refuse_slip

PURPOSE_HEADER = "X-Purpose"
_MAX_PURPOSE_CHARS = 256

Purpose = Annotated[
    str | None,
    Field(
        default=None,
        description=(
            "What the answer is for; policies may grant or refuse experts by it. The same as the "
            f"header {PURPOSE_HEADER}."
        ),
        examples=["care"],
    ),
]


PURPOSES = f"has 1 to {_MAX_PURPOSE_CHARS} printable ASCII characters"


def is_purpose(text: str) -> bool:
    """Whether a request may say this. ASCII, as headers are: policies compare the two."""
    return 1 <= len(text) <= _MAX_PURPOSE_CHARS and text.isascii() and text.isprintable()


def context_of(request: Request, in_body: str | None = None) -> Context:
    """Raises ApiError 400 for a purpose that is malformed, or said twice and differently.

    Also for a header that is almost the purpose's.
    """
    refuse_slip(PURPOSE_HEADER, request.headers)
    said = [(PURPOSE_HEADER, purpose) for purpose in request.headers.getlist(PURPOSE_HEADER)]
    if len(said) > 1:
        raise _invalid(f"send one {PURPOSE_HEADER} header, not several", PURPOSE_HEADER)
    if in_body is not None:
        said.append(("purpose", in_body))
    for place, purpose in said:
        if not is_purpose(purpose):
            raise _invalid(f"{place} {PURPOSES}", place)
    if len({purpose for _, purpose in said}) > 1:
        message = f"header {PURPOSE_HEADER} and field purpose differ; say it once, or alike"
        raise _invalid(message, "purpose")
    address = request.client.host if request.client is not None else None
    return Context.now(said[0][1] if said else None, address)


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_request", message, param)
