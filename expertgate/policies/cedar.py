"""Policies in Cedar: who may consult which expert.

In order: a policy that fails while it is evaluated denies, whatever the others say (Cedar itself
skips it, so that a failing `forbid` would leave access open); else a `forbid` denies; else a
`permit` allows; else the expert is denied.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import cedarpy

from expertgate.policies.context import ATTRIBUTES, ClaimKind, Context, ContextError, record
from expertgate.policies.decision import Decision
from expertgate.policies.doubts import doubts
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.policies.schema import Resource, resource_entities, schema, user_entity
from expertgate.policies.statement import PolicyError, Statement, statements

NOT_PERMITTED = "no policy permits it"

_ATTRIBUTES: Mapping[tuple[str, ...], Sequence[str]] = {
    ("principal",): (),
    ("action",): (),
    ("resource",): ("owner", "license", "tags"),
    ("context",): tuple(ATTRIBUTES),
}
"""The attributes that there are, by the way to what has them. Claims are the configuration's."""

_KINDS = {"principal": ("User",), "resource": ("Expert",)}
_ABOVE = {"principal": ("Group",), "resource": ()}
"""What they may be, and be in."""
_MISTAKE = "1 < true"
_CACHED_DECISIONS = 1024
_MAX_FAULTS = 20
_OPTIONAL = re.compile(r"access to optional attribute `([\w.]+)` in context")
_FAILURE = re.compile(r"error while evaluating policy `(policy\d+)`: (.*)", re.DOTALL)


class PolicySet:
    """The policies of one folder, checked against the experts they speak of. Immutable."""

    def __init__(
        self,
        policies: Sequence[Statement],
        resources: Sequence[Resource],
        claims: Mapping[str, ClaimKind] = MappingProxyType({}),
    ) -> None:
        """Raises PolicyError with a fault of each policy that doesn't hold; see `load`."""
        _refuse(_faults(policies, resources, claims))
        self._ids = _ids(policies)
        self._statements = tuple(policies)
        self._resources = tuple(resources)
        self._claims = dict(claims)
        # One text for validator and evaluator, so that both number its policies alike.
        text = "\n".join(policy.text for policy in policies)
        _validate(text, policies, schema(claims))
        _refuse(_unreached(policies, schema(claims)))
        self._policies = cedarpy.PolicySet.from_str(text)
        # What no policy speaks of is left out of the context, and so out of the cache's key. Were
        # it spoken of after all, the policy would fail, and deny.
        self.reads = _reads(policies)
        """The attributes of the context that decisions may depend on."""
        self._schema = cedarpy.Schema.from_str(schema(claims, self.reads))
        entities = resource_entities(resources)
        self._experts = cedarpy.Entities.from_json_str(entities, self._schema)
        self.version = hashlib.sha256(
            b"expertgate/policy-set/2:"
            + json.dumps([text, self._ids, schema(claims), entities]).encode()
        ).hexdigest()
        """Hex SHA-256 over all that a decision depends on, save what it is asked."""
        self._cached = lru_cache(maxsize=_CACHED_DECISIONS)(self._decide)

    @classmethod
    def load(
        cls,
        folder: Path,
        resources: Sequence[Resource],
        claims: Mapping[str, ClaimKind] = MappingProxyType({}),
    ) -> "PolicySet":
        """Every `*.cedar` of `folder`, in the order of their names.

        The position of a resource is the index of its expert; `claims` are those that policies may
        read, with their types.

        Raises PolicyError where there is no policy at all, or one that can't be read (from an
        OSError) or parsed, doesn't fit the schema (Cedar's strict validation), names an expert that
        isn't there, or has another's `@id`; and OSError where the folder can't be listed.
        """
        # All are read before any is parsed: what can't be read is tried again, many times a second.
        texts = [(_named(path), _text(path)) for path in policy_paths(folder)]
        policies = [policy for path, text in texts for policy in statements(text, path)]
        if not policies:
            # Nobody could do anything, which no one would set up a server for.
            where = "" if folder.is_dir() else "is no folder: "
            raise PolicyError(
                f"{folder}: {where}there is no policy, so no expert could be consulted; put at "
                "least one `permit(...);` into a *.cedar file there"
            )
        return cls(policies, resources, claims)

    def __len__(self) -> int:
        return len(self._ids)

    def decide(self, principal: Principal, context: Context) -> Decision:
        """Which experts `principal` may consult. Decisions are cached.

        What can't be put to the policies (a claim of another type than it is declared, text that
        is none) denies every expert, with a reason.
        """
        try:
            found = record(context, principal, self.reads, self._claims)
        except ContextError as error:
            return self._deny_all(str(error))
        return self._cached(principal.id, principal.groups, json.dumps(found, sort_keys=True))

    def doubts(self, groups: Set[str] | None = None) -> list[str]:
        """A line for each thing that is spoken of and nobody has; `groups` are all, where known."""
        return list(doubts(self._statements, self._resources, groups))

    # Its arguments are the key of the cache: a decision sees nothing that isn't in its key.
    def _decide(self, user: str, groups: frozenset[str], context: str) -> Decision:
        try:
            entities = self._experts.with_added_json_str(user_entity(user, groups), self._schema)
        except ValueError as error:
            # Half of a surrogate pair in an id: text to Python, not to Cedar.
            return self._deny_all(f"the principal can't be put to the policies: {error}")
        results = cedarpy.is_authorized_batch(
            [
                {
                    "principal": {"type": "User", "id": user},
                    "action": {"type": "Action", "id": "consult"},
                    "resource": {"type": "Expert", "id": resource.name},
                    "context": context,
                }
                for resource in self._resources
            ],
            self._policies,
            entities,
            self._schema,
        )
        granted = []
        reasons: dict[str, tuple[str, ...]] = {}
        for index, (resource, result) in enumerate(zip(self._resources, results, strict=True)):
            diagnostics = result.diagnostics
            if diagnostics.errors:
                reasons[resource.name] = tuple(map(self._failure, diagnostics.errors))
                continue
            if result.allowed:
                granted.append(index)
            decided = tuple(sorted({self._id(policy) for policy in diagnostics.reasons}))
            reasons[resource.name] = decided or (NOT_PERMITTED,)
        return Decision(ExpertSet.of(granted), reasons, self.version)

    def _deny_all(self, reason: str) -> Decision:
        return Decision(ExpertSet(0), {r.name: (reason,) for r in self._resources}, self.version)

    def _id(self, policy: str) -> str:
        """Our id of a policy that Cedar calls `policy3`."""
        return self._ids[int(policy.removeprefix("policy"))]

    def _failure(self, message: str) -> str:
        """Cedar's words on a policy that failed, with our id of it."""
        match = _FAILURE.fullmatch(message)
        return f"{self._id(match[1])} failed: {match[2]}" if match else message


