import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server.config import IdentityConfig
from expertgate.server.errors import ApiError
from expertgate.server.identity import Identity
from expertgate.server.keys import create_key


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
