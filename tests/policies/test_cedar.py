import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertgate.policies.cedar import NOT_PERMITTED, PolicySet
from expertgate.policies.context import ATTRIBUTES, Context, ip_address
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.policies.schema import Resource
from expertgate.policies.statement import PolicyError, statements

RESOURCES = [
    Resource("public", "ai2", "odc-by", ()),
    Resource("math", "acme", "closed", ("stem",)),
    Resource("news", "herald", "closed", ("text", "daily")),
]
EVERYBODY = "permit(principal, action, resource);"
CLAIMS = {"department": "string", "level": "integer", "on_call": "boolean", "projects": "strings"}
NOON = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)  # a Tuesday
ALL = ["public", "math", "news"]


def policies(text: str) -> PolicySet:
    return PolicySet(list(statements(text, Path("rules.cedar"))), RESOURCES, CLAIMS)


def granted(text: str, user: str = "alice", *groups: str, purpose: str | None = None) -> list[str]:
    return names(text, Principal(user, frozenset(groups)), Context(NOON, purpose))


def names(text: str, principal: Principal, context: Context) -> list[str]:
    return [RESOURCES[i].name for i in policies(text).decide(principal, context).granted]


def when(condition: str) -> str:
    return f"permit(principal, action, resource) when {{ {condition} }};"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('permit(principal == User::"alice", action, resource);', ["public", "math", "news"]),
        ('permit(principal == User::"bob", action, resource);', []),
        ('permit(principal in Group::"staff", action, resource == Expert::"math");', ["math"]),
        ('permit(principal in Group::"alice", action, resource);', []),
        ('permit(principal == User::"staff", action, resource);', []),
        ('permit(principal, action == Action::"consult", resource);', ["public", "math", "news"]),
        (
            'permit(principal, action, resource) when { resource.owner == "acme" };',
            ["math"],
        ),
        (
            'permit(principal, action, resource) when { resource.tags.contains("daily") };',
            ["news"],
        ),
        (
            EVERYBODY
            + 'forbid(principal, action, resource) when { resource.license == "closed" };',
            ["public"],
        ),
    ],
)
def test_grants(text, expected):
    assert granted(text, "alice", "staff") == expected


@pytest.mark.parametrize("groups", ["a", "b", "ab", "abc"])
def test_each_group_of_a_principal_counts(groups):
    text = f'{EVERYBODY} forbid(principal in Group::"a", action, resource == Expert::"math");'
    text += 'forbid(principal in Group::"b", action, resource == Expert::"news");'
    assert granted(text, "alice", *groups) == [
        name
        for name, group in (("public", ""), ("math", "a"), ("news", "b"))
        if not group or group not in groups
    ]


def test_purpose_may_be_asked_for_and_may_be_missing():
    text = (
        "permit(principal, action, resource) "
        'when { context has purpose && context.purpose == "care" };'
    )
    assert granted(text) == []
    assert granted(text, purpose="ads") == []
    assert granted(text, purpose="care") == ["public", "math", "news"]


def test_reasons_are_ids_or_places_or_say_that_nothing_permits():
    found = policies(
        '@id("public-to-all") permit(principal, action, resource == Expert::"public");\n'
        'permit(principal, action, resource == Expert::"public");\n'
        '@id("not-math") forbid(principal, action, resource == Expert::"math");'
    ).decide(Principal("alice"), Context(NOON))
    assert found.reasons == {
        "public": ("public-to-all", "rules.cedar:2"),
        "math": ("not-math",),
        "news": (NOT_PERMITTED,),
    }


def test_a_failing_forbid_denies():
    # Cedar skips a policy that fails, and would let everyone in.
    found = policies(
        EVERYBODY + '@id("sum") forbid(principal, action, resource == Expert::"math")'
        "when { 9223372036854775807 + 1 > 0 };"
    ).decide(Principal("alice"), Context(NOON))
    assert found.granted == ExpertSet.of([0, 2])
    (reason,) = found.reasons["math"]
    assert reason.startswith("sum failed: integer overflow")


def test_half_a_surrogate_pair_as_purpose_denies_everything():
    text = when('context has purpose && context.purpose != "x"')
    found = policies(text).decide(Principal("alice"), Context(NOON, "\ud800"))
    assert not found.granted
    assert all(reasons != (NOT_PERMITTED,) for reasons in found.reasons.values())


