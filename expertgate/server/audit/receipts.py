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
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jwt

from expertgate.policies.principal import Principal
from expertgate.server.audit.chain import AuditError
from expertgate.server.audit.signing import PublicKeys, SigningKey
from expertgate.server.audit.writer import AuditUnavailable, Record, Written
from expertgate.server.errors import ApiError

KEPT_S = 3600.0
"""How long a receipt can be asked for after its request has ended."""
MAX_KEPT = 10_000
_TYPE = "expertgate-receipt+jws"
_ISSUER = "expertgate"
_RESULT_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class _Kept:
    claims: dict[str, Any]
    owner: tuple[str, str]
    result: Future[Written]
    until: float


class Receipts:
    """Those of requests that have ended lately; none is signed before it is asked for."""

    def __init__(self, key: SigningKey, *, hashed: bool) -> None:
        """`hashed`: principals are named by a salted hash."""
        self._key = key
        self._hashed = hashed
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def keep(
        self,
        request_id: str,
        principal: Principal,
        request: Record | None,
        result: Future[Written],
        said: dict[str, Any],
    ) -> None:
        """`said`: what the receipt says besides whom it is for and where the log has it."""
        now = time.monotonic()
        claims = {
            "iss": _ISSUER,
            "jti": request_id,
            "iat": int(time.time()),
            "principal": _name(principal, hashed=self._hashed),
            **said,
            "log": {"request": _place(request)},
        }
        self._kept[request_id] = _Kept(claims, _owner(principal), result, now + KEPT_S)
        while len(self._kept) > MAX_KEPT or next(iter(self._kept.values())).until < now:
            self._kept.popitem(last=False)

    async def of(self, request_id: str, principal: Principal) -> str:
        """Raises ApiError 404, for another's as for none; 503 until its result is on disk."""
        kept = self._kept.get(request_id)
        if kept is None or kept.owner != _owner(principal) or kept.until < time.monotonic():
            raise ApiError(404, "not_found", "there is no such receipt, or no longer")
        try:
            # Shielded: whoever asks may leave, and the next one still wants to know.
            waiting = asyncio.shield(asyncio.wrap_future(kept.result))
            result = await asyncio.wait_for(waiting, _RESULT_WITHIN_S)
        except (AuditUnavailable, TimeoutError):
            raise ApiError(
                503, "audit_unavailable", "the result of this request is not on record yet"
            ) from None
        claims = {**kept.claims, "log": {**kept.claims["log"], "result": _place(result)}}
        header = {"typ": _TYPE, "kid": self._key.id}
        return jwt.encode(claims, self._key.private, algorithm="EdDSA", headers=header)


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
        raise ReceiptError(f"{place}: was signed by another key, {key_id}")
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


def _place(record: Record | None) -> dict[str, Any] | None:
    return {"seq": record.seq, "sha256": record.hash} if isinstance(record, Written) else None
