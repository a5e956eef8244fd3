"""One permitted request in the audit log, from its record to its result."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from expertgate.model.usage import Usage
from expertgate.policies.expert_set import ExpertSet
from expertgate.server.audit.receipts import Receipts, statement
from expertgate.server.audit.writer import (
    AuditLate,
    AuditLog,
    AuditUnavailable,
    Recorded,
    Waived,
    Written,
)
from expertgate.server.errors import ApiError
from expertgate.server.grants import Grant

log = logging.getLogger(__name__)

CLIENT_GONE = 499
_PROMPT = b"expertgate/audit-prompt/1"
_DIGITS = 9


class Entry:
    """Until something else is known of how the request ended, the client has left."""

    def __init__(
        self,
        audit_log: AuditLog | None,
        receipts: Receipts | None,
        grant: Grant,
        experts: Sequence[Mapping[str, Any]],
        fields: dict[str, Any],
    ) -> None:
        """`experts`: of the effective set, as receipts describe them.

        `fields`: what the record of the request says.
        """
        self.grant = grant
        self._experts = experts
        self.request_id: str = fields["request"]
        self.result: Future[Written] | None = None
        self.begun = False
        """Whether the log has the request, or may have it soon: then it gets a result as well."""
        self.status = CLIENT_GONE
        self.code: str | None = "client_gone"
        self._log = audit_log
        self._receipts = receipts
        self._fields = fields

    async def begin(self) -> None:
        """Returns once the request is on disk; only then can its grant be used.

        Raises ApiError 503 `audit_unavailable`.
        """
        self.begun = True
        try:
            self.grant.recorded = await append(self._log, "request", **self._fields)
        except ApiError as error:
            self.begun = isinstance(error.__cause__, AuditLate)
            raise

    def ended(self, status: int, code: str | None) -> None:
        """With which status, and which error's code, if any."""
        self.status, self.code = status, code

    def close(self) -> None:
        """Queues the result, once, of a grant that has ended."""
        if self._log is None or not self.begun or self.result is not None:
            return
        grant = self.grant
        names = [expert["name"] for expert in self._experts]
        usage = None if grant.usage is None else _usage_fields(grant.usage, grant.experts, names)
        reasons = Counter(reason for call in grant.calls for reason in call.finish_reasons.values())
        ended = {
            "status": self.status,
            "code": self.code,
            "finish_reasons": dict(reasons),
            "usage": usage,
        }
        self.result = self._log.note(
            "result",
            request=self.request_id,
            effective=names,
            prompts=[
                self._log.key.keyed_digest(_PROMPT, call.prompt_digest) for call in grant.calls
            ],
            **ended,
        )
        if self._receipts is not None and grant.basis is not None:
            said = statement(ended, self._experts, self._fields)
            self._receipts.keep(
                self.request_id, grant.basis.principal, grant.recorded, self.result, said
            )

    async def receipt(self) -> str | None:
        """That of a request that is closed; None where its result can't be written now."""
        if self._receipts is None or self.grant.basis is None:
            return None
        try:
            return await self._receipts.of(self.request_id, self.grant.basis.principal)
        except ApiError as error:
            log.error("an answer goes out without its receipt: %s", error)
            return None


async def append(audit_log: AuditLog | None, kind: str, **fields: Any) -> Recorded:
    """Returns once the record is on disk, or waived. Raises ApiError 503 `audit_unavailable`."""
    if audit_log is None:
        return Waived("there is no audit log")
    try:
        return await audit_log.append(kind, **fields)
    except AuditUnavailable as error:
        # The reason names disks and paths, which are the server's own affair.
        log.error("refused: the audit log can't be written: %s", error)
        raise ApiError(
            503,
            "audit_unavailable",
            "this request can't be recorded, and so it is not run; try again later",
            None,
            {"Retry-After": "1"},
        ) from error


def _usage_fields(usage: Usage, experts: ExpertSet, names: Sequence[str]) -> dict[str, Any]:
    work = usage.work
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": work.cached,
        "completion_tokens": usage.completion_tokens,
        "computed_tokens": work.computed,
        "experts": {
            name: {
                "tokens": _rounded(work.tokens(index)),
                "share": _rounded(work.share(index)),
            }
            for index, name in zip(experts, names, strict=True)
        },
    }


def _rounded(value: float) -> float:
    """As JSON's canonical form has it: 131, and not 131.0."""
    found = round(value, _DIGITS)
    return int(found) if found.is_integer() else found
