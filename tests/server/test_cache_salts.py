"""Which requests share what the engine has cached."""

import pytest

from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.server.cache_salts import CacheSalts

MATH = ExpertSet.of([0, 1])
SALTS = CacheSalts(b"weights", b"secret")
BASE = SALTS.salt(MATH, "alice", None)
AS_MANY = ExpertSet.of([0, 2])


def test_a_salt_repeats():
    assert SALTS.salt(MATH, "alice", None) == BASE
    assert len(BASE) == 64


@pytest.mark.parametrize(
    "other",
    [
        SALTS.salt(PUBLIC_ONLY, "alice", None),
        SALTS.salt(AS_MANY, "alice", None),
        SALTS.salt(MATH, "bob", None),
        SALTS.salt(MATH, "alice", "own"),
        SALTS.salt(MATH, "alice", ""),
        CacheSalts(b"weights 2", b"secret").salt(MATH, "alice", None),
        CacheSalts(b"weights", b"secret 2").salt(MATH, "alice", None),
    ],
    ids=["experts", "as many experts", "tenant", "own salt", "empty own salt", "weights", "secret"],
)
def test_a_salt_differs_with_every_part(other):
    assert other != BASE


def test_fields_of_a_salt_cannot_run_into_each_other():
    assert CacheSalts(b"cd", b"s").salt(MATH, "ab", None) != CacheSalts(b"d", b"s").salt(
        MATH, "abc", None
    )
    # A caller's own salt that spells the server's part.
    assert CacheSalts(b"w", b"s").salt(MATH, "a", "b") != CacheSalts(b"wb", b"s").salt(
        MATH, "a", None
    )


def test_a_servers_secret_is_its_own():
    assert CacheSalts(b"w").salt(MATH, "a", None) != CacheSalts(b"w").salt(MATH, "a", None)


def test_what_is_renewed_is_found_by_nobody_and_all_else_still_is():
    salts = CacheSalts(b"weights", b"secret")
    seen = {BASE}
    for _ in range(2):
        salts.renew(ExpertSet.of([1, 5]))
        seen.add(salts.salt(MATH, "alice", None))
    assert len(seen) == 3
    assert salts.salt(AS_MANY, "alice", None) == SALTS.salt(AS_MANY, "alice", None)


@pytest.mark.parametrize("tenant", ["dave", "portal/ada", "corp:ada"])
def test_so_is_what_was_cached_for_whom_a_key_or_an_issuer_vouched(tenant):
    salts = CacheSalts(b"weights", b"secret")
    seen = {SALTS.salt(MATH, tenant, None)}
    for _ in range(2):
        salts.renew_of({"dave", "portal", "corp"})
        seen.add(salts.salt(MATH, tenant, None))
    assert len(seen) == 3
    assert salts.salt(MATH, "alice", None) == BASE


def test_a_callers_own_salt_is_not_what_the_engine_reads():
    assert "own" not in SALTS.salt(MATH, "alice", "own")
