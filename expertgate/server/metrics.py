"""What this server counts, beside what vLLM does; docs/metrics.md has the table.

No label names a principal, and an expert's name only stands where there are few: at most 64.
"""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram, Info

from expertgate.model.usage import Work
from expertgate.server.audit.writer import AuditLog
from expertgate.server.changes import Change, PoliciesLoaded, PoliciesRefused, Withdrawn
from expertgate.server.errors import CODES

_FAST = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0, 5.0)
"""Upper bounds in seconds of what takes microseconds where all is well."""

REQUESTS = Counter(
    "expertgate_requests",
    "Requests that were let through to the engine, by how many experts may speak.",
    ["experts"],
)
EXPERT_TOKENS = Counter(
    "expertgate_expert_tokens",
    "Tokens that the router sent to an expert, over its layers' mean.",
    ["expert"],
)
DENIALS = Counter(
    "expertgate_denials", "Requests that were refused or failed, by their error code.", ["code"]
)
for _code in CODES:
    DENIALS.labels(_code)  # from 0 on: of a series that begins above it Prometheus sees no increase
DECISION_SECONDS = Histogram(
    "expertgate_policy_decision_seconds",
    "Time to decide what a principal may consult.",
    buckets=_FAST,
)
HELD = Gauge("expertgate_places_held", "Choices that are running or waiting.")
WAITING = Gauge(
    "expertgate_calls_waiting", "Calls of the engine or the tokenizer that wait for their turn."
)

AUDIT_WAITING = Gauge("expertgate_audit_records_waiting", "Records that wait to be written.")
AUDIT_WRITE_SECONDS = Histogram(
    "expertgate_audit_write_seconds",
    "Time until what was written together was on disk.",
    buckets=_FAST,
)

POLICIES = Info("expertgate_policies", "The policies in force.")
RELOADED = Gauge(
    "expertgate_policy_reload_success", "Whether the policies that were read last are in force."
)
LOADED_AT = Gauge(
    "expertgate_policy_loaded_timestamp_seconds", "When the policies in force were read."
)
WITHDRAWALS = Counter(
    "expertgate_withdrawals", "Requests that were ended because an expert was taken from them."
)


def tell_policies(version: str) -> None:
    """Those that were read just now, and are in force."""
    POLICIES.info({"version": version})
    LOADED_AT.set_to_current_time()
    RELOADED.set(1)


def watch_audit(log: AuditLog) -> None:
    AUDIT_WAITING.set_function(lambda: log.depth)
    log.on_commit = AUDIT_WRITE_SECONDS.observe


def count_work(names: Sequence[str], work: Work) -> None:
    """`names`: of the experts by index."""
    for expert, name in enumerate(names):
        if expert < len(work.slots) and work.slots[expert]:
            EXPERT_TOKENS.labels(name).inc(work.tokens(expert))


def count_change(change: Change) -> None:
    match change:
        case PoliciesLoaded(version, _):
            tell_policies(version)
        case PoliciesRefused():
            RELOADED.set(0)
        case Withdrawn():
            WITHDRAWALS.inc()
