"""What policies speak of and nobody has.

It may be yet to come, and so is no fault; but a `forbid` with a misspelt group forbids nobody, and
nothing else would tell.
"""

import difflib
from collections.abc import Iterable, Iterator, Set

from expertgate.policies.schema import Resource
from expertgate.policies.statement import Statement

_MOST = 20
"""Lines; of what else is in doubt only the number is told."""
_MANY = 200
"""Among so many names, looking for one that is like another would take seconds."""


def doubts(
    policies: Iterable[Statement], resources: Iterable[Resource], groups: Set[str] | None
) -> Iterator[str]:
    """A line for each place at which a policy names what there is none of now.

    An owner, a licence, a tag, or a group that isn't of `groups`; None where there may be others.
    Not such names as are written with an escape.
    """
    found = list(_strange(policies, resources, groups))
    for words, name, known in found[:_MOST]:
        yield words + _hint(name, known)
    if len(found) > _MOST:
        yield f"{len(found) - _MOST} more places name what nobody has"


def _strange(
    policies: Iterable[Statement], resources: Iterable[Resource], groups: Set[str] | None
) -> Iterator[tuple[str, str, Set[str]]]:
    """Of each, the words for it, its name, and those that there are."""
    known: dict[str, Set[str]] = {"owner": set(), "license": set(), "tags": set()}
    for resource in resources:
        known["owner"] |= {resource.owner}
        known["license"] |= {resource.license}
        known["tags"] |= set(resource.tags)
    for policy in policies:
        for place, attribute, value in policy.values():
            # An empty one stands for none, whether or not there is an expert without.
            if value and attribute in known and value not in known[attribute]:
                what = "tag" if attribute == "tags" else attribute
                yield f'{place}: no expert has the {what} "{value}"', value, known[attribute]
        if groups is not None:
            for place, name in policy.named("Group"):
                if name not in groups and "\\" not in name:
                    yield f'{place}: nobody is in Group::"{name}"', name, groups


def _hint(name: str, names: Set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1) if len(names) < _MANY else []
    return f"; did you mean {near[0]}?" if near else ""
