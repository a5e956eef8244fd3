"""What policies can speak of: users in groups, the action `consult`, and experts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

SCHEMA = """\
entity Group;
entity User in [Group];
entity Expert = { owner: String, license: String, tags: Set<String> };
action consult appliesTo {
  principal: [User],
  resource: [Expert],
  context: { purpose?: String },
};
"""


@dataclass(frozen=True, slots=True)
class Resource:
    """One expert as policies see it: `Expert::"name"` with these attributes."""

    name: str
    owner: str
    license: str
    tags: tuple[str, ...]


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
