"""The files that decisions rest on: the policies of a folder, and the catalogue of experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertgate.model.catalogue import Catalogue, CatalogueError, Expert
from expertgate.policies.cedar import PolicySet, policy_paths
from expertgate.policies.context import ClaimKind
from expertgate.policies.schema import Resource
from expertgate.policies.statement import PolicyError
from expertgate.server.plain_file import check_plain
from expertgate.server.watched import stamp

Stamp = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class PolicyFiles:
    """`catalogue` is None where there is none: such a checkpoint's experts have default names."""

    folder: Path
    catalogue: Path | None
    claims: Mapping[str, ClaimKind]

    def stamp(self) -> Stamp:
        """Differs after every change. Links are followed, so one that is turned elsewhere shows."""
        paths = [*policy_paths(self.folder), *([self.catalogue] if self.catalogue else [])]
        return tuple((str(path), stamp(path)) for path in paths)

    def load(self, running: Catalogue) -> tuple[Catalogue, PolicySet]:
        """What the files say now. Raises PolicyError or CatalogueError.

        Of `running`, the catalogue that the engine was started with, only words can change: whose
        an expert is, its licence, tags and description.
        """
        found = running
        for path in policy_paths(self.folder):
            _check(path, PolicyError)
        if self.catalogue is not None:
            _check(self.catalogue, CatalogueError)
            found = Catalogue.read(self.catalogue)
            if _weights(found.experts) != _weights(running.experts):
                raise CatalogueError(
                    f"{self.catalogue}: names, order and digests of the experts are those of the "
                    "model that runs; restart the server to change them, or suspend an expert"
                )
        return found, PolicySet.load(self.folder, resources(found), self.claims)


def _check(path: Path, kind: type[PolicyError | CatalogueError]) -> None:
    """Raises `kind`, from an OSError, for what is no file."""
    try:
        check_plain(path)
    except OSError as error:
        raise kind(f"{path}: {error.strerror or error}") from error


def resources(catalogue: Catalogue) -> list[Resource]:
    return [Resource(e.name, e.owner, e.license, e.tags) for e in catalogue.experts]


def _weights(experts: Sequence[Expert]) -> list[tuple[str, str | None]]:
    return [(expert.name, expert.sha256) for expert in experts]
