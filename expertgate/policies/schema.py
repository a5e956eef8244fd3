"""What policies can speak of: users in groups, the action `consult`, experts, and a context."""

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from expertgate.policies.context import ATTRIBUTES, ClaimKind, declaration

_SCHEMA = """\
entity Group;
entity User in [Group];
entity Expert = {{ owner: String, license: String, tags: Set<String> }};
action consult appliesTo {{
  principal: [User],
  resource: [Expert],
  context: {},
}};
"""


@dataclass(frozen=True, slots=True)
class Resource:
    """One expert as policies see it: `Expert::"name"` with these attributes."""

    name: str
    owner: str
    license: str
    tags: tuple[str, ...]


def schema(claims: Mapping[str, ClaimKind], attributes: Set[str] = ATTRIBUTES.keys()) -> str:
    """Cedar's schema, with these attributes in the context."""
    return _SCHEMA.format(declaration(attributes, claims))


def resource_entities(resources: Iterable[Resource]) -> str:
    """The experts in Cedar's JSON form for entities."""
    return json.dumps(
        [
            {
                "uid": {"type": "Expert", "id": resource.name},
                "attrs": {
                    "owner": resource.owner,
                    "license": resource.license,
                    "tags": resource.tags,
                },
                "parents": [],
            }
            for resource in resources
        ]
    )


def user_entity(user: str, groups: Iterable[str]) -> str:
    """A user and its groups in Cedar's JSON form, where an id is data whatever it contains."""
    parents = [{"type": "Group", "id": group} for group in sorted(groups)]
    return json.dumps([{"uid": {"type": "User", "id": user}, "attrs": {}, "parents": parents}])
