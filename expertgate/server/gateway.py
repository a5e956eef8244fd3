"""Users named by a trusted gateway: the one that sends the request isn't the one who asks.

A key marked `may_assert` speaks for the user in `X-Forwarded-User`, with the groups, separated by
commas, in `X-Forwarded-Groups`. It never speaks for itself: a request that lost its user on the way
would else run with the gateway's own rights. And it hands on no group that it doesn't have.
"""

from starlette.datastructures import Headers

from expertgate.policies.principal import Principal
from expertgate.server.errors import bad_request
from expertgate.server.keys import Key
from expertgate.server.names import MAX_CHARS
from expertgate.server.slips import refuse_slip

USER_HEADER = "X-Forwarded-User"
GROUPS_HEADER = "X-Forwarded-Groups"

_MAX_GROUPS = 128


def named_user(key: Key, headers: Headers) -> Principal:
    """Whom a gateway with this key asks for. Raises ApiError 400."""
    user = _value(headers, USER_HEADER)
    if user is None:
        raise bad_request(
            f"this key is a gateway's; it must name its user: {USER_HEADER}", USER_HEADER
        )
    # Two proxies that each added theirs look like this, and one of them may have been the client.
    if "," in user:
        raise bad_request(f"{USER_HEADER} must name one user, without a comma", USER_HEADER)
    _check_name(user, USER_HEADER)
    # Passed over, it would leave a user without groups of whom a policy forbids something.
    refuse_slip(GROUPS_HEADER, headers)
    groups = _groups(_value(headers, GROUPS_HEADER))
    if not groups <= key.groups:
        # Not left out: a policy that forbids something to a group would no longer find it.
        raise bad_request(
            f"{GROUPS_HEADER} names a group that this gateway's key doesn't have", GROUPS_HEADER
        )
    return Principal(f"{key.id}/{user}", groups, via=f"gateway:{key.id}")


def refuse_named_user(headers: Headers) -> None:
    """Raises ApiError 400 for the headers of a gateway from anyone else."""
    for name in (USER_HEADER, GROUPS_HEADER):
        if name in headers:
            # Ignored, it would leave a gateway believing that its user is the one who asks.
            raise bad_request(f"header {name} may not be sent with this credential", name)


def _groups(text: str | None) -> frozenset[str]:
    if not text:
        return frozenset()
    groups = [group.strip(" ") for group in text.split(",")]
    if len(groups) > _MAX_GROUPS:
        raise bad_request(f"{GROUPS_HEADER} may name at most {_MAX_GROUPS} groups", GROUPS_HEADER)
    for group in groups:
        _check_name(group, GROUPS_HEADER)
    return frozenset(groups)


def _value(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    if len(values) > 1:
        raise bad_request(f"send one {name} header, not several", name)
    if not values:
        return None
    try:
        return values[0].encode("latin-1").decode()
    except UnicodeDecodeError:
        raise bad_request(f"{name} must be UTF-8", name) from None


def _check_name(text: str, header: str) -> None:
    if not text or text != text.strip() or len(text) > MAX_CHARS or not text.isprintable():
        raise bad_request(f"{header}: a name is 1 to {MAX_CHARS} printable characters", header)
