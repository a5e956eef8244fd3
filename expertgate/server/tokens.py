"""JSON Web Tokens (RFC 7519) of an OpenID Connect issuer.

A token is judged by RFC 8725's advice: the configuration, never the token, says which algorithms
and keys may verify it; `iss`, `aud` and `exp` must be there and be right; and it must name its key.
"""

import functools
import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import jwt
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.bearer import bearer_token
from expertgate.server.changes import CredentialsChanged
from expertgate.server.claims import ClaimError, at, groups_of, is_name, shown
from expertgate.server.errors import ApiError, invalid_credential
from expertgate.server.identity_config import IssuerConfig
from expertgate.server.jwks import COOLDOWN_S, NoKeys, key_source

log = logging.getLogger(__name__)

MAX_TOKEN_CHARS = 1 << 14
_REMEMBERED = 1024
"""Tokens whose signature was found good, and needn't be looked at again while its key is there."""

_FAR = 1 << 37
"""Seconds since 1970, in some four thousand years; what is later is no date to Python."""

_OPTIONS: Any = {"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True}
# What is told of a token whose signature holds; of one without there is nothing to tell.
_WORDS = (
    (jwt.ExpiredSignatureError, "has expired"),
    (jwt.ImmatureSignatureError, "is not valid yet"),
    (jwt.InvalidAudienceError, "is for another audience"),
    (jwt.MissingRequiredClaimError, "lacks exp or aud"),
)


class TokenIssuer:
    """`Authorization: Bearer` with a token of one issuer."""

    def __init__(self, config: IssuerConfig) -> None:
        """Raises JwksError."""
        self._config = config
        self._keys = key_source(config)
        self._decoded = functools.lru_cache(_REMEMBERED)(self._decode)

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        token = bearer_token(connection.headers)
        said = _unverified(token)
        if said is None or said["payload"].get("iss") != self._config.issuer:
            return None
        try:
            return self._principal(await self._verified(token, said["header"]))
        except _BadToken as error:
            log.info("refused a token of %s: it %s", self._config.name, error)
            raise invalid_credential(f"this token {error}") from None
        except NoKeys:
            raise ApiError(
                503,
                "issuer_unavailable",
                "the keys of this token's issuer can't be fetched now; try again",
                headers={"Retry-After": f"{COOLDOWN_S:.0f}"},
            ) from None

    async def refresh(self) -> CredentialsChanged | None:
        changed = await self._keys.refresh()
        return CredentialsChanged(self._config.name, changed) if changed else None

    async def _verified(self, token: str, header: Mapping[str, Any]) -> Mapping[str, Any]:
        """The claims of a token that holds. Raises _BadToken and NoKeys."""
        config = self._config
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in config.algorithms:
            raise _BadToken(f"is not signed by one of {', '.join(config.algorithms)}")
        if not kid:
            raise _BadToken("names no key: it has no kid")
        key = await self._keys.key(kid, algorithm)
        if key is None:
            raise _BadToken("names a key that its issuer doesn't have")
        try:
            claims = self._decoded(token, key)
            if self._expires(claims) <= datetime.now(UTC):
                raise jwt.ExpiredSignatureError
            return claims
        except jwt.PyJWTError as error:
            # PyJWT's own words may quote the token.
            words = next((w for kind, w in _WORDS if isinstance(error, kind)), "can't be verified")
            raise _BadToken(words) from None

    def _decode(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any]:
        """Raises PyJWTError, which isn't remembered."""
        return jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            issuer=self._config.issuer,
            audience=self._config.audience,
            leeway=self._config.leeway_s,
            options=_OPTIONS,
        )

    def _expires(self, claims: Mapping[str, Any]) -> datetime:
        return datetime.fromtimestamp(min(int(claims["exp"]), _FAR) + self._config.leeway_s, UTC)

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        config = self._config
        try:
            user = at(claims, config.user)
            groups = groups_of(config.groups, claims)
        except ClaimError as error:
            raise _BadToken(str(error)) from None
        if not isinstance(user, str) or not is_name(user):
            raise _BadToken(f"has no name of a user in {shown(config.user)}")
        read = {name: _value(name, claims[name]) for name in config.claims if name in claims}
        return Principal(
            f"{config.name}:{user}",
            groups,
            # null is how some issuers say that there is none
            MappingProxyType({name: value for name, value in read.items() if value is not None}),
            via=f"jwt:{config.name}",
            expires=self._expires(claims),
        )


class _BadToken(Exception):  # noqa: N818  (what it is, and named as one)
    """What is wrong with it, for its sender."""


def _unverified(token: str) -> Mapping[str, Any] | None:
    """What a token says, its `header` and `payload`; None for what is no token."""
    if len(token) > MAX_TOKEN_CHARS:
        return None
    try:
        return jwt.decode_complete(token, options={"verify_signature": False})
    except jwt.PyJWTError:
        return None


def _value(name: str, value: Any) -> object:
    """A claim as policies may read it. Raises _BadToken."""
    if isinstance(value, list) and all(map(_is_text, value)):
        return tuple(value)
    if value is None or _is_text(value) or isinstance(value, int) or _is_finite(value):
        return value
    # Left out, it would be as if the issuer had said nothing.
    raise _BadToken(f"has neither text, number, boolean nor list of texts in {shown([name])}")


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair is text to Python alone.
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
