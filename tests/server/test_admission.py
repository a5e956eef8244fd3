"""Places and rates, by a clock of the test's own."""

import pytest

from expertgate.policies.principal import Principal
from expertgate.server.admission import Admission
from expertgate.server.config import Limits
from expertgate.server.errors import ApiError

ALICE, BOB, EVE = (Principal(name) for name in ("alice", "bob", "eve"))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def refused(call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value


def fill(admission, principal):
    """As many requests as are let in."""
    visits = []
    error = None
    while error is None:
        try:
            visits.append(admission.enter(principal))
        except ApiError as caught:
            error = caught
    assert (error.status, error.code) == (429, "overloaded")
    assert int(error.headers["Retry-After"]) >= 1
    return visits


def test_whoever_is_alone_may_hold_half():
    assert len(fill(Admission(places=100), ALICE)) == 50


def test_there_is_room_for_newcomers_however_many_are_there():
    admission = Admission(places=100)
    held = [len(fill(admission, Principal(f"user {n}"))) for n in range(20)]
    assert held[:4] == [50, 25, 12, 6]
    assert all(held[:7])
    assert sum(held) <= 100


def test_places_are_given_back_once():
    admission = Admission(places=10)
    visits = fill(admission, ALICE)
    for visit in visits:
        with visit:
            pass
        visit.leave()
    assert len(fill(admission, ALICE)) == 5


def test_a_place_for_each_choice():
    admission = Admission(places=20)
    with admission.enter(ALICE) as visit:
        visit.take(7)
        with admission.enter(ALICE) as another:
            assert refused(another.take, 7).status == 429
            another.take(3)
        with admission.enter(BOB) as others:
            others.take(6)
    with admission.enter(ALICE) as visit:
        visit.take(10)


def test_who_was_let_in_is_not_refused_for_whoever_comes_after():
    admission = Admission(places=100)
    mine = fill(admission, ALICE)
    fill(admission, BOB)
    for visit in mine:
        visit.take(1)
    assert refused(mine[0].take, 2).status == 429


def test_more_choices_than_can_ever_be_held_are_not_a_matter_of_waiting():
    with Admission(places=20).enter(ALICE) as visit:
        error = refused(visit.take, 11)
    assert (error.status, error.code, error.param) == (400, "invalid_request", "n")
    assert "takes 10" in error.message


def test_a_single_place_can_be_had():
    admission = Admission(places=1)
    with admission.enter(ALICE) as visit:
        visit.take(1)
        assert refused(admission.enter, BOB).status == 429
    with admission.enter(BOB):
        pass


def test_requests_per_minute(clock):
    admission = Admission({"*": Limits(requests_per_minute=3)}, clock=clock)
    for _ in range(3):
        admission.enter(ALICE).leave()
    error = refused(admission.enter, ALICE)
    assert error.headers["Retry-After"] == "20"
    admission.enter(BOB).leave()  # each has a bucket
    clock.now += 20
    admission.enter(ALICE).leave()
    assert refused(admission.enter, ALICE).status == 429
    clock.now += 3600
    for _ in range(3):
        admission.enter(ALICE).leave()
    assert refused(admission.enter, ALICE).status == 429


def test_tokens_per_minute_are_counted_as_they_are_spent(clock):
    admission = Admission({"*": Limits(tokens_per_minute=60)}, clock=clock)
    with admission.enter(ALICE) as visit:
        visit.spend(30)
        admission.enter(ALICE).leave()
        visit.spend(59)  # nobody knew before
        error = refused(admission.enter, ALICE)
    assert error.headers["Retry-After"] == "30"
    clock.now += 30
    admission.enter(ALICE).leave()


def test_concurrent_requests(clock):
    admission = Admission({"*": Limits(concurrent=2)}, clock=clock)
    first, second = admission.enter(ALICE), admission.enter(ALICE)
    assert refused(admission.enter, ALICE).status == 429
    first.leave()
    admission.enter(ALICE)
    assert refused(admission.enter, ALICE).status == 429
    second.leave()


def test_the_widest_limit_of_ones_groups_holds(clock):
    admission = Admission(
        {
            "*": Limits(concurrent=1),
            "small": Limits(concurrent=2, requests_per_minute=100),
            "large": Limits(concurrent=4, requests_per_minute=3),
            "free": Limits(),
        },
        clock=clock,
    )
    for groups, most in (((), 1), (("other",), 1), (("small",), 2), (("small", "large"), 4)):
        asking = Principal(f"{groups}", frozenset(groups))
        assert len(fill(admission, asking)) == most
    assert len(fill(admission, Principal("f", frozenset(["small", "free"])))) > 100


IN_BOTH = {
    "small": Limits(concurrent=2, requests_per_minute=6, tokens_per_minute=60),
    "large": Limits(concurrent=4, requests_per_minute=12, tokens_per_minute=120),
}


def with_groups(*groups):
    """One principal, by several tokens."""
    return Principal("corp:ada", frozenset(groups))


def test_other_groups_in_the_next_token_bring_no_second_allowance(clock):
    admission = Admission(IN_BOTH, clock=clock)
    for group, most in (("small", 6), ("large", 6)):  # 12 in all
        for _ in range(most):
            admission.enter(with_groups(group)).leave()
    for group in ("small", "large"):
        assert refused(admission.enter, with_groups(group)).headers["Retry-After"] != "0"
    clock.now += 5
    admission.enter(with_groups("large")).leave()  # one in five seconds
    assert refused(admission.enter, with_groups("small")).headers["Retry-After"] == "10"
    admission.enter(Principal("corp:eve", frozenset(["small"]))).leave()


def test_what_a_wider_limit_allowed_uses_up_a_narrower_one_and_no_more(clock):
    admission = Admission(IN_BOTH, clock=clock)
    admission.enter(with_groups("small")).leave()
    with admission.enter(with_groups("large")) as visit:
        visit.spend(110)
    assert refused(admission.enter, with_groups("small")).headers["Retry-After"] == "1"
    clock.now += 1
    admission.enter(with_groups("small")).leave()
    free = Admission({**IN_BOTH, "free": Limits()}, clock=clock)
    free.enter(with_groups("small")).leave()
    with free.enter(with_groups("free")) as visit:
        visit.spend(100_000)
    assert refused(free.enter, with_groups("small")).headers["Retry-After"] == "1"


def test_other_groups_in_the_next_token_bring_no_more_places(clock):
    admission = Admission(IN_BOTH, clock=clock)
    held = fill(admission, with_groups("large"))
    assert (len(held), len(fill(admission, with_groups("small")))) == (4, 0)
    for visit in held[:3]:
        visit.leave()
    assert len(fill(admission, with_groups("small"))) == 1
    rates = {"some": Limits(requests_per_minute=900), "more": Limits(requests_per_minute=901)}
    admission = Admission(rates, places=100)
    assert len(fill(admission, with_groups("some"))) == 50
    assert not fill(admission, with_groups("more"))


def test_accounts_of_those_who_left_are_dropped(clock):
    admission = Admission({"*": Limits(requests_per_minute=60)}, clock=clock)
    kept = admission.enter(EVE)
    for n in range(10_000):
        admission.enter(Principal(f"{n}")).leave()
        clock.now += 0.1
    assert len(admission._accounts) < 5000
    assert refused(lambda: [admission.enter(EVE) for _ in range(61)]).status == 429
    kept.leave()


def test_whoever_used_up_a_rate_is_not_forgotten_for_newcomers(clock):
    admission = Admission({"*": Limits(requests_per_minute=2)}, clock=clock)
    for _ in range(2):
        admission.enter(BOB).leave()
    for n in range(5000):
        admission.enter(Principal(f"{n}")).leave()
    assert refused(admission.enter, BOB).status == 429


def test_whoever_found_no_place_is_not_counted_as_running():
    admission = Admission({"*": Limits(concurrent=2)}, places=1)
    with admission.enter(BOB):
        for _ in range(2):
            refused(admission.enter, ALICE)
    admission.enter(ALICE)
