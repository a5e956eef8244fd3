"""Who is let in: places for requests, shared among principals, and the rates of each group.

A request holds a place from before its body is read until its response has ended, and one for
each choice that it asks of the engine. A principal may hold as many as are left for the others:
half where it is alone, a third each where there are two (dynamic thresholds, Choudhury and Hahne,
1998). So a newcomer finds a place however much somebody else asks.

Rates are token buckets that hold a minute's worth, for each principal; a principal in several
groups has the widest of their limits. What a request costs in tokens shows only while it runs, so a
bucket may go below nothing, and nobody comes in until it is above again. Groups come with a token
or with a gateway's word, so a principal may have others in the next request: whatever it does
counts against each limit that it has had.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from expertgate.policies.principal import Principal
from expertgate.server.config import EVERYONE, Limits
from expertgate.server.errors import FULL, bad_request, overloaded
from expertgate.server.metrics import HELD

PLACES = 1024
"""Choices that may run or wait at once, where the configuration doesn't say."""

_MANY_ACCOUNTS = 4096
"""From so many on, those of principals who have been away are looked for and dropped."""


class _Bucket:
    """Holds a minute's worth, and fills evenly."""

    def __init__(self, per_minute: int, now: float, used: float) -> None:
        self._capacity = float(per_minute)
        self._level = max(0.0, per_minute - used)
        self._seen = now

    def level(self, now: float) -> float:
        grown = self._level + (now - self._seen) * self._capacity / 60
        self._level = min(self._capacity, grown)
        self._seen = now
        return self._level

    def take(self, now: float, amount: float, *, owing: bool) -> None:
        """Where it may not come to be `owing`, no more than there is."""
        level = self.level(now)
        self._level -= amount if owing else min(amount, max(0.0, level))

    def wait_s(self, now: float, amount: float) -> float:
        """Seconds until it holds `amount`."""
        return max(0.0, amount - self.level(now)) * 60 / self._capacity

    def used(self, now: float) -> float:
        return self._capacity - self.level(now)


class _Rate:
    """Of one principal, by each limit that it has had: who has several has none of them twice."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}

    def wait_s(self, now: float, per_minute: int | None) -> float:
        """Seconds until one more may be had by this limit."""
        if per_minute is None:
            return 0.0
        if per_minute not in self._buckets:
            used = max((bucket.used(now) for bucket in self._buckets.values()), default=0.0)
            self._buckets[per_minute] = _Bucket(per_minute, now, used)
        return self._buckets[per_minute].wait_s(now, 1)

    def take(self, now: float, per_minute: int | None, amount: float) -> None:
        """Had by this limit, it may exceed it; another is used up by it at most."""
        for limit, bucket in self._buckets.items():
            bucket.take(now, amount, owing=limit == per_minute)

    def unused(self, now: float) -> bool:
        return all(bucket.used(now) <= 0 for bucket in self._buckets.values())


@dataclass(slots=True, eq=False)
class _Account:
    """Of one principal."""

    requests: _Rate = field(default_factory=_Rate)
    tokens: _Rate = field(default_factory=_Rate)
    places: int = 0
    visits: int = 0

    def idle(self, now: float) -> bool:
        return not self.visits and self.requests.unused(now) and self.tokens.unused(now)


@dataclass(slots=True, eq=False)
class Visit:
    """One request that was let in, until it leaves."""

    admission: "Admission"
    account: _Account
    limits: Limits
    places: int = 0
    left: bool = False

    def take(self, choices: int) -> None:
        """Holds a place for each choice. Raises ApiError: 400 for too many ever, 429 for now."""
        self.admission.take(self, choices)

    def spend(self, tokens: int) -> None:
        """Tokens that were read or written for it."""
        self.admission.spend(self, tokens)

    def leave(self) -> None:
        self.admission.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Admission:
    """`places`: choices that may run or wait at once, those of all principals together."""

    def __init__(
        self,
        limits: Mapping[str, Limits] | None = None,
        places: int = PLACES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places = places
        self._held = 0
        self._limits = limits or {}
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._many = _MANY_ACCOUNTS

    def enter(self, principal: Principal) -> Visit:
        """A place for one request, before anything of it is read. Raises ApiError 429."""
        now = self._clock()
        account, limits = self._account(principal.id, now), self._limits_of(principal)
        if limits.concurrent is not None and account.visits >= limits.concurrent:
            words = f"you have {account.visits} requests running; your limit is {limits.concurrent}"
            raise overloaded(words)
        for rate, per_minute, what in (
            (account.requests, limits.requests_per_minute, "requests"),
            # A single one: what the request will cost isn't known yet.
            (account.tokens, limits.tokens_per_minute, "tokens"),
        ):
            wait_s = rate.wait_s(now, per_minute)
            if wait_s > 0:
                raise overloaded(f"you have used up your {what} per minute", math.ceil(wait_s))
        visit = Visit(self, account, limits)
        self.take(visit, 1)
        account.visits += 1
        account.requests.take(now, limits.requests_per_minute, 1)
        return visit

    def take(self, visit: Visit, choices: int) -> None:
        """Sees to it that `visit` holds so many places; `Visit.take` says what it raises."""
        account, most, more = visit.account, max(1, self.places // 2), choices - visit.places
        if choices > most:
            raise bad_request(f"n times prompts is {choices}; this server takes {most}", "n")
        if more <= 0:
            return
        free = self.places - self._held - more
        if free < 0 or account.places + more > max(1, free):
            raise overloaded(FULL)
        account.places += more
        visit.places += more
        self._held += more
        HELD.set(self._held)

    def spend(self, visit: Visit, tokens: int) -> None:
        """Tokens of `visit`; `Visit.spend` says which."""
        visit.account.tokens.take(self._clock(), visit.limits.tokens_per_minute, tokens)

    def leave(self, visit: Visit) -> None:
        if visit.left:
            return
        visit.left = True
        visit.account.visits -= 1
        visit.account.places -= visit.places
        self._held -= visit.places
        HELD.set(self._held)

    def _account(self, user: str, now: float) -> _Account:
        if user not in self._accounts:
            if len(self._accounts) >= self._many:
                self._accounts = {u: a for u, a in self._accounts.items() if not a.idle(now)}
                # Where most are here, not with each newcomer again.
                self._many = max(_MANY_ACCOUNTS, 2 * len(self._accounts))
            self._accounts[user] = _Account()
        return self._accounts[user]

    def _limits_of(self, principal: Principal) -> Limits:
        """The widest of each kind that its groups have; those of everyone, where none has any."""
        own = [self._limits[group] for group in principal.groups if group in self._limits]
        if not own:
            return self._limits.get(EVERYONE, Limits())
        return Limits(
            requests_per_minute=_widest(limits.requests_per_minute for limits in own),
            tokens_per_minute=_widest(limits.tokens_per_minute for limits in own),
            concurrent=_widest(limits.concurrent for limits in own),
        )


def _widest(values: Iterable[int | None]) -> int | None:
    """None is no limit, the widest of all."""
    known = list(values)
    return None if None in known else max(value for value in known if value is not None)
