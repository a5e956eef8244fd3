"""Receipts: what a request was permitted and what each expert did for it, signed by the server.

A receipt is a JWS in compact form (RFC 7515, EdDSA of RFC 8037); `docs/audit.md` explains what it
says. Whoever has the public key can check it, without the server and without the log.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jwt

from expertgate.policies.principal import Principal
from expertgate.server.audit.chain import AuditError, shown
from expertgate.server.audit.signing import PublicKeys, SigningKey
from expertgate.server.audit.writer import AuditUnavailable, Recorded, Written
from expertgate.server.errors import ApiError

KEPT_S = 3600.0
"""How long a receipt can be asked for after its request has ended."""
MAX_KEPT = 10_000
_TYPE = "expertgate-receipt+jws"
_ISSUER = "expertgate"
_RESULT_WITHIN_S = 5.0


@dataclass(slots=True)
class _Kept:
    """As small as it can be, for there are thousands: claims as JSON, and no lock once written."""

    claims: bytes
    owner: tuple[str, str]
    result: Future[Written] | Written
    until: float

    def settle(self, result: Future[Written]) -> None:
        if result.exception() is None:
            self.result = result.result()


class Receipts:
    """Those of requests that have ended lately; none is signed before it is asked for."""

    def __init__(self, key: SigningKey, hurry: Callable[[], None], *, hashed: bool) -> None:
        """`hurry` has the log written; `hashed`: principals are named by a salted hash."""
        self._key = key
        self._hurry = hurry
        self._hashed = hashed
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def keep(
        self,
        request_id: str,
        principal: Principal,
        request: Recorded | None,
        result: Future[Written],
        said: dict[str, Any],
        age_s: float = 0.0,
    ) -> None:
        """Of a request that ended `age_s` seconds ago.

        `said`: what the receipt says besides whom it is for and where the log has it.
        """
        now = time.monotonic()
        claims = {
            "iss": _ISSUER,
            "jti": request_id,
            "iat": int(time.time() - age_s),
            "principal": _name(principal, hashed=self._hashed),
            **said,
            "log": {"request": _place(request)},
        }
        text = json.dumps(claims).encode()
        kept = _Kept(text, _owner(principal), result, now - age_s + KEPT_S)
        self._kept[request_id] = kept
        result.add_done_callback(kept.settle)
        while len(self._kept) > MAX_KEPT or next(iter(self._kept.values())).until < now:
            self._kept.popitem(last=False)

    def restore(
        self,
        records: Iterable[tuple[Mapping[str, Any], Written]],
        catalogues: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> None:
        """Keeps what can still be asked for of requests that ended before the server started.

        `records`: of the log, newest first, as `lately` gives them. `catalogues`: the experts of
        catalogues that are known, by digest; the log has others.
        """
        now = datetime.now(UTC)
        known = dict(catalogues)
        results: dict[str, tuple[Mapping[str, Any], Written]] = {}
        ended: list[tuple[float, Mapping[str, Any], Written, Mapping[str, Any], Written]] = []
        for record, place in records:
            age_s = (now - datetime.fromisoformat(record["time"])).total_seconds()
            # A request may be older than its result, but not for ever.
            if age_s > 2 * KEPT_S or (age_s > KEPT_S and not results):
                break
            match record["kind"]:
                case "result" if age_s <= KEPT_S and len(results) + len(ended) < MAX_KEPT:
                    results[record["request"]] = record, place
                case "request" if record["request"] in results:
                    result, its_place = results.pop(record["request"])
                    ended_s = now - datetime.fromisoformat(result["time"])
                    ended.append((ended_s.total_seconds(), record, place, result, its_place))
                case "start" | "catalogue":
                    known[record["catalogue"]] = record["experts"]
        for age_s, record, place, result, its_place in sorted(ended, key=_age, reverse=True):
            experts = {one["name"]: one for one in known.get(record["catalogue"], ())}
            if not experts.keys() >= set(result["effective"]):
                continue  # whose they were stands too far back in the log
            on_disk: Future[Written] = Future()
            on_disk.set_result(its_place)
            said = statement(result, [experts[name] for name in result["effective"]], record)
            who = Principal(record["principal"], via=record["via"])
            self.keep(record["request"], who, place, on_disk, said, age_s)

    async def of(self, request_id: str, principal: Principal) -> str:
        """Raises ApiError 404, for another's as for none; 503 until its result is on disk."""
        kept = self._kept.get(request_id)
        if kept is None or kept.owner != _owner(principal) or kept.until < time.monotonic():
            raise ApiError(404, "not_found", "there is no such receipt, or no longer")
        result = kept.result
        if isinstance(result, Future):
            self._hurry()
            try:
                # Shielded: whoever asks may leave, and the next one still wants to know.
                waiting = asyncio.shield(asyncio.wrap_future(result))
                result = await asyncio.wait_for(waiting, _RESULT_WITHIN_S)
            except (AuditUnavailable, TimeoutError):
                raise ApiError(
                    503, "audit_unavailable", "the result of this request is not on record yet"
                ) from None
        claims = json.loads(kept.claims)
        claims["log"]["result"] = _place(result)
        header = {"typ": _TYPE, "kid": self._key.id}
        return jwt.encode(claims, self._key.private, algorithm="EdDSA", headers=header)


