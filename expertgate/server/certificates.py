"""Who asks, by the client certificate of the connection (mutual TLS).

The TLS layer has checked it against the configuration's `tls.client_ca`. The subject's common name
is the user, its organisational units are the groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.changes import CredentialsChanged
from expertgate.server.errors import invalid_credential
from expertgate.server.names import Name

STATE = "client_certificate"
"""Under this, a connection's state holds what `ssl.SSLSocket.getpeercert` tells of it."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)


class ClientCertificates:
    """`name` stands before the common name, as an issuer's does before its users'."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def identify(self, connection: HTTPConnection) -> Principal | None:
        """None without a certificate, or with another credential besides. Raises ApiError 401."""
        certificate = connection.scope.get("state", {}).get(STATE)
        if certificate is None or "Authorization" in connection.headers:
            return None
        names = _values(certificate, "commonName")
        units = _values(certificate, "organizationalUnitName")
        try:
            if len(names) != 1:
                raise ValueError(f"{len(names)} common names")
            user = _NAME.validate_python(f"{self._name}:{names[0]}")
            groups = frozenset(map(_NAME.validate_python, units))
        except (ValueError, ValidationError):
            message = "the client certificate's subject must have one printable common name"
            raise invalid_credential(message) from None
        return Principal(user, groups, via="certificate")

    async def refresh(self) -> CredentialsChanged | None:
        return None


def _values(certificate: Mapping[str, Any], attribute: str) -> list[str]:
    subject: Sequence[Sequence[tuple[str, str]]] = certificate.get("subject", ())
    return [value for part in subject for key, value in part if key == attribute]