@pytest.mark.parametrize(
    ("condition", "time", "expected"),
    [
        ('context.time < datetime("2027-01-01")', NOON, ALL),
        ('context.time < datetime("2026-11-24T12:00:00Z")', NOON, []),
        ('context.time.toTime() >= duration("8h") && context.weekday <= 5', NOON, ALL),
        ("context.weekday == 2", NOON, ALL),
        ("context.weekday == 3", NOON.replace(hour=23, minute=59, second=59), []),
        # A time of another zone is the same moment.
        (
            "context.weekday == 3",
            datetime(2026, 11, 25, 1, tzinfo=timezone(timedelta(hours=2))),
            [],
        ),
        ('context["ti\\u{6d}e"] == datetime("2026-11-24T12:00:00Z")', NOON, ALL),
        # In whole seconds, so that a decision that read it holds for the second.
        (
            'context.time == datetime("2026-11-24T12:00:00Z")',
            NOON.replace(microsecond=999_999),
            ALL,
        ),
    ],
)
def test_time(condition, time, expected):
    assert names(when(condition), Principal("alice"), Context(time)) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", ALL),
        ("::ffff:10.1.2.3", ALL),  # how a socket that speaks both shows an IPv4 client
        ("11.1.2.3", []),
        ("::1", []),
        (None, []),
        ("testclient", []),
        ("10.1.2.3, 10.0.0.1", []),
    ],
)
def test_address(address, expected):
    text = when('context has address && context.address.isInRange(ip("10.0.0.0/8"))')
    assert names(text, Principal("alice"), Context(NOON, None, ip_address(address))) == expected


def test_a_zone_is_no_part_of_an_address():
    text = when('context has address && context.address == ip("fe80::1")')
    context = Context(NOON, None, ip_address("fe80::1%eth0"))
    assert names(text, Principal("alice"), context) == ALL


@pytest.mark.parametrize(
    ("claims", "condition", "expected"),
    [
        ({"department": "care"}, 'context.claims.department == "care"', ALL),
        ({"department": "law"}, 'context.claims.department == "care"', []),
        ({}, 'context.claims.department == "care"', []),
        ({"level": 3}, "context.claims.level >= 3", ALL),
        ({"on_call": True}, "context.claims.on_call", ALL),
        ({"projects": ["a", "b"]}, 'context.claims.projects.contains("b")', ALL),
        ({"projects": frozenset({"a"})}, 'context.claims.projects.contains("b")', []),
        # Not declared, so nobody's.
        ({"level": 3, "root": True, "__entity": {}}, "context.claims.level == 3", ALL),
    ],
)
def test_claims(claims, condition, expected):
    first = condition.partition("claims.")[2].partition(" ")[0].partition(".")[0]
    text = when(f"context.claims has {first} && {condition}")
    assert names(text, Principal("alice", claims=claims), Context(NOON)) == expected


@pytest.mark.parametrize(
    "claims",
    [{"department": 1}, {"department": None}, {"level": "3"}, {"level": True}, {"level": 2.0},
     {"level": 1 << 63}, {"on_call": 1}, {"projects": "ab"}, {"projects": [1]},
     {"department": {"__entity": {"type": "User", "id": "root"}}}, {"department": "\ud800"}],
)  # fmt: skip
def test_a_claim_of_another_type_denies_everything_also_past_a_forbid(claims):
    text = EVERYBODY + "forbid(principal, action, resource) when { context.claims has level };"
    found = policies(text).decide(Principal("alice", claims=claims), Context(NOON))
    assert not found.granted
    assert all("declared" in reason or "build" in reason for (reason,) in found.reasons.values())


def test_names_of_claims_may_be_addresses():
    rules = list(statements(when('context.claims has "https://a/b"'), Path("r.cedar")))
    found = PolicySet(rules, RESOURCES, {"https://a/b": "string"})
    assert found.decide(Principal("x", claims={"https://a/b": ""}), Context(NOON)).granted
    assert not found.decide(Principal("x"), Context(NOON)).granted


ODD_IDS = [
    "", 'a"b', "a\\", "a\\\"b", "a\nb", "\0", 'User::"root"', "root\", \"x", "Zoë", "😀",
    "x" * 100_000, "?principal", "__entity",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_IDS, ids=lambda odd: repr(odd[:20]))
