from pathlib import Path

import cedarpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertgate.policies.statement import MAX_DEPTH, MAX_TOKENS, PolicyError, Statement, statements

FILE = Path("rules.cedar")
ALL = "permit(principal, action, resource)"


def cut(text: str) -> list[Statement]:
    return list(statements(text, FILE))


def test_a_file_is_cut_at_its_semicolons_and_lines_are_kept():
    found = cut(f'// a; comment\n{ALL};\n\n@id("b")\n{ALL} when {{\n  "a;b//c" == "d" }};\n')
    assert [policy.place for policy in found] == ["rules.cedar:2", "rules.cedar:4"]
    assert [policy.id for policy in found] == ["rules.cedar:2", "b"]
    for policy in found:
        policy.check()


def test_comments_end_where_cedar_ends_them():
    # Cedar ends a comment at a carriage return; a policy behind one is not commented out.
    (policy,) = cut(f"// hidden?\r{ALL};")
    policy.check()
    assert len(cedarpy.PolicySet.from_str(policy.text)) == 1


def test_what_follows_the_last_semicolon_is_not_lost():
    first, second = cut(f"{ALL}; {ALL}")
    first.check()
    with pytest.raises(PolicyError, match="end of input; a policy ends with a semicolon"):
        second.check()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"{ALL}\nwhen {{\n  resource.owner == }};", 3, "unexpected token `}`"),
        (f"{ALL}\n{ALL};", 2, "unexpected token `(`"),
        ("\npermit(principa, action, resource);", 2, "invalid variable in the policy scope"),
        (";", 1, "unexpected token"),
        (f'{ALL} when {{ "open }};', 1, "invalid token"),
        ("permit(principal == ?principal, action, resource);", 1, "make a template"),
        (f'\n@id("a") @id("b") {ALL};', 2, "duplicate annotation"),
    ],
)
def test_a_fault_has_its_line_and_words(text, line, words):
    *before, last = cut(text)
    for policy in before:
        policy.check()
    with pytest.raises(PolicyError) as error:
        last.check()
    assert str(error.value).startswith(f"rules.cedar:{line}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "inner",
    [
        # Each of these ends the process with a stack overflow where Cedar's parser sees it.
        "(" * 30_000 + "true" + ")" * 30_000,
        "[" * 30_000 + "]" * 30_000,
        "true" + " && true" * 30_000,
        "if true then " * 30_000 + "true" + " else true" * 30_000,
        "context" + ".a" * 30_000,
    ],
    ids=["parentheses", "sets", "and", "if", "attributes"],
)
def test_what_would_overflow_the_parser_never_reaches_it(inner):
    (policy,) = cut(f"{ALL} when {{ {inner} }};")
    with pytest.raises(PolicyError, match=r"nested more than|at most"):
        policy.check()


def test_depth_has_its_own_limit():
    # Few enough words, and still deep.
    (policy,) = cut(f"{ALL} when {{ {'(' * MAX_DEPTH}true{')' * MAX_DEPTH} }};")
    with pytest.raises(PolicyError, match=f"nested more than {MAX_DEPTH} deep"):
        policy.check()


def test_what_is_just_allowed_parses():
    deep = MAX_DEPTH - 1  # the braces are one level too
    for inner in (
        "(" * deep + "true" + ")" * deep,
        "true" + " && true" * ((MAX_TOKENS - 14) // 2),
        "context" + ".a" * ((MAX_TOKENS - 14) // 2),
    ):
        (policy,) = cut(f"{ALL} when {{ {inner} }};")
        policy.check()


@pytest.mark.parametrize("head", ['@id("")', "@id", r'@id("a\nb")', '@id("a\nb")'])
def test_ids_that_would_not_fit_a_log_line_are_refused(head):
    (policy,) = cut(f"{head} {ALL};")
    policy.check()
    with pytest.raises(PolicyError, match=r"rules\.cedar:1: an @id is"):
        policy.given_id()


def test_the_experts_a_policy_names():
    text = (
        'forbid(principal, action,\n resource == Expert::"math")\n'
        'unless { resource in [Expert::"a b"] && principal != User::"Expert::\\"no\\"" };'
    )
    (policy,) = cut(text)
    assert list(policy.named("Expert")) == [("rules.cedar:2", "math"), ("rules.cedar:3", "a b")]


def test_the_values_that_attributes_are_compared_with():
    (policy,) = cut(
        'permit(principal, action, resource) when { resource.owner == "acme"\n'
        '&& "closed" != resource.license && resource.tags.containsAny(["a", "b"])\n'
        '&& resource.tags.contains("c") && resource.owner == "a\\u{62}"\n'
        '&& (resource has owner) && resource.owner like "x*" && context.purpose == "care"\n'
        "&& resource.tags.contains(resource.owner) && resource.owner\n"
        '&& resource["owner"] == "acme" && "x" != resource["license"]\n'
        '&& resource["tags"].contains("d") && resource["owner"] };'
    )
    assert list(policy.values()) == [
        ("rules.cedar:1", "owner", "acme"),
        ("rules.cedar:2", "license", "closed"),
        ("rules.cedar:2", "tags", "a"),
        ("rules.cedar:2", "tags", "b"),
        ("rules.cedar:3", "tags", "c"),
        ("rules.cedar:6", "owner", "acme"),
        ("rules.cedar:6", "license", "x"),
        ("rules.cedar:7", "tags", "d"),
    ]


_WORDS = st.sampled_from(
    ["permit", "forbid", "(", ")", "principal", "action", "resource", ",", ";", "when", "{", "}",
     '"', '\\"', "//", "\n", "\r", "@id", "Expert", "::", " ", "é", "&&", "true"]
)  # fmt: skip


@given(st.lists(_WORDS | st.just(f"{ALL};"), max_size=30).map("".join))
def test_cut_policies_are_the_whole_file(text):
    # Nothing that Cedar would read in a file as a whole may be lost by reading it in pieces.
    found = cut(text)
    try:
        for policy in found:
            policy.check()
    except PolicyError:
        return
    assert len(found) == len(cedarpy.PolicySet.from_str(text))
