"""The configuration's part about who may ask: `identity:`.

identity:
api_keys: keys.yaml
anonymous: false       # the default
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, StrictBool, model_validator


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IdentityConfig(_Part):
    """Where credentials are looked up; see the module's words for an example."""

    api_keys: Path | None = None
    anonymous: StrictBool = False

    @model_validator(mode="after")
    def _somebody(self) -> "IdentityConfig":
        if self.api_keys is None and not self.anonymous:
            raise ValueError("lets nobody in; name at least one of api_keys and anonymous")
        return self

    def beside(self, folder: Path) -> "IdentityConfig":
        """The same with every path resolved against `folder`."""
        return self.model_copy(update={"api_keys": self.api_keys and folder / self.api_keys})
