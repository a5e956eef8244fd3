"""Log lines, as text or JSON, each with the id of the request that it speaks of.

No line of ours holds a prompt, an answer or a credential.
"""

import logging
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

Form = Literal["text", "json"]

FACTS = "facts"
"""The attribute of a record that holds what is known of its request."""

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""For log lines alone. It is set anew for each request, so that none speaks of another's."""


def set_up(form: Form) -> None:
    """Ours from INFO on, those of libraries from WARNING on, to stderr."""
    make = logging.getLogRecordFactory()

    def record(*arguments: Any, **named: Any) -> logging.LogRecord:
        made = make(*arguments, **named)
        made.request_id = request_id.get()
        return made

    logging.setLogRecordFactory(record)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSON if form == "json" else _TEXT)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("expertgate").setLevel(logging.INFO)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts: Mapping[str, Any] = getattr(record, FACTS, {})
        pairs = "".join(f" {name}={_within(value)}" for name, value in facts.items())
        line, *trace = super().format(record).split("\n")
        return "\n".join([line + pairs, *trace])


def _within(value: object) -> str:
    """A fact without blanks: a user may be called `ada experts=public`."""
    return str(value).replace("\\", r"\\").replace(" ", r"\x20")


class _Json(JsonFormatter):
    # In UTC, as RFC 3339: who collects lines from several machines must know the zone.
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


_TEXT = _Text("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")
_JSON = _Json(
    "%(asctime)s %(levelname)s %(name)s %(message)s",
    rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    reserved_attrs=[*RESERVED_ATTRS, "vllm_process_name"],  # which is the same in all
)
