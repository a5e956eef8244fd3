"""The server's configuration: one YAML file.

    model: ./checkpoint            # a folder, or a Hub id; the command line may name it instead
    revision: main                 # of a Hub id
    catalogue: experts.json        # default: beside the model's config.json
    identity:                      # see identity_config
      api_keys: keys.yaml
    policies: policies/            # every *.cedar in it
    claims: {department: string}   # of tokens, those that policies may read, and their types
    suspended: suspended.yaml      # the default; `expertgate experts suspend` writes it
    audit:                         # on by default, in these places
      path: audit                  # a folder
      signing_key: audit-key.pem   # made if it is missing
    host: 127.0.0.1
    port: 8000
    tls:                           # none where it isn't said
      certificate: server.pem
      key: server.key
      client_ca: clients.pem       # makes it mutual: others can't connect
    limits:                        # what each principal of a group may ask; "*": of all others
      research: {requests_per_minute: 600, tokens_per_minute: 1000000, concurrent: 32}
      "*": {concurrent: 4}
    admin:                         # metrics, and suspending experts; none where it isn't said
      listen: 127.0.0.1:9100       # or unix:/run/expertgate/admin.sock
      token: admin-token           # a file with the operators' token
    logs: text                     # or json
    drain_s: 30                    # what runs may go on for so long after SIGTERM
    keep_alive_s: 130              # a connection stays open for so long between two requests
    tool_parser: olmo3             # vLLM's name of how the model writes its calls of tools
    engine:                        # vLLM's own arguments, as they are
      max_model_len: 2048

Paths are relative to the file's folder.
"""

import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from expertgate.faults import Place
from expertgate.policies.context import ClaimKind
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.yaml_file import YamlError, YamlFile

CONFIG_FILE = "expertgate.yaml"
"""In the current folder, where no other is named."""


class ConfigError(ValueError):
    """What is wrong with a configuration: one fault a line, each with file, line and place."""


ClaimName = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,256}$", strict=True)]
"""Printable ASCII without blanks; many are addresses, such as `https://acme.example/department`."""


class AuditConfig(BaseModel):
    """Where the audit log is kept, and what happens to requests that it can't record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: Annotated[bool, Field(strict=True)] = True
    path: Path = Path("audit")
    signing_key: Path = Path("audit-key.pem")
    rotate_mib: Annotated[int, Field(strict=True, ge=1, le=1024)] = 64
    sign_every: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 256
    on_failure: Literal["closed", "open"] = "closed"
    receipt_principal: Literal["plain", "hashed"] = "plain"

    def beside(self, folder: Path) -> "AuditConfig":
        """The same with every path resolved against `folder`."""
        paths = {"path": folder / self.path, "signing_key": folder / self.signing_key}
        return self.model_copy(update=paths)


EVERYONE = "*"
"""Under `limits`, those principals of whom no group is named there."""

_Count = Annotated[int, Field(strict=True, ge=1, le=1 << 53)]


class Limits(BaseModel):
    """What one principal may ask; None is no limit. Tokens are those read and those written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent: _Count | None = None