def _named(path: Path) -> Path:
    """The path itself. Raises PolicyError where it can't name policies in decisions and records."""
    if not path.name.isprintable():  # as is no name that isn't UTF-8
        raise PolicyError(
            f"{str(path)!r}: the name of a file of policies must be printable text, in UTF-8, "
            "because it names those without an @id; rename it"
        )
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # some editors begin a file with a mark that nobody sees
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: is not UTF-8") from None


def policy_paths(folder: Path) -> list[Path]:
    """The policy files of a folder by their names; not the hidden ones that editors make."""
    return sorted(path for path in folder.glob("*.cedar") if not path.name.startswith("."))


def _refuse(faults: Iterable[str]) -> None:
    """Raises PolicyError where there are any, a line each."""
    found = list(faults)
    if len(found) > _MAX_FAULTS:
        found[_MAX_FAULTS:] = [f"there are {len(found) - _MAX_FAULTS} more faults"]
    if found:
        raise PolicyError("\n".join(found))


def _faults(
    policies: Iterable[Statement], resources: Sequence[Resource], claims: Mapping[str, ClaimKind]
) -> Iterator[str]:
    """The first fault of each policy by itself."""
    for policy in policies:
        try:
            policy.check()
            _check_experts(policy, resources)
            _check_kinds(policy)
            _check_attributes(policy, claims)
        except PolicyError as error:
            yield str(error)


def _check_experts(policy: Statement, resources: Iterable[Resource]) -> None:
    # Cedar takes any id for granted, and a `forbid` on a misspelt expert forbids nothing.
    known = [resource.name for resource in resources]
    for place, name in policy.named("Expert"):
        if name not in known:
            raise PolicyError(
                f'{place}: there is no Expert::"{name}"; the experts are {", ".join(known)}'
            )


def _check_kinds(policy: Statement) -> None:
    # Cedar takes a comparison with what a variable can never be for one that doesn't hold just now;
    # and `unless { principal == Group::"x" }` leaves out nobody.
    for place, variable, sign, kind in policy.compared():
        wanted = _KINDS[variable] if sign != "in" else (*_KINDS[variable], *_ABOVE[variable])
        if kind not in wanted:
            hint = '; a group is asked for by `principal in Group::"name"`'
            raise PolicyError(
                f"{place}: {variable} {sign} {kind}: no {variable} is such a thing"
                + (hint if kind == "Group" else "")
            )
    for place, network in policy.equals_networks():
        raise PolicyError(
            f"{place}: no address is equal to the network {network}; "
            f'ask for `address.isInRange(ip("{network}"))`'
        )


