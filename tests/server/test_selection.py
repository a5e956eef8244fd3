import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from expertgate.model.catalogue import Catalogue, Expert
from expertgate.policies.expert_set import ExpertSet
from expertgate.server.errors import ApiError
from expertgate.server.selection import (
    Selection,
    effective,
    from_body,
    from_header,
    from_model,
    select,
)

NAMES = ["public", "math", "news", "code"]
CATALOGUE = Catalogue(experts=tuple(Expert(index=i, name=name) for i, name in enumerate(NAMES)))


@dataclass
class Exclude:
    exclude: list[str]


@dataclass
class Body:
    model: str | None = None
    experts: list[str] | Exclude | None = None


def only(*names: str) -> Selection:
    return Selection(frozenset(names))


def but(*names: str) -> Selection:
    return Selection(frozenset(names), exclude=True)


def refused(call, *arguments) -> ApiError:
    with pytest.raises(ApiError) as error:
        call(*arguments)
    return error.value


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (None, None),
        (["math"], only("math")),
        (["math", "math"], only("math")),
        (["Math", " math"], only("Math", " math")),  # not the names that were meant: no guessing
        (Exclude(["news"]), but("news")),
        (Exclude([]), but()),  # a list that a program made; it leaves out nobody
    ],
)
def test_body(experts, expected):
    assert from_body(experts) == expected


@pytest.mark.parametrize(
    "experts",
    [[], [""], ["a" * 64], ["a"] * 65, Exclude([""]), Exclude(["a"] * 65)],
    ids=["none", "empty name", "long name", "many", "empty exclusion", "many exclusions"],
)
def test_malformed_body(experts):
    error = refused(from_body, experts)
    assert (error.status, error.code, error.param) == (400, "invalid_experts", "experts")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], None),
        (["public,math"], only("public", "math")),
        (["public ,\tmath "], only("public", "math")),
        (["public", "math"], only("public", "math")),  # two lines are one list
        ([",public,,math,"], only("public", "math")),  # empty elements are ignored, says HTTP
        (["-news"], but("news")),
        (["-news", "-math"], but("news", "math")),
        (["--news"], but("-news")),
    ],
)
def test_header(lines, expected):
    assert from_header(lines) == expected


@pytest.mark.parametrize(
    "lines", [[""], [" , "], ["-"], ["public,-news"], ["public", "-news"], ["a" * 64], ["a," * 65]]
)
def test_malformed_header(lines):
    error = refused(from_header, lines)
    assert (error.status, error.code) == (400, "invalid_experts")


@pytest.mark.parametrize("served", ["flex", "org/Flex-7x7B", "a:b"])
def test_alias(served):
    assert from_model(None, served) is None
    assert from_model(served, served) is None
    assert from_model(f"{served}:public+math", served) == only("public", "math")
    assert from_model(f"{served}:-news+-math", served) == but("news", "math")
    # One expert whose name has a hyphen and so on, not an exclusion of several.
    assert from_model(f"{served}:-news-math", served) == but("news-math")


@pytest.mark.parametrize("alias", ["", "-", "+", "public+", "public+-news", "a" * 64])
def test_malformed_alias(alias):
    error = refused(from_model, f"flex:{alias}", "flex")
    assert (error.status, error.code) == (400, "invalid_experts")


@pytest.mark.parametrize("model", ["", "fle", "flexx", "Flex", "flex public", ":math", "x" * 999])
def test_another_model_is_not_found(model):
    error = refused(from_model, model, "flex")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert len(error.message) < 200


def test_all_places_may_say_the_same():
    headers = Headers({"X-Experts": "math,public"})
    body = Body("flex:public+math", ["public", "math", "math"])
    assert select(body, headers, "flex") == only("public", "math")
    assert select(Body(), Headers(), "flex") is None


@pytest.mark.parametrize(
    "name", ["X-Expert", "x-experts-exclude", "X-EXPERTS-Effective", "X-Exprets", "X_Experts"]
)
def test_a_header_that_is_almost_ours_is_not_passed_over(name):
    """It would be answered by all experts, though somebody is left out in it."""
    error = refused(select, Body(), Headers({name: "-news"}), "flex")
    assert (error.status, error.code) == (400, "invalid_experts")
    assert name.lower() in error.message
    assert "X-Experts" in error.message


