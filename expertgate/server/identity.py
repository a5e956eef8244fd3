"""Who asks: from a request's credential to its principal."""

from typing import Protocol

from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.config import IdentityConfig
from expertgate.server.errors import ApiError, invalid_credential
from expertgate.server.keys import PREFIX, BadCredential, KeyStore

_ASSERTED = ("X-Forwarded-User", "X-Forwarded-Groups")


class CredentialSource(Protocol):
    """One kind of credential."""

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        """None for a request without a credential of this kind.

        Raises ApiError 401 for one that has it, and where it doesn't hold.
        """

    def refresh(self) -> int:
        """Looks now at what credentials are judged by; how often that has changed."""


class ApiKeys:
    """`Authorization: Bearer eg-…`."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        scheme, _, secret = connection.headers.get("Authorization", "").partition(" ")
        secret = secret.strip(" ")
        if scheme.lower() != "bearer" or not secret.startswith(PREFIX):
            return None
        try:
            return self._keys.principal_for(secret)
        except BadCredential:
            raise invalid_credential("this API key is not valid") from None

    def refresh(self) -> int:
        return self._keys.refresh()


class Identity:
    """Asks every source that is configured, in a fixed order; the first that knows one decides."""

    def __init__(self, config: IdentityConfig) -> None:
        """Raises KeysError."""
        self._sources: tuple[CredentialSource, ...] = (ApiKeys(KeyStore(config.api_keys)),)

    async def identify(self, connection: HTTPConnection) -> Principal:
        """Raises ApiError: 401 without a credential that holds, 400 for an asserted identity."""
        for name in _ASSERTED:
            if name in connection.headers:
                # Ignored, it would leave a gateway believing that its user is the one who asks.
                raise ApiError(400, "invalid_request", f"header {name} may not be sent here", name)
        if len(connection.headers.getlist("Authorization")) > 1:
            # Something in front of us may have judged the other one.
            raise invalid_credential("send one Authorization header, not several")
        for source in self._sources:
            principal = await source.identify(connection)
            if principal is not None:
                return principal
        raise invalid_credential("send an API key: 'Authorization: Bearer eg-...'")

    def refresh(self) -> int:
        """A number that grows where a credential that held may not hold now, or be another's."""
        return sum(source.refresh() for source in self._sources)
