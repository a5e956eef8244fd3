"""Names of users and groups, and whose they are.

A user's id says who vouches for it, so that nobody can be named into being somebody else:

| id | who |
| --- | --- |
| `alice` | the holder of that API key |
| `corp:alice` | whom the issuer called `corp` in the configuration names `alice` |
| `mesh:alice` | whom a client certificate names `alice`, where those are called `mesh` |
| `portal/alice` | whom the gateway with the key `portal` names `alice` |
| `anonymous` | whoever sent no credential |

Keys' ids and issuers' names have neither `:` nor `/`, so the first of the two tells which it is,
whatever stands behind it.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

ANONYMOUS = "anonymous"
MAX_CHARS = 256


def voucher(user: str) -> str:
    """Who says that it is this user: the key, the issuer, the certificates or the gateway."""
    return re.split("[:/]", user, maxsplit=1)[0]


def printable(text: str) -> str:
    """The text itself. Raises ValueError where it doesn't fit a line of a log."""
    if not text.isprintable():
        raise ValueError("must be printable text")
    return text


def key_id(text: str) -> str:
    """The text itself. Raises ValueError where it could be somebody else's id."""
    if ":" in text or "/" in text:
        raise ValueError("must not contain ':' or '/'; users of issuers and gateways have them")
    if text == ANONYMOUS:
        raise ValueError("is what callers without a credential are called; choose another")
    return text


Name = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_CHARS), AfterValidator(printable)
]
"""Of a user or group: one to 256 printable characters."""