def test_anothers_headers_are_let_be():
    headers = Headers({"X-Expertgate-Cluster": "b", "Expect": "nothing", "X-Expires": "1"})
    assert select(Body(), headers, "flex") is None


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (Body("flex", ["public"]), "math"),
        (Body("flex", ["news"]), "-news"),
        (Body("flex:math", None), "public"),
        (Body("flex:math", ["public"]), None),
        (Body("flex", Exclude([])), "public"),
    ],
)
def test_places_that_disagree_are_refused(body, header):
    headers = Headers({} if header is None else {"X-Experts": header})
    error = refused(select, body, headers, "flex")
    assert (error.status, error.code) == (400, "invalid_experts")
    assert " and " in error.message


def test_two_header_lines_are_not_the_first_of_them():
    headers = Headers(raw=[(b"x-experts", b"public"), (b"x-experts", b"math")])
    assert select(Body(), headers, "flex") == only("public", "math")


GRANTED = ExpertSet.of([0, 1])


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1]),
        (only("math"), [1]),
        (only("public", "math"), [0, 1]),
        (but("public"), [1]),
        (but(), [0, 1]),
    ],
)
def test_effective(selection, expected):
    assert effective(selection, GRANTED, CATALOGUE) == ExpertSet.of(expected)


@pytest.mark.parametrize("make", [only, but])
def test_what_is_forbidden_looks_like_what_does_not_exist(make):
    def seen(name: str) -> tuple[object, ...]:
        error = refused(effective, make("public", name), GRANTED, CATALOGUE)
        body = error.body()["error"]
        return (error.status, error.headers, {**body, "message": error.message.replace(name, "?")})

    assert seen("news") == seen("nope")
    assert seen("news")[0] == 403


def test_an_empty_grant_says_so_whatever_is_asked():
    for selection in (None, only("math"), only("nope"), but("math")):
        error = refused(effective, selection, ExpertSet(0), CATALOGUE)
        assert (error.status, error.code) == (403, "expert_not_permitted")
        assert error.message == "no expert is granted to you"


def test_excluding_everyone_is_refused():
    error = refused(effective, but("public", "math"), GRANTED, CATALOGUE)
    assert (error.status, error.code) == (400, "invalid_experts")


def test_a_message_repeats_names_short_and_plain():
    odd = 'é\n\x1b[31m"<script>'
    error = refused(effective, only(odd), GRANTED, CATALOGUE)
    assert error.message == 'not granted to you: "\\u00e9\\n\\u001b[31m\\"<script>"'
    many = refused(effective, only(*(f"x{i:02}" for i in range(64))), GRANTED, CATALOGUE)
    assert many.message.endswith('"x07" and 56 more')


grants = st.sets(st.integers(0, len(NAMES) - 1)).map(ExpertSet.of)
texts = st.text(max_size=70) | st.sampled_from(NAMES)
lists = st.lists(texts, max_size=70)


@given(
    grants,
    st.none() | lists | lists.map(Exclude),
    st.none() | lists.map(",".join),
    st.none() | st.just("flex") | st.builds("flex:{}".format, lists.map("+".join)) | st.text(),
)
def test_nothing_that_a_client_says_widens_its_grant(granted, experts, header, model):
    raw = [] if header is None else [(b"x-experts", header.encode("latin-1", "replace"))]
    with contextlib.suppress(ApiError):  # any other exception would be a 500
        selection = select(Body(model, experts), Headers(raw=raw), "flex")
        found = effective(selection, granted, CATALOGUE)
        assert found <= granted
        assert found


@given(grants, st.sets(st.sampled_from(NAMES), min_size=1), st.booleans())
def test_a_selection_inside_the_grant_is_met_exactly(granted, names, exclude):
    named = ExpertSet.of(map(NAMES.index, names))
    expected = granted - named if exclude else named
    try:
        found = effective(Selection(frozenset(names), exclude), granted, CATALOGUE)
    except ApiError:
        assert not named <= granted or not expected
    else:
        assert named <= granted
        assert found == expected