def test_ids_are_data(odd):
    only_root = 'permit(principal == User::"root", action, resource);'
    root_group = 'permit(principal in Group::"root", action, resource);'
    assert granted(EVERYBODY, odd, odd) == ["public", "math", "news"]
    assert granted(only_root + root_group, odd, odd) == []


def test_odd_ids_can_be_named_by_policies():
    assert granted('permit(principal == User::"a\\"\\\\\\n", action, resource);', 'a"\\\n')
    assert granted('permit(principal in Group::"", action, resource);', "alice", "")


def test_half_a_surrogate_pair_is_denied_with_a_reason():
    found = policies(EVERYBODY).decide(Principal("\ud800"), Context(NOON))
    assert not found.granted
    assert "can't be put to the policies" in found.reasons["public"][0]


@settings(max_examples=50)
@given(st.text(), st.frozensets(st.text(), max_size=3), st.text())
def test_nobody_becomes_root_by_a_name(user, groups, purpose):
    text = 'permit(principal == User::"root", action, resource == Expert::"math");'
    found = policies(text).decide(Principal(user, groups), Context(NOON, purpose))
    assert (found.granted == ExpertSet.of([1])) == (user == "root")


def test_decisions_are_cached_by_all_they_depend_on():
    found = policies(
        'permit(principal == User::"a", action, resource == Expert::"public");'
        'permit(principal in Group::"a", action, resource == Expert::"math");'
        'permit(principal, action, resource == Expert::"news")'
        'when { context has purpose && context.purpose == "a" };'
    )
    principals = [Principal("a"), Principal("b"), Principal("b", frozenset({"a"}))]
    contexts = [Context(NOON), Context(NOON, "a")]
    for _ in range(2):
        sets = [found.decide(p, c).granted for p in principals for c in contexts]
        assert [list(s) for s in sets] == [[0], [0, 2], [], [2], [1], [1, 2]]
    later = Context(NOON + timedelta(days=1), None, ip_address("10.0.0.1"))
    # None of these policies reads the clock or the address.
    assert found.decide(Principal("a"), later) is found.decide(Principal("a"), Context(NOON))


def test_a_decision_that_read_the_clock_ends_with_its_second():
    found = policies(when('context.time < datetime("2026-11-24T12:00:01Z")'))
    assert found.reads == {"time"}
    within = found.decide(Principal("a"), Context(NOON.replace(microsecond=999_999)))
    assert within.granted
    assert within is found.decide(Principal("a"), Context(NOON))
    assert not found.decide(Principal("a"), Context(NOON + timedelta(seconds=1))).granted


