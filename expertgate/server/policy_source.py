"""The policies and experts that a command is about: of the configuration, or given by options."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from expertgate.model.catalogue import FILE_NAME, Catalogue
from expertgate.model.checkpoint import Checkpoint
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import ClaimKind
from expertgate.server import suspensions
from expertgate.server.config import CONFIG_FILE, Config
from expertgate.server.policy_files import resources
from expertgate.server.refusals import SettingError


@dataclass(frozen=True, slots=True)
class PolicySource:
    folder: Path | None
    catalogue: Catalogue
    claims: Mapping[str, ClaimKind]
    suspended: frozenset[str]

    @classmethod
    def of(
        cls,
        config: Path | None,
        policies: Path | None,
        catalogue: Path | None,
        claims: Mapping[str, ClaimKind] = MappingProxyType({}),
    ) -> "PolicySource":
        """What is given overrides the configuration, which need not be there unless it is named.

        Raises ConfigError, CatalogueError, CheckpointError, SettingError or SuspensionError.
        """
        path = config or Path(CONFIG_FILE)
        if config is None and catalogue is not None and not path.exists():
            return cls(policies, Catalogue.read(catalogue), claims, frozenset())
        if config is None and not path.exists():
            raise SettingError(
                f"{path}: No such file or directory; name the configuration with --config, or "
                "give --catalogue and, for policies, --policies"
            )
        found = Config.load(path)
        for name, kind in claims.items():
            known = found.claims.get(name, kind)
            if kind != known:  # what is tried would be another thing than what is served
                raise SettingError(f"--claims {name}:{kind}: {path} declares that claim as {known}")
        experts = _catalogue(found, catalogue)
        suspended = suspensions.read(found.suspended) or frozenset()
        return cls(policies or found.policies, experts, {**found.claims, **claims}, suspended)

    def load(self, folder: Path | None = None) -> PolicySet:
        """The policies of `folder`, where it isn't the one. Raises PolicyError or SettingError."""
        wanted = folder or self.folder
        if wanted is None:
            raise SettingError("no policies: name their folder with --policies, or a configuration")
        return PolicySet.load(wanted, resources(self.catalogue), self.claims)


def _catalogue(config: Config, given: Path | None) -> Catalogue:
    path = given or config.catalogue
    if path is not None:
        return Catalogue.read(path)
    # A Hub id would be a download, of which only the names are wanted.
    if config.model is None or not Path(config.model).is_dir():
        raise SettingError(
            f"no catalogue: {config.model or 'no model'} is no folder here; name its {FILE_NAME} "
            "with --catalogue, or as `catalogue:` in the configuration"
        )
    beside = Path(config.model) / FILE_NAME
    if beside.exists():
        return Catalogue.read(beside)
    return Catalogue.default(Checkpoint(Path(config.model)).num_experts)