def statement(
    result: Mapping[str, Any], experts: Iterable[Mapping[str, Any]], request: Mapping[str, Any]
) -> dict[str, Any]:
    """What a receipt says of a request, out of its two records and the catalogue's experts."""
    return {
        **{name: result[name] for name in ("status", "code", "finish_reasons", "usage")},
        "experts": [
            {"name": one["name"], "owner": one["owner"], "weights_sha256": one["sha256"]}
            for one in experts
        ],
        "policy_version": request["policy_version"],
        "catalogue": request["catalogue"],
    }


def verify(text: str, keys: PublicKeys, place: str) -> dict[str, Any]:
    """The claims of a receipt, or of an answer that has one as `receipt`. Raises AuditError.

    ReceiptError is for one that is whole, and not what the key signed.
    """
    receipt = _receipt_in(text.strip(), place)
    try:
        header = jwt.get_unverified_header(receipt)
    except jwt.InvalidTokenError:
        raise AuditError(f"{place}: is no receipt: it is no JWS in compact form") from None
    key_id = header.get("kid")
    if header.get("typ") != _TYPE or not isinstance(key_id, str):
        raise AuditError(f"{place}: is no receipt, but a token of another kind")
    if key_id not in keys:
        raise ReceiptError(f"{place}: was signed by another key, {shown(key_id)}")
    try:
        return jwt.decode(
            receipt,
            keys[key_id],
            algorithms=["EdDSA"],
            issuer=_ISSUER,
            options={"require": ["iss", "jti", "iat"], "verify_iat": False},
        )
    except jwt.InvalidTokenError as error:
        raise ReceiptError(f"{place}: does not hold: {error}") from None


class ReceiptError(Exception):
    """A receipt that was not signed as it stands; one line that says so."""


def names(claims: dict[str, Any], principal: str) -> bool:
    """Whether a receipt is for this principal, whichever way it names them."""
    found = claims.get("principal", {})
    if "sha256" in found:
        return bool(found["sha256"] == _salted(str(found.get("salt")), principal))
    return bool(found.get("id") == principal)


def _receipt_in(text: str, place: str) -> str:
    if not text.startswith("{"):
        return text
    try:
        receipt = json.loads(text).get("receipt")
    except (ValueError, RecursionError):
        raise AuditError(f"{place}: is neither a receipt nor JSON that has one") from None
    if not isinstance(receipt, str):
        raise AuditError(f"{place}: has no 'receipt'")
    return receipt


def _age(ended: tuple[float, Any, Any, Any, Any]) -> float:
    return ended[0]


def _owner(principal: Principal) -> tuple[str, str]:
    return principal.id, principal.via


def _name(principal: Principal, *, hashed: bool) -> dict[str, str]:
    # Half of a surrogate pair is text to Python, and to nobody else.
    name = principal.id.encode("utf-8", "replace").decode()
    if not hashed:
        return {"id": name, "via": principal.via}
    salt = secrets.token_hex(16)
    return {"salt": salt, "sha256": _salted(salt, name)}


def _salted(salt: str, name: str) -> str:
    return hashlib.sha256(f"{salt}:{name}".encode()).hexdigest()


def _place(recorded: Recorded | None) -> dict[str, Any] | None:
    return {"seq": recorded.seq, "sha256": recorded.hash} if isinstance(recorded, Written) else None
