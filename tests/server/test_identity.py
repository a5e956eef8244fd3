import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.errors import ApiError
from expertgate.server.identity import Identity
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.key_edits import create_key


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("identity") / "keys.yaml"


@pytest.fixture(scope="module")
def secret(path):
    return create_key(path, "alice", ["research"], None)


@pytest.fixture(scope="module")
def identity(path, secret):
    return Identity(IdentityConfig(api_keys=path))


def ask(identity, raw: list[tuple[bytes, bytes]]) -> Principal:
    return asyncio.run(identity.identify(HTTPConnection({"type": "http", "headers": raw})))


def sent(*headers: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]


def refused(identity, *headers: tuple[str, str]) -> ApiError:
    with pytest.raises(ApiError) as error:
        ask(identity, sent(*headers))
    return error.value


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {} "])
def test_a_key_tells_who_asks(identity, secret, form):
    found = ask(identity, sent(("Authorization", form.format(secret))))
    assert found == Principal("alice", frozenset({"research"}), via="key")


@pytest.mark.parametrize(
    "form",
    ["", "Bearer", "Bearer ", "{}", "Basic {}", "Bearer\t{}", "Bearer {} {}", "Bearer, {}",
     "Bearer {}é", "Bearer eg-", "Bearer eg-é", "Bearer sk-1234", "Bearer {},Bearer {}"],
)  # fmt: skip
def test_anything_else_is_a_401_that_repeats_nothing(identity, secret, form):
    error = refused(identity, ("Authorization", form.replace("{}", secret)))
    assert (error.status, error.code) == (401, "invalid_credential")
    assert error.headers == {"WWW-Authenticate": "Bearer"}
    assert secret not in str(error.body())
    assert error.__cause__ is None


def test_how_a_credential_is_sent_is_told(identity, secret):
    for form in (secret, f"Basic {secret}", "Bearer"):
        assert "must be 'Bearer', a blank" in refused(identity, ("Authorization", form)).message
    other = refused(identity, ("Authorization", "Bearer sk-1234"))
    assert "no kind or issuer that is known" in other.message


def test_no_credential(identity):
    assert refused(identity).code == "invalid_credential"
    # A key in any other place is no credential.
    assert refused(identity, ("X-Api-Key", "eg-1"), ("Cookie", "key=eg-1")).status == 401


def test_several_authorization_headers_are_not_the_first_of_them(identity, secret):
    good = ("Authorization", f"Bearer {secret}")
    assert refused(identity, good, good).status == 401
    assert refused(identity, good, ("Authorization", "Basic eA==")).status == 401


def test_expired_wrong_and_revoked_keys_look_alike(tmp_path):
    path = tmp_path / "keys.yaml"
    expired = create_key(path, "old", [], datetime.now(UTC) - timedelta(days=1))
    identity = Identity(IdentityConfig(api_keys=path))
    seen = [
        refused(identity, ("Authorization", f"Bearer {key}")) for key in (expired, "eg-" + "A" * 43)
    ]
    assert seen[0].body() == seen[1].body()
    assert seen[0].headers == seen[1].headers


@pytest.mark.parametrize("name", ["X-Forwarded-User", "x-forwarded-groups"])
def test_an_asserted_identity_is_refused_not_ignored(identity, secret, name):
    error = refused(identity, ("Authorization", f"Bearer {secret}"), (name, "root"))
    assert (error.status, error.code) == (400, "invalid_request")
    assert "X-Forwarded-" in error.message


@given(st.lists(st.tuples(st.sampled_from([b"authorization", b"x-user"]), st.binary(max_size=60))))
def test_no_headers_fail_otherwise_or_let_anyone_in(identity, raw):
    with pytest.raises(ApiError) as error:
        ask(identity, raw)
    assert error.value.status == 401


# --- gateways ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(path, secret):
    """The key of a gateway that may hand on two groups."""
    return create_key(path, "portal", ["research", "staff"], None, may_assert=True)


@pytest.fixture(scope="module")
def with_gateway(path, gateway):
    return Identity(IdentityConfig(api_keys=path, anonymous=True))


def named(key, *headers):
    return sent(("Authorization", f"Bearer {key}"), *headers)


USER = ("X-Forwarded-User", "ada")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ((), set()),
        ((("X-Forwarded-Groups", ""),), set()),
        ((("X-Forwarded-Groups", "staff"),), {"staff"}),
        ((("X-Forwarded-Groups", "staff , research,staff"),), {"staff", "research"}),
        ((("X-Forwarded-Groups", ",".join(["staff"] * 128)),), {"staff"}),
    ],
)
def test_a_gateway_names_its_user(with_gateway, gateway, groups, expected):
    found = ask(with_gateway, named(gateway, USER, *groups))
    assert found == Principal("portal/ada", frozenset(expected), via="gateway:portal")


def test_a_gateways_user_is_nobody_else(with_gateway, gateway, secret):
    """Whatever a gateway says: a user with that key, another gateway's user, or nobody's."""
    odd = ("other/ada", "corp:ada", "zoë", "a@acme.example", "x" * 256)
    for name in ("alice", "portal", "anonymous", *odd):
        raw = named(gateway, ("X-Forwarded-User", name.encode().decode("latin-1")))
        assert ask(with_gateway, raw).id == f"portal/{name}"


def test_a_gateway_is_never_itself(with_gateway, gateway):
    """Else a request that lost its user on the way would run with the gateway's own rights."""
    for headers in ((), (("X-Forwarded-Groups", "staff"),), (("X-Forwarded-User", ""),)):
        error = refused(with_gateway, ("Authorization", f"Bearer {gateway}"), *headers)
        assert (error.status, error.code, error.param) == (400, "invalid_request", USER[0])


