"""Who asks: from a request's credential to its principal."""

from dataclasses import replace
from typing import Protocol

from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.bearer import bearer_token
from expertgate.server.certificates import ClientCertificates
from expertgate.server.changes import CredentialsChanged
from expertgate.server.errors import invalid_credential
from expertgate.server.gateway import named_user, refuse_named_user
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.keys import PREFIX, BadCredential, KeyStore
from expertgate.server.names import ANONYMOUS
from expertgate.server.tokens import TokenIssuer


class CredentialSource(Protocol):
    """One kind of credential."""

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        """None for a request without a credential of this kind.

        Raises ApiError 401 for one that has it, and where it doesn't hold.
        """

    async def refresh(self) -> CredentialsChanged | None:
        """Looks at what credentials are judged by; what is another from now on.

        Between that and the return nothing is awaited, so that whoever asks can act before anybody
        is identified by it. Only keys that were fetched may have been believed since the last look.
        """


class ApiKeys:
    """`Authorization: Bearer eg-…`: the key's own user, or the one whom a gateway's key names."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        secret = bearer_token(connection.headers)
        if not secret.startswith(PREFIX):
            return None
        try:
            found = self._keys.find(secret)
        except BadCredential:
            raise invalid_credential("this API key is not valid") from None
        if found.key.may_assert:
            return replace(named_user(found.key, connection.headers), expires=found.ends)
        refuse_named_user(connection.headers)
        return Principal(found.key.id, found.key.groups, via="key", expires=found.ends)

    @property
    def groups(self) -> frozenset[str]:
        return self._keys.groups

    async def refresh(self) -> CredentialsChanged | None:
        changed = await self._keys.refresh()
        return CredentialsChanged(None, changed) if changed else None


class Anonymous:
    """No credential at all; a bad one is not none."""

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        if "Authorization" in connection.headers:
            return None
        return Principal(ANONYMOUS, via=ANONYMOUS)

    async def refresh(self) -> CredentialsChanged | None:
        return None


class Identity:
    """Asks every source that is configured, in a fixed order; the first that knows one decides."""

    def __init__(self, config: IdentityConfig) -> None:
        """Raises KeysError and JwksError."""
        self._mapped = config.mapped_groups()
        self._keys = ApiKeys(KeyStore(config.api_keys)) if config.api_keys else None
        others: list[CredentialSource] = []
        others += [TokenIssuer(issuer) for issuer in config.jwt]
        if config.certificates is not None:
            others.append(ClientCertificates(config.certificates))
        if config.anonymous:
            others.append(Anonymous())
        self._others = tuple(others)
        self.sources: tuple[CredentialSource, ...] = tuple(
            source for source in (self._keys, *others) if source is not None
        )

    @property
    def groups(self) -> frozenset[str] | None:
        """Those that somebody may be in, as things are; None where any may be told to us."""
        if self._mapped is None:
            return None
        return self._mapped | (self._keys.groups if self._keys else frozenset())

    async def identify(self, connection: HTTPConnection) -> Principal:
        """Raises ApiError.

        401 without a credential that holds, 400 for a gateway's user named wrongly or by somebody
        else, 503 where an issuer's keys can't be had.
        """
        if len(connection.headers.getlist("Authorization")) > 1:
            # Something in front of us may have judged the other one.
            raise invalid_credential("send one Authorization header, not several")
        principal = await self._keys.identify(connection) if self._keys else None
        if principal is not None:
            return principal
        # Only a key makes a gateway.
        refuse_named_user(connection.headers)
        for source in self._others:
            principal = await source.identify(connection)
            if principal is not None:
                return principal
        if "Authorization" not in connection.headers:
            raise invalid_credential("send a credential: 'Authorization: Bearer ...'")
        if not bearer_token(connection.headers):
            words = "the Authorization header must be 'Bearer', a blank, and the key or token"
            raise invalid_credential(words)
        raise invalid_credential("this credential is of no kind or issuer that is known here")