def _check_attributes(policy: Statement, claims: Mapping[str, ClaimKind]) -> None:
    # Cedar takes `has` with any name for a question whose answer may be no, and a `forbid` that
    # asks for a misspelt attribute forbids nothing.
    known = {**_ATTRIBUTES, ("context", "claims"): tuple(claims)}
    anywhere = [name for names in known.values() for name in names]
    for place, way, name in policy.asked_for():
        names = known.get(way, anywhere)
        if name in names or "\\" in name:  # an escape may stand for any letter
            continue
        hint = _hint(name, names)
        if way == ("context", "claims"):
            raise PolicyError(f"{place}: the claim {name!r} is not declared{hint}")
        raise PolicyError(f"{place}: {'.'.join((*way, name))}: there is no such attribute{hint}")


def _hint(name: str, names: Sequence[str]) -> str:
    """What `name` may have been meant for, of those that there are."""
    if near := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {near[0]}?"
    return f", only {', '.join(names)}" if names else ""


def _reads(policies: Iterable[Statement]) -> frozenset[str]:
    """Attributes of the context whose names stand in a policy, or in a string that may spell them.

    More of them than are read, perhaps, and never fewer.
    """
    words = {token.text for policy in policies for token in policy.tokens}
    strings = {word for word in words if word.startswith('"')}
    if any("\\" in string for string in strings):  # an escape may stand for any letter
        return frozenset(ATTRIBUTES)
    return frozenset(a for a in ATTRIBUTES if a in words or any(a in s for s in strings))


def _ids(policies: Sequence[Statement]) -> list[str]:
    """By the place of each policy. Raises PolicyError where one was given another's."""
    places: dict[str, str] = {}
    for policy in policies:
        given = policy.given_id()
        if given in places:
            raise PolicyError(
                f"{policy.place}: the @id {given!r} is that of the policy at {places[given]}; "
                "ids name policies in decisions, so each needs its own"
            )
        if given is not None:
            places[given] = policy.place
    for policy in policies:
        if policy.given_id() is None and policy.id in places:
            raise PolicyError(
                f"{places[policy.id]}: the @id {policy.id!r} is what the policy at {policy.place} "
                "is called, which has none; ids name policies in decisions, so choose another"
            )
    return [policy.id for policy in policies]


def _validate(text: str, policies: Sequence[Statement], schema_text: str) -> None:
    """`text` is that of the `policies`, in their order. Raises PolicyError."""
    faults: dict[int, str] = {}  # the first of each policy, as others may follow from it
    for error in cedarpy.validate_policies(text, schema_text).errors:
        index = int(error.policy_id.removeprefix("policy"))
        words = error.error.removeprefix(f"for policy `{error.policy_id}`, ")
        hint = ""
        if optional := _OPTIONAL.search(words):
            way, _, name = f"context.{optional[1]}".rpartition(".")
            hint = f"; ask for it first: `{way} has {name} && ...`"
        faults.setdefault(index, f"{policies[index].place}: {' '.join(words.split())}{hint}")
    _refuse(fault for _, fault in sorted(faults.items()))


def _unreached(policies: Sequence[Statement], schema_text: str) -> Iterator[str]:
    """A fault for each policy with conditions that nothing could meet, whoever asks for what."""
    # Cedar takes a `forbid` whose condition can only be false, and it would forbid nothing; and an
    # `unless` like that, which would leave out nobody. But it doesn't look at what stands behind
    # such a condition: one that can only be false hides a mistake which is put at its end.
    tried = []
    for policy in policies:
        text = policy.text
        words = f"{policy.place}: no request can meet the policy's conditions"
        tried.append((policy, words, f"{text.removesuffix(';')}\nwhen {{ {_MISTAKE} }};"))
        for place, start, end in policy.exceptions():
            words = f"{place}: no request can meet the condition of this `unless`"
            condition = f"({text[start:end]}\n) && {_MISTAKE}"
            tried.append((policy, words, f"{text[:start]}{condition}{text[end:]}"))
    found = cedarpy.validate_policies("\n".join(text for *_, text in tried), schema_text).errors
    reached = {int(error.policy_id.removeprefix("policy")) for error in found}
    told = None
    for index, (policy, words, _) in enumerate(tried):
        if index not in reached and policy is not told:  # nothing in it can be met then
            told = policy
            yield words