@pytest.mark.parametrize(
    ("condition", "read"),
    [
        ("true", set()),
        ("context has time", {"time"}),
        ('context has "weekday"', {"weekday"}),
        ('context["ti\\u{6d}e"] > datetime("2026-01-01")', set(ATTRIBUTES)),
        ("(if true then context else context).weekday == 1", {"weekday"}),
        ('resource.owner == "time"', {"time"}),  # more than is read does no harm
        ("context.claims has level", {"claims"}),
    ],
)
def test_what_decisions_depend_on(condition, read):
    assert policies(when(condition)).reads == read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '\npermit(principal, action, resource) when { resource.ownr == "a" };',
            "rules.cedar:2: attribute `ownr` on entity type `Expert` not found",
        ),
        (
            EVERYBODY + "\npermit(principal, action, resource) when { resource.owner == 1 };",
            "rules.cedar:2: the types Long and String are not compatible",
        ),
        # Strict validation: an optional attribute is asked for before it is read.
        (
            'permit(principal, action, resource) when { context.purpose == "a" };',
            "rules.cedar:1: unable to guarantee safety of access to optional attribute `purpose`",
        ),
        (
            'permit(principal, action == Action::"consul", resource);',
            'rules.cedar:1: unrecognized action `Action::"consul"`',
        ),
        # Cedar would take this one, and it would forbid nothing.
        (
            EVERYBODY + '\nforbid(principal, action,\nresource == Expert::"meth");',
            'rules.cedar:3: there is no Expert::"meth"; the experts are public, math, news',
        ),
        # Nor these: it takes them for attributes that happen to be missing.
        (
            when("true") + when("context has purpse").replace("permit", "\nforbid"),
            "rules.cedar:2: context.purpse: there is no such attribute; did you mean purpose?",
        ),
        (
            'forbid(principal, action, resource) when { context . claims has "departement" };',
            "rules.cedar:1: the claim 'departement' is not declared; did you mean department?",
        ),
        (
            when('context has claims.dept && context.claims.dept == "a"'),
            "rules.cedar:1: the claim 'dept' is not declared, only department, level, on_call, ",
        ),
        (
            when("resource has ownr"),
            "rules.cedar:1: resource.ownr: there is no such attribute; did you mean owner?",
        ),
        (
            when("principal has age"),
            "rules.cedar:1: principal.age: there is no such attribute",
        ),
        (
            when("(if true then context else context) has purpse"),
            "rules.cedar:1: purpse: there is no such attribute; did you mean purpose?",
        ),
        # Nor what can never hold.
        (
            EVERYBODY + "\nforbid(principal, action, resource) unless { context has time };",
            "rules.cedar:2: no request can meet the policy's conditions",
        ),
        (
            EVERYBODY + when('(principal) == Group::"x"'),
            "rules.cedar:1: no request can meet the policy's conditions",
        ),
        (
            when("true").replace("when", "\nunless").replace("true", 'principal == Group::"x"'),
            "rules.cedar:2: principal == Group: no principal is such a thing; a group is asked ",
        ),
        (
            when('principal in Group::"a" || Group::"b" != principal'),
            "rules.cedar:1: principal != Group: no principal is such a thing; a group is asked ",
        ),
        (
            when('true || principal in [Expert::"math"]'),
            "rules.cedar:1: principal in Expert: no principal is such a thing",
        ),
        (
            when('true || resource in Group::"a"'),
            "rules.cedar:1: resource in Group: no resource is such a thing; a group is asked ",
        ),
        (
            when("true || resource is User"),
            "rules.cedar:1: resource is User: no resource is such a thing",
        ),
        (
            when('context has purpose || Group::"a" in principal'),
            "rules.cedar:1: principal == Group: no principal is such a thing; a group is asked ",
        ),
        *(
            (
                when(f"context has address && {condition}").replace("permit", "forbid"),
                "rules.cedar:1: no address is equal to the network 10.0.0.0/8; ask for `address.",
            )
            for condition in (
                'context.address == ip("10.0.0.0/8")',
                'ip("10.0.0.0/8") != context.address',
                'ip("10.0.0.5/32") == context.address && context.address ==ip ( "10.0.0.0/8" )',
            )
        ),
        *(
            (
                f"permit(principal, action, resource)\nunless {{ {condition} // }}\n}};",
                "rules.cedar:2: no request can meet the condition of this `unless`",
            )
            for condition in (
                "principal in resource",
                "principal.hasTag(resource.owner)",
                'principal is User in Expert::"math"',
                '(principal) in Expert::"math" && context has purpose',
            )
        ),
        (
            f'@id("a") {EVERYBODY}\n@id("a") {EVERYBODY}',
            "rules.cedar:2: the @id 'a' is that of the policy at rules.cedar:1",
        ),
        (
            f'{EVERYBODY}\n@id("rules.cedar:1") {EVERYBODY}',
            "rules.cedar:2: the @id 'rules.cedar:1' is what the policy at rules.cedar:1 is called",
        ),
    ],
)
def test_what_is_not_valid_is_refused_with_its_place(text, words):
    with pytest.raises(PolicyError) as error:
        policies(text)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (
            ["permit(principal;", when("resource.owner =="), when('Expert::"maths" == resource')],
            [
                "1: unexpected token `;`",
                "2: unexpected token `}`",
                '3: there is no Expert::"maths"',
            ],
        ),
        (
            [when("resource.ownr == 1"), EVERYBODY, when("context.zone == 1")],
            ["1: attribute `ownr`", "3: attribute `zone`"],
        ),
        ([when("false"), EVERYBODY, when("!true")], ["1: no request can meet", "3: no request "]),
        ([when("1 +")] * 25, [*["unexpected "] * 20, "there are 5 more faults"]),
    ],
    ids=["by themselves", "by the schema", "out of reach", "many"],
)
def test_every_policy_that_does_not_hold_is_told_at_once(texts, words):
    with pytest.raises(PolicyError) as error:
        policies("\n".join(texts))
    faults = str(error.value).splitlines()
    assert len(faults) == len(words)
    assert all(word in fault for word, fault in zip(words, faults, strict=True)), faults


