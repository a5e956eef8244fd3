"""What policies speak of and nobody has.

It may be yet to come, and so is no fault; but a `forbid` with a misspelt group forbids nobody, and
nothing else would tell.
"""

import difflib
from collections.abc import Iterable, Iterator, Set

from expertgate.policies.schema import Resource
from expertgate.policies.statement import Statement


def doubts(
    policies: Iterable[Statement], resources: Iterable[Resource], groups: Set[str] | None
) -> Iterator[str]:
    """A line for each place at which a policy names what there is none of now.

    An owner, a licence, a tag, or a group that isn't of `groups`; None where there may be others.
    """
    known: dict[str, Set[str]] = {"owner": set(), "license": set(), "tags": set()}
    for resource in resources:
        known["owner"] |= {resource.owner}
        known["license"] |= {resource.license}
        known["tags"] |= set(resource.tags)
    for policy in policies:
        for place, attribute, value in policy.values():
            if attribute in known and value not in known[attribute]:
                what = "tag" if attribute == "tags" else attribute
                yield f'{place}: no expert has the {what} "{value}"{_hint(value, known[attribute])}'
        if groups is not None:
            for place, name in policy.named("Group"):
                if name not in groups:
                    yield f'{place}: nobody is in Group::"{name}"{_hint(name, groups)}'


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