class TlsConfig(BaseModel):
    """What the public listener shows, and what it asks of clients."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def beside(self, folder: Path) -> "TlsConfig":
        """The same with every path resolved against `folder`."""
        return TlsConfig(
            certificate=folder / self.certificate,
            key=folder / self.key,
            client_ca=self.client_ca and folder / self.client_ca,
        )

    def check(self) -> None:
        """Raises ConfigError for files that can't be used."""
        for path in filter(None, (self.certificate, self.key, self.client_ca)):
            try:
                path.read_bytes()
            except OSError as error:
                raise ConfigError(f"tls: {path}: {error.strerror or error}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password, OpenSSL would ask whoever sits at the terminal for it.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:  # as SSLError is
            words = "are no certificate and its private key, unencrypted, both in PEM"
            files = f"{self.certificate} and {self.key}"
            raise ConfigError(f"tls: {files}: {words} ({error.strerror or error})") from None
        try:
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except OSError as error:
            words = f"has no certificate in PEM ({error.strerror or error})"
            raise ConfigError(f"tls: client_ca {self.client_ca}: {words}") from None


_LEAST_TOKEN_CHARS = 32


_LISTEN = re.compile(r"unix:.+|(?:\[[0-9a-fA-F:.]+\]|[^\s:/]+):(\d{1,5})")
_LAST_PORT = 65535


def _listen(value: object) -> object:
    found = _LISTEN.fullmatch(value) if isinstance(value, str) else None
    # A resolver takes a port that is too large for another one.
    if found is None or int(found[1] or 0) > _LAST_PORT:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:9100, or unix:PATH")
    return value


class AdminConfig(BaseModel):
    """The operators' listener."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: Annotated[str, BeforeValidator(_listen)]
    token: Path

    def beside(self, folder: Path) -> "AdminConfig":
        """The same with every path resolved against `folder`."""
        kind, _, path = self.listen.partition(":")
        listen = f"unix:{folder / path}" if kind == "unix" else self.listen
        return AdminConfig(listen=listen, token=folder / self.token)

    def read_token(self) -> str:
        """Raises ConfigError."""
        hint = f"write one with: openssl rand -hex 32 > {self.token}"
        try:
            token = self.token.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "is not text"
            raise ConfigError(f"{self.token}: {why}; {hint}") from None
        if len(token) < _LEAST_TOKEN_CHARS or not token.isascii():
            least = f"at least {_LEAST_TOKEN_CHARS} ASCII characters"
            raise ConfigError(f"{self.token}: the token must have {least}; {hint}")
        return token


KEEP_ALIVE_S = 130
"""Longer than clients and most gateways keep an idle connection. Who asks again on one that the
server is just closing gets no answer, and nobody may repeat a POST for it."""

_IN_THE_LOG = (
    "stands in the folder of the audit log, which the server holds locked, so that no command "
    "could change the file; name one elsewhere, or another folder as audit.path"
)


class Config(BaseModel):
    """See the module's words for an example."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    catalogue: Path | None = None
    identity: IdentityConfig
    policies: Path
    claims: dict[ClaimName, ClaimKind] = Field(default_factory=dict)
    suspended: Path = Path("suspended.yaml")
    audit: AuditConfig = AuditConfig()
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(strict=True, ge=0, le=_LAST_PORT)] = 8000
    limits: dict[str, Limits] = Field(default_factory=dict)
    tls: TlsConfig | None = None
    admin: AdminConfig | None = None
    logs: Literal["text", "json"] = "text"
    drain_s: Annotated[int, Field(strict=True, ge=0, le=1 << 31)] = 30
    keep_alive_s: Annotated[int, Field(strict=True, ge=1, le=86_400)] = KEEP_ALIVE_S
    tool_parser: str | None = "olmo3"
    engine: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _certificates(self) -> "Config":
        if self.identity.certificates and not (self.tls and self.tls.client_ca):
            raise ValueError("identity.certificates needs tls.client_ca, by which they are checked")
        return self

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Raises ConfigError."""
        try:
            file = YamlFile.read(path)
            if file.value is None:
                raise file.fault((), "is empty; it must name at least identity and policies")
            config = file.validate(cls)
            for place, claim in config.identity.claims():
                if claim not in config.claims:
                    words = f"{claim!r} has no type; give it one in the top-level claims"
                    raise file.fault(("identity", *place), words)
            config = config._beside(path.parent.absolute())
            for place, edited in config._edited():
                if config.audit.enabled and _folder(edited) == os.path.realpath(config.audit.path):
                    raise file.fault(place, f"{edited}: {_IN_THE_LOG}")
            return config
        except YamlError as error:
            raise ConfigError(str(error)) from None

    def _edited(self) -> Iterator[tuple[Place, Path]]:
        """The files that commands change while the server runs, and where each is named."""
        yield ("suspended",), self.suspended
        if self.identity.api_keys is not None:
            yield ("identity", "api_keys"), self.identity.api_keys

    def _beside(self, folder: Path) -> "Config":
        """The same with every path resolved against `folder`."""
        model = self.model
        # A Hub id looks like a path; it is one where there is such a folder, or a dot before it.
        if model is not None and (model.startswith(".") or (folder / model).is_dir()):
            model = str(folder / model)
        return self.model_copy(
            update={
                "model": model,
                "catalogue": None if self.catalogue is None else folder / self.catalogue,
                "identity": self.identity.beside(folder),
                "suspended": folder / self.suspended,
                "policies": folder / self.policies,
                "audit": self.audit.beside(folder),
                "tls": self.tls and self.tls.beside(folder),
                "admin": self.admin and self.admin.beside(folder),
            }
        )


def _folder(path: Path) -> str:
    """That in which a file really stands, links followed."""
    return os.path.dirname(os.path.realpath(path))
