"""Who asks, by the client certificate of the connection (mutual TLS).

The TLS layer has checked it against the configuration's `tls.client_ca`. The subject's common name
is the user; its attributes, by OpenSSL's long names, are claims that the configuration may make
groups of. It makes none unless told: whoever issues certificates writes what they like into them.
"""

import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.changes import CredentialsChanged
from expertgate.server.claims import ClaimError, groups_of
from expertgate.server.errors import invalid_credential
from expertgate.server.identity_config import CertificatesConfig
from expertgate.server.names import Name

STATE = "client_certificate"
"""Under this, a connection's state holds what `ssl.SSLSocket.getpeercert` tells of it."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)


class ClientCertificates:
    """The configured name stands before the common name, as an issuer's does before its users'."""

    def __init__(self, config: CertificatesConfig) -> None:
        self._config = config

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        """None without a certificate, or with another credential besides. Raises ApiError 401."""
        certificate = connection.scope.get("state", {}).get(STATE)
        if certificate is None or "Authorization" in connection.headers:
            return None
        expires = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
        if expires <= datetime.now(UTC):  # since the connection was made
            raise invalid_credential("the client certificate has expired")
        subject = _subject(certificate)
        try:
            (name,) = subject.get("commonName", [])
            user = _NAME.validate_python(f"{self._config.name}:{name}")
        except (ValueError, ValidationError):
            message = "the client certificate's subject must have one printable common name"
            raise invalid_credential(message) from None
        try:
            groups = groups_of(self._config.groups, subject)
        except ClaimError as error:
            raise invalid_credential(f"the client certificate's subject {error}") from None
        return Principal(user, groups, via="certificate", expires=expires)

    async def refresh(self) -> CredentialsChanged | None:
        return None


def _subject(certificate: Mapping[str, Any]) -> dict[str, list[str]]:
    """The subject's attributes, each with its values."""
    found: dict[str, list[str]] = {}
    for part in certificate.get("subject", ()):
        for attribute, value in part:
            found.setdefault(attribute, []).append(value)
    return found
