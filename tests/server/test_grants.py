import pytest

from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.server.grants import GrantError, Grants


def test_a_handle_redeems_its_own_grant_while_it_is_open():
    grants = Grants()
    with (
        grants.issue(PUBLIC_ONLY, "alice") as alice,
        grants.issue(PUBLIC_ONLY, "bob") as bob,
    ):
        assert grants.redeem(alice.handle) is alice
        assert grants.redeem(bob.handle) is bob
        assert len(bytes.fromhex(alice.handle)) == 16
        assert alice.handle != bob.handle


def test_a_closed_grant_is_refused_and_forgotten():
    grants = Grants()
    with grants.issue(PUBLIC_ONLY, "alice") as grant:
        pass
    assert not grant.open
    assert len(grants) == 0
    with pytest.raises(GrantError):
        grants.redeem(grant.handle)
    grant.close()  # once more does no harm


def test_a_grant_closes_when_its_request_fails():
    grants = Grants()
    with pytest.raises(ZeroDivisionError), grants.issue(PUBLIC_ONLY, "alice"):
        _ = 1 / 0
    assert len(grants) == 0


@pytest.mark.parametrize("handle", [None, "", "0" * 32, 0, b"x", ["x"], {"a": 1}])
def test_a_missing_or_made_up_handle_is_refused(handle):
    grants = Grants()
    with grants.issue(PUBLIC_ONLY, "alice"), pytest.raises(GrantError):
        grants.redeem(handle)


def test_a_grant_of_another_registry_is_foreign():
    with Grants().issue(PUBLIC_ONLY, "alice") as grant, pytest.raises(GrantError):
        Grants().redeem(grant.handle)


def test_a_grant_of_no_experts_is_not_issued():
    with pytest.raises(ValueError, match="at least one"):
        Grants().issue(ExpertSet(0), "alice")


def test_call_ids_are_unique_and_do_not_tell_the_handle():
    grants = Grants()
    with (
        grants.issue(PUBLIC_ONLY, "a") as first,
        grants.issue(PUBLIC_ONLY, "b") as second,
    ):
        ids = [g.expect_call([1], 1).id for g in (first, first, second, second)]
    assert len(set(ids)) == 4
    assert not any(first.handle in call_id for call_id in ids)