@pytest.mark.parametrize(
    "condition",
    [
        "true",
        "context has purpose",
        "context.weekday > 8",  # what values there are is nobody's guess
        'principal in Group::"x" && !(principal in User::"y")',
        'principal is User in Group::"x" || principal in [Group::"y", Group::"z"]',
        'User::"a" == principal || resource != Expert::"math" || resource is Expert',
        'true } unless { context has purpose } unless { {"}": true}["}"] == (1 == 2) } when { true',
        "true // };\n",
        'context has address && context.address.isInRange(ip("10.0.0.0/8")) == true',
        'context has address && context.address == ip("::1/128")',
    ],
)
def test_what_can_be_met_is_taken(condition):
    assert len(policies(EVERYBODY + when(condition).replace("permit", "forbid"))) == 2


@pytest.mark.parametrize("way", ["context purpose", "context.claims department"])
def test_how_to_ask_for_an_optional_attribute_is_told(way):
    where, name = way.split()
    with pytest.raises(PolicyError, match=rf"; ask for it first: `{where} has {name} && \.\.\.`"):
        policies(when(f'{where}.{name} == "a"'))


@pytest.mark.parametrize(
    "condition",
    ["context has claims.level", 'context.claims has "lev\\u{65}l"', "resource has tags",
     "{a: 1, tags: 2} has tags", '(if true then context else context)["claims"] has department'],
)  # fmt: skip
def test_attributes_that_there_are_may_be_asked_for(condition):
    policies(f'@has("x") {when(condition)}')


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.cedar").write_text(EVERYBODY)
    (tmp_path / "a.cedar").write_text("// nothing\n\n" + EVERYBODY)
    (tmp_path / "c.txt").write_text("no policy")
    found = PolicySet.load(tmp_path, RESOURCES).decide(Principal("x"), Context(NOON))
    assert found.reasons["public"] == (
        "a.cedar:3",
        "b.cedar:1",
    )


@pytest.mark.parametrize("content", [None, "", "// only words\n"])
def test_no_policy_at_all_is_a_mistake(tmp_path, content):
    if content is not None:
        (tmp_path / "a.cedar").write_text(content)
    with pytest.raises(PolicyError, match="there is no policy"):
        PolicySet.load(tmp_path, RESOURCES)
    with pytest.raises(PolicyError, match="missing: is no folder: there is no policy"):
        PolicySet.load(tmp_path / "missing", RESOURCES)


def test_a_mark_that_editors_put_first_is_no_part_of_a_policy(tmp_path):
    (tmp_path / "a.cedar").write_text(f"{EVERYBODY}\n", "utf-8-sig")
    assert len(PolicySet.load(tmp_path, RESOURCES)) == 1


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.cedar").write_bytes(b"\xff")
    with pytest.raises(PolicyError, match=r"a\.cedar: is not UTF-8"):
        PolicySet.load(tmp_path, RESOURCES)
    (tmp_path / "a.cedar").unlink()
    (tmp_path / "a.cedar").mkdir()
    with pytest.raises(PolicyError, match=r"a\.cedar: Is a directory"):
        PolicySet.load(tmp_path, RESOURCES)


def test_the_version_names_policies_and_experts():
    version = policies(EVERYBODY).version
    assert version == policies(EVERYBODY).version
    assert len(bytes.fromhex(version)) == 32
    other_text = policies(EVERYBODY + " ").version
    moved = PolicySet(list(statements("\n" + EVERYBODY, Path("r.cedar"))), RESOURCES).version
    other_experts = PolicySet(
        list(statements(EVERYBODY, Path("rules.cedar"))), RESOURCES[:2]
    ).version
    assert len({version, moved, other_experts}) == 3
    # A blank behind the last policy is no part of any.
    assert version == other_text


