"""Who is let in: places for requests, shared among principals, and the rates of each group.

A request holds a place from before its body is read until its response has ended, and one for
each choice that it asks of the engine. A principal may hold as many as are left for the others:
half where it is alone, a third each where there are two (dynamic thresholds, Choudhury and Hahne,
1998). So a newcomer finds a place however much somebody else asks.

Rates are token buckets that hold a minute's worth, one pair for each principal; a principal in
several groups has the widest of their limits. What a request costs in tokens shows only while it
runs, so a bucket may go below nothing, and nobody comes in until it is above again.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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

    def __init__(self, per_minute: int, now: float) -> None:
        self._capacity = float(per_minute)
        self._level = float(per_minute)
        self._seen = now

    def level(self, now: float) -> float:
        grown = self._level + (now - self._seen) * self._capacity / 60
        self._level = min(self._capacity, grown)
        self._seen = now
        return self._level

    def take(self, amount: float) -> None:
        self._level -= amount

    def wait_s(self, now: float, amount: float) -> float:
        """Seconds until it holds `amount`."""
        return max(0.0, amount - self.level(now)) * 60 / self._capacity

    def full(self, now: float) -> bool:
        return self.level(now) >= self._capacity


@dataclass(slots=True, eq=False)
class _Account:
    concurrent: int | None
    requests: _Bucket | None
    tokens: _Bucket | None
    places: int = 0
    visits: int = 0

    def idle(self, now: float) -> bool:
        buckets = (self.requests, self.tokens)
        return not self.visits and all(b is None or b.full(now) for b in buckets)


@dataclass(slots=True, eq=False)
class Visit:
    """One request that was let in, until it leaves."""

    admission: "Admission"
    account: _Account
    places: int = 0
    left: bool = False

    def take(self, choices: int) -> None:
        """Holds a place for each choice. Raises ApiError: 400 for too many ever, 429 for now."""
        self.admission.take(self, choices)

    def spend(self, tokens: int) -> None:
        """Tokens that were read or written for it."""
        if self.account.tokens is not None:
            self.account.tokens.take(tokens)

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
        self._accounts: dict[tuple[str, Limits], _Account] = {}

    def enter(self, principal: Principal) -> Visit:
        """A place for one request, before anything of it is read. Raises ApiError 429."""
        now = self._clock()
        account = self._account(principal, now)
        if account.concurrent is not None and account.visits >= account.concurrent:
            raise overloaded(f"you have {account.visits} requests running, which is your limit")
        for bucket, what in ((account.requests, "requests"), (account.tokens, "tokens")):
            # Of tokens, a single one: what the request will cost isn't known yet.
            wait_s = 0.0 if bucket is None else bucket.wait_s(now, 1)
            if wait_s > 0:
                raise overloaded(f"you have used up your {what} per minute", math.ceil(wait_s))
        visit = Visit(self, account)
        self.take(visit, 1)
        account.visits += 1
        if account.requests is not None:
            account.requests.take(1)
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

    def leave(self, visit: Visit) -> None:
        if visit.left:
            return
        visit.left = True
        visit.account.visits -= 1
        visit.account.places -= visit.places
        self._held -= visit.places
        HELD.set(self._held)

    def _account(self, principal: Principal, now: float) -> _Account:
        limits = self._limits_of(principal)
        key = (principal.id, limits)
        if key not in self._accounts:
            if len(self._accounts) >= _MANY_ACCOUNTS:
                self._accounts = {k: a for k, a in self._accounts.items() if not a.idle(now)}
            self._accounts[key] = _Account(
                limits.concurrent,
                _bucket(limits.requests_per_minute, now),
                _bucket(limits.tokens_per_minute, now),
            )
        return self._accounts[key]

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


def _bucket(per_minute: int | None, now: float) -> _Bucket | None:
    return None if per_minute is None else _Bucket(per_minute, now)


def _widest(values: Iterable[int | None]) -> int | None:
    """None is no limit, the widest of all."""
    known = list(values)
    return None if None in known else max(value for value in known if value is not None)