@pytest.mark.parametrize("groups", ["admin", "staff,admin", "Staff", "staff research"])
def test_a_gateway_hands_on_no_group_that_it_does_not_have(with_gateway, gateway, groups):
    # Refused, not left out: what is forbidden to that group would be allowed without it.
    error = refused(
        with_gateway,
        ("Authorization", f"Bearer {gateway}"),
        USER,
        ("X-Forwarded-Groups", groups),
    )
    assert (error.status, error.param) == (400, "X-Forwarded-Groups")


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([USER, USER], id="two users"),
        pytest.param([("X-Forwarded-User", "ada, eve")], id="two users, joined by a proxy"),
        pytest.param([("X-Forwarded-User", "a\tb")], id="a tab"),
        pytest.param([("X-Forwarded-User", "a\x85b")], id="a line end"),
        pytest.param([("X-Forwarded-User", "a\xff")], id="not UTF-8"),
        pytest.param([("X-Forwarded-User", "\xc2\xa0ada")], id="a blank that isn't stripped"),
        pytest.param([("X-Forwarded-User", "ada ")], id="a blank behind the name"),
        pytest.param([("X-Forwarded-User", "x" * 257)], id="long"),
        pytest.param([USER, ("X-Forwarded-Groups", "staff"), ("X-Forwarded-Groups", "research")],
                     id="two lists of groups"),
        pytest.param([USER, ("X-Forwarded-Group", "staff")], id="almost the header of groups"),
        pytest.param([USER, ("X-Forwarded-Groups", "staff,,research")], id="an empty group"),
        pytest.param([USER, ("X-Forwarded-Groups", "staff,")], id="a comma at the end"),
        pytest.param([USER, ("X-Forwarded-Groups", "staff\xc2\xa0")],
                     id="a group with a blank that isn't stripped"),
        pytest.param([USER, ("X-Forwarded-Groups", ",".join(["staff"] * 129))], id="many groups"),
    ],
)  # fmt: skip
def test_a_user_that_is_named_wrongly_is_a_400(with_gateway, gateway, headers):
    error = refused(with_gateway, ("Authorization", f"Bearer {gateway}"), *headers)
    assert (error.status, error.code) == (400, "invalid_request")
    assert error.param in ("X-Forwarded-User", "X-Forwarded-Groups")


@pytest.mark.parametrize("groups", ["staff,", ",", "staff,,research"])
def test_that_a_group_has_no_name_is_told_as_such(with_gateway, gateway, groups):
    raw = ("Authorization", f"Bearer {gateway}"), USER, ("X-Forwarded-Groups", groups)
    assert "a name is 1 to 256" in refused(with_gateway, *raw).message


def test_a_gateways_users_end_with_its_key(tmp_path):
    path = tmp_path / "keys.yaml"
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    key = create_key(path, "portal", [], soon, may_assert=True)
    found = ask(Identity(IdentityConfig(api_keys=path)), named(key, USER))
    assert (found.id, found.expires) == ("portal/ada", soon)


def test_a_key_that_ends_is_no_gateway(tmp_path):
    path = tmp_path / "keys.yaml"
    key = create_key(path, "portal", [], datetime.now(UTC) - timedelta(days=1), may_assert=True)
    identity = Identity(IdentityConfig(api_keys=path, anonymous=True))
    assert refused(identity, ("Authorization", f"Bearer {key}"), USER).status == 401


@pytest.mark.parametrize("name", ["X-Forwarded-User", "X-Forwarded-Groups"])
def test_nobody_else_names_a_user(with_gateway, secret, name):
    for credential in ("", f"Bearer {secret}", "Basic eA=="):
        authorization = [("Authorization", credential)] if credential else []
        for value in ("staff", ""):
            error = refused(with_gateway, *authorization, (name, value))
            assert (error.status, error.code, error.param) == (400, "invalid_request", name)


# --- nobody -----------------------------------------------------------------------------------


def test_anonymous_is_only_who_sends_no_credential(with_gateway, secret):
    assert ask(with_gateway, sent(("X-Api-Key", "eg-1"))) == Principal("anonymous", via="anonymous")
    assert ask(with_gateway, sent(("Authorization", f"Bearer {secret}"))).id == "alice"
    for bad in ("", "Bearer", "Bearer eg-1", "Bearer sk-1", "Basic eA==", "Bearer a.b.c"):
        assert refused(with_gateway, ("Authorization", bad)).status == 401


def test_anonymous_is_off_unless_it_is_asked_for(identity):
    assert refused(identity).status == 401
    alone = Identity(IdentityConfig(anonymous=True))
    assert ask(alone, []).groups == frozenset()
    assert refused(alone, ("Authorization", "Bearer eg-" + "A" * 43)).status == 401


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "groups"),
    [
        ([], {"research"}),
        ([{"claim": "dept", "values": {"R&D": "labs"}}], {"research", "labs"}),
        ([{"claim": "dept", "values": {"R&D": "labs"}}, {"claim": "teams"}], None),
        ([{"claim": "teams", "prefix": "team-"}], None),
    ],
)
def test_the_groups_that_there_are_can_be_told_where_all_are_listed(tmp_path, rules, groups):
    create_key(tmp_path / "keys.yaml", "alice", ["research"], None)
    mesh = {"api_keys": tmp_path / "keys.yaml", "certificates": {"name": "mesh", "groups": rules}}
    assert Identity(IdentityConfig.model_validate(mesh)).groups == groups
    corp = {"name": "corp", "issuer": "https://corp", "audience": "us", "groups": rules}
    mapped = IdentityConfig.model_validate({"jwt": [corp]}).mapped_groups()
    assert mapped == (None if groups is None else groups - {"research"})