@pytest.mark.parametrize("name", [b"\xff.cedar", b"a\nb.cedar"])
def test_a_file_whose_name_can_name_no_policy(tmp_path, name):
    """It would stand in every record of a request, which could then not be written."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_text(EVERYBODY)
    with pytest.raises(PolicyError, match="must be printable text, in UTF-8") as error:
        PolicySet.load(tmp_path, RESOURCES)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("year", [1, 999, 9999])
def test_a_time_of_any_year(year):
    early = 'context.time < datetime("1000-01-01")'
    found = names(when(early), Principal("alice"), Context(NOON.replace(year=year)))
    assert found == (ALL if year < 1000 else [])


@pytest.mark.parametrize("name", ['a"b', "a\\", "\\u{61}", 'a"?: String, "b'])
def test_a_claim_may_have_quotes_in_its_name(name):
    asked = name.replace("\\", "\\\\").replace('"', '\\"')
    text = when(f'context.claims has "{asked}" && context.claims["{asked}"] == "x"')
    found = PolicySet(list(statements(text, Path("rules.cedar"))), RESOURCES, {name: "string"})
    for value, count in (("x", 3), ("y", 0)):
        principal = Principal("alice", claims={name: value})
        assert len(found.decide(principal, Context(NOON)).granted) == count


def test_what_is_spoken_of_and_nobody_has_is_a_doubt_and_no_fault():
    text = (
        'forbid(principal in Group::"contracters", action, resource) unless {\n'
        '  resource.owner == "acm" || resource.license == "open" ||\n'
        '  resource.tags.containsAny(["dayly", "stem"]) };\n'
        'permit(principal in Group::"staff", action, resource) when { resource.owner == "acme" };'
    )
    strange = [
        'rules.cedar:2: no expert has the owner "acm"; did you mean acme?',
        'rules.cedar:2: no expert has the license "open"',
        'rules.cedar:3: no expert has the tag "dayly"; did you mean daily?',
    ]
    group = 'rules.cedar:1: nobody is in Group::"contracters"; did you mean contractors?'
    assert policies(text).doubts() == strange
    assert policies(text).doubts({"staff", "contractors"}) == [*strange, group]
    assert policies(text).doubts({"staff", "contracters"}) == strange
    nobody = policies(text).doubts(frozenset())
    assert nobody == [
        *strange,
        group.partition(";")[0],
        'rules.cedar:4: nobody is in Group::"staff"',
    ]


def test_what_there_is_is_no_doubt():
    for resource in RESOURCES:
        named = f'resource.owner == "{resource.owner}" || resource.license == "{resource.license}"'
        assert policies(when(named)).doubts() == []


def test_an_attribute_by_its_index_is_the_same_one():
    text = """forbid(principal, action, resource) when { resource["owner"] == "acm" };"""
    [doubt] = policies(text).doubts()
    assert doubt == 'rules.cedar:1: no expert has the owner "acm"; did you mean acme?'


def test_to_ask_whether_an_expert_has_an_owner_or_licence_is_no_doubt():
    assert all(resource.owner and resource.license for resource in RESOURCES)
    text = 'permit(principal, action, resource) when { resource.license != "" };\n'
    assert policies(text + text.replace("license", "owner")).doubts() == []


def test_a_group_that_is_written_with_an_escape_is_no_doubt():
    text = 'permit(principal in Group::"CORP\\\\research", action, resource);'
    assert policies(text).doubts({"CORP\\research"}) == []


def test_of_many_doubts_the_first_are_told_and_among_many_groups_no_likeness_is_sought():
    """A likeness takes a tenth of a millisecond to find, and each group may be like each other."""
    text = "\n".join(
        f'forbid(principal in Group::"tenant-{number}", action, resource);' for number in range(25)
    )
    few, many = {"tenant-x"}, {f"tenant-{number}" for number in range(100, 1000)}
    found = policies(text).doubts(few)
    assert [doubt.partition(";")[0] for doubt in found] == [
        *(f'rules.cedar:{n + 1}: nobody is in Group::"tenant-{n}"' for n in range(20)),
        "5 more places name what nobody has",
    ]
    assert found[0].endswith("; did you mean tenant-x?")
    assert policies(text[: text.index("\n", text.index("tenant-19"))]).doubts(few) == found[:20]
    assert "did you mean" not in "".join(policies(text).doubts(many))
