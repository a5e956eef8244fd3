"""What policy says of one request."""

from collections.abc import Mapping
from dataclasses import dataclass

from expertgate.policies.expert_set import ExpertSet


@dataclass(frozen=True, slots=True)
class Decision:
    """The experts that a principal may consult for one request, and why.

    `granted` is the grant; `reasons` names, for every expert of the catalogue by its name, the
    policies that decided it, or says that none permits it; `version` is the digest of the policy
    set that spoke.
    """

    granted: ExpertSet
    reasons: Mapping[str, tuple[str, ...]]
    version: str
