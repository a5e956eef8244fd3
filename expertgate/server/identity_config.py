"""The configuration's part about who may ask: `identity:`.

identity:
  api_keys: keys.yaml
  jwt:
    - name: corp                      # its users are corp:SUBJECT
      issuer: https://id.example.com  # `iss`, to the letter
      audience: expertgate            # `aud`; one, or a list of which the token has one
      jwks_url: https://id.example.com/keys  # or jwks_file; else by OpenID Connect discovery
      algorithms: [RS256, ES256]      # the default
      leeway_s: 30                    # the default; how far clocks may differ
      user: sub                       # the default
      groups:
        - claim: [realm_access, roles]
          values: {ds-research: research}
        - {claim: teams, prefix: team-}
      claims: [department]            # for policies; the top-level claims have types
  certificates:                       # of clients, by tls.client_ca
    name: mesh                        # its users are mesh:NAME, by the subject's common name
    groups:                           # as a token's; claims are the subject's attributes
      - {claim: organizationalUnitName, values: {R&D: research}}
  anonymous: false                    # the default
"""

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    model_validator,
)

from expertgate.faults import Place
from expertgate.server.names import Name, printable

_SYMMETRIC = ("HS256", "HS384", "HS512", "none")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _asymmetric(value: object) -> object:
    if value in _SYMMETRIC:
        # Whoever could verify such a token could make it, and the keys that verify are public.
        raise ValueError(f"{value} is no signature; only those with a public key are")
    return value


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _not_empty(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("must name at least one")
    return value


def checked_url(value: str) -> str:
    """A URL that a key may be fetched from. Raises ValueError."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.fragment:
        raise ValueError("must be a URL, https://...")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must have no user or password in it")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError("must be https://; what comes without could be anybody's keys")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


Algorithm = Annotated[
    Literal[
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
    ],
    BeforeValidator(_asymmetric),
]
Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(printable)]
ClaimPath = Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), AfterValidator(_not_empty)]
"""Where a claim stands: its name, or the names on the way to it. A dot in a name is just a dot."""


ShortName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""Stands before a colon and the names of users."""


class GroupRule(_Part):
    """Which groups a claim, text or a list of texts, stands for."""

    claim: ClaimPath
    prefix: str = ""
    values: Mapping[Text, Name] | None = None
    """The only values that count, each with the group that it means."""

    @model_validator(mode="after")
    def _one_way(self) -> "GroupRule":
        if self.prefix and self.values is not None:
            raise ValueError("has prefix and values; `values` names groups in full")
        return self


class IssuerConfig(_Part):
    """An issuer of tokens, and what its tokens say."""

    name: ShortName
    issuer: Text
    audience: Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), AfterValidator(_not_empty)]
    jwks_url: Annotated[str, AfterValidator(checked_url)] | None = None
    jwks_file: Path | None = None
    algorithms: Annotated[tuple[Algorithm, ...], AfterValidator(_not_empty)] = ("RS256", "ES256")
    leeway_s: Annotated[int, Field(strict=True, ge=0, le=300)] = 30
    user: ClaimPath = ("sub",)
    groups: tuple[GroupRule, ...] = ()
    claims: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _one_place(self) -> "IssuerConfig":
        if self.jwks_url is not None and self.jwks_file is not None:
            raise ValueError("has jwks_url and jwks_file; name one of them")
        if self.jwks_url is None and self.jwks_file is None:
            try:
                checked_url(self.issuer)
            except ValueError:
                raise ValueError(
                    "has neither jwks_url nor jwks_file, and an issuer that is no https:// URL"
                ) from None
        return self


class CertificatesConfig(_Part):
    """Users by their client certificates, and what the subjects of these say."""

    name: ShortName
    groups: tuple[GroupRule, ...] = ()


class IdentityConfig(_Part):
    """Where credentials are looked up; see the module's words for an example."""

    api_keys: Path | None = None
    jwt: tuple[IssuerConfig, ...] = ()
    certificates: CertificatesConfig | None = None
    anonymous: StrictBool = False

    @model_validator(mode="after")
    def _somebody(self) -> "IdentityConfig":
        if not (self.api_keys or self.jwt or self.certificates or self.anonymous):
            raise ValueError(
                "lets nobody in; name at least one of api_keys, jwt, certificates and anonymous"
            )
        for field in ("name", "issuer"):
            values = [getattr(issuer, field) for issuer in self.jwt]
            if len(set(values)) < len(values):
                raise ValueError(f"jwt has two issuers of the same {field}")
        if self.certificates and self.certificates.name in [each.name for each in self.jwt]:
            raise ValueError("an issuer and the certificates have the same name")
        return self

    def mapped_groups(self) -> frozenset[str] | None:
        """All that tokens and certificates can bring, by `values`; None without such a list."""
        rules = [rule for issuer in self.jwt for rule in issuer.groups]
        rules += self.certificates.groups if self.certificates else ()
        found: set[str] = set()
        for rule in rules:
            if rule.values is None:
                return None
            found |= set(rule.values.values())
        return frozenset(found)

    def claims(self) -> Iterator[tuple[Place, str]]:
        """Every claim that policies get to see, and the place in here that says so."""
        for i, issuer in enumerate(self.jwt):
            for j, claim in enumerate(issuer.claims):
                yield ("jwt", i, "claims", j), claim

    def beside(self, folder: Path) -> "IdentityConfig":
        """The same with every path resolved against `folder`."""
        issuers = tuple(
            each.model_copy(update={"jwks_file": each.jwks_file and folder / each.jwks_file})
            for each in self.jwt
        )
        return self.model_copy(
            update={"api_keys": self.api_keys and folder / self.api_keys, "jwt": issuers}
        )
