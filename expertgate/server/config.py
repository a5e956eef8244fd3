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
    engine:                        # vLLM's own arguments, as they are
      max_model_len: 2048

Paths are relative to the file's folder.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from expertgate.policies.context import ClaimKind
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.yaml_file import YamlError, YamlFile


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
    host: str = "127.0.0.1"
    port: Annotated[int, Field(strict=True, ge=0, le=65535)] = 8000
    engine: dict[str, Any] = Field(default_factory=dict)

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
            return config._beside(path.parent.absolute())
        except YamlError as error:
            raise ConfigError(str(error)) from None

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
            }
        )
