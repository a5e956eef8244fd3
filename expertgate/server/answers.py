"""What vLLM's handlers give back, as this server's responses: experts told, internals left out."""

import json
import logging
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from jinja2 import TemplateError
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import (
    GenerationError,
    GracefulHTTPError,
    VLLMClientError,
    VLLMNotFoundError,
    VLLMServerError,
)
from vllm.v1.engine.exceptions import EngineDeadError

from expertgate.model.catalogue import Catalogue
from expertgate.server.errors import FULL, ApiError, overloaded, said_by_vllm, withdrawn
from expertgate.server.grants import Grant, GrantError, WithdrawnError
from expertgate.server.guard import UnavailableError

log = logging.getLogger(__name__)

_QUEUE_FULL = HTTPStatus.SERVICE_UNAVAILABLE.phrase
"""The type that vLLM gives to a full queue, whose status is that of a dead engine."""
HIDDEN = ("system_fingerprint", "kv_transfer_params", "ec_transfer_params", "metrics")
HIDDEN_IN_CHOICE = ("routed_experts",)
PROMPT = ("input_text", "input_tokens")
"""What vLLM calls the prompt where it is too long, whichever field of a body has it."""

DONE = "data: [DONE]\n\n"
_DATA = "data: "
_ERROR_EVENT = 'data: {"error"'
# Those of responses have names.
_NAMED_ERROR = "event: error\n"
_NAMED_LAST = "event: response.completed\n"
# Neither can occur inside a JSON string, where quotes are escaped.
_FINISHED = '"finish_reason":"'
_TOTALS = '"choices":[]'


def experts(catalogue: Catalogue, grant: Grant) -> dict[str, Any]:
    """The `experts` object of a response: what was effective and, once all is done, who did it."""
    found: dict[str, Any] = {"effective": catalogue.names(grant.experts)}
    if grant.usage is not None:
        work = grant.usage.work
        found["usage"] = {
            name: {"tokens": round(work.tokens(expert), 3), "share": work.share(expert)}
            for name, expert in zip(found["effective"], grant.experts, strict=True)
        }
        found["computed"] = work.computed
        found["cached"] = work.cached
    return found


def rendered(response: Any) -> bytes:
    """The JSON of a whole response, without what clients may not see. Uses the response up.

    Choice by choice: where this runs beside the event loop, that has its turn between them.
    """
    choices = getattr(response, "choices", None)
    shell = response if choices is None else response.model_copy(update={"choices": []})
    text: str = shell.model_dump_json(by_alias=True, exclude=set(HIDDEN))
    if choices is not None:
        hidden = set(HIDDEN_IN_CHOICE)
        parts = []
        while choices:  # each is let go when it is rendered, and not all at the end in one go
            parts.append(choices.pop(0).model_dump_json(by_alias=True, exclude=hidden))
        text = text.replace(_TOTALS, f'"choices":[{",".join(parts)}]', 1)
    return text.encode()


def with_more(text: bytes, more: Mapping[str, Any]) -> bytes:
    """The JSON of a response with `more` at its end."""
    return b"".join((memoryview(text)[:-1], b",", to_json(more).encode()[1:]))


async def events(
    first: str,
    rest: AsyncGenerator[str, None],
    experts: Callable[[], Mapping[str, Any]],
    *,
    totals: bool,
) -> AsyncGenerator[str, None]:
    """The events of a stream, `first` and `rest`, with `experts` in the one that has the usage.

    `totals`: the client asked for usage, so a last event without choices follows; else each
    choice's last event tells. `experts` is asked when such an event is there, and not before.
    """
    mark = _TOTALS if totals else _FINISHED
    async with aclosing(rest):
        yield _rewritten(first, mark, experts)
        async for chunk in rest:
            yield _rewritten(chunk, mark, experts)


def _rewritten(chunk: str, mark: str, experts: Callable[[], Mapping[str, Any]]) -> str:
    if (error := from_event(chunk)) is not None:
        return _event(error.body())
    if mark in chunk:
        return _event({**_parsed(chunk), "experts": dict(experts())})
    return chunk


def ending(error: ApiError, _: int) -> bytes:
    """How a stream ends that fails after its first event."""
    return f"{_event(error.body())}{_DATA}[DONE]\n\n".encode()


def from_event(chunk: str) -> ApiError | None:
    """The error in an event of a stream, if it is one."""
    if not chunk.startswith(_ERROR_EVENT):
        return None
    return from_response(ErrorResponse.model_validate(_parsed(chunk)))


def receipt_event(last: str, receipt: str | None) -> str:
    """An event of the same answer as the event `last`, with a receipt and no choices."""
    try:
        known = _parsed(last)
    except ValueError:
        known = {}
    same: dict[str, Any] = {
        name: known[name] for name in ("id", "object", "created", "model") if name in known
    }
    return _event({**same, "choices": [], "receipt": receipt})


def error_code(event: str) -> str | None:
    """The code of an error that is an event of a stream of ours, if it is one."""
    if event.startswith(_ERROR_EVENT):
        return str(_parsed(event)["error"]["code"])
    if event.startswith(_NAMED_ERROR):
        return str(json.loads(event.partition("\ndata: ")[2])["code"])
    return None


def is_last(event: str) -> bool:
    """Whether this is the event with which a whole stream ends."""
    return event == DONE or event.startswith(_NAMED_LAST)


def from_response(response: ErrorResponse) -> ApiError:
    """An error of vLLM's, whose code is a number, as one of ours."""
    error = response.error
    if error.type == _QUEUE_FULL:
        return overloaded(FULL)
    return _of_status(error.code, error.message, error.param)


def from_exception(error: Exception) -> ApiError | None:
    """What a handler raised, as the client may see it; None where it is the server's own fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, WithdrawnError):
        return withdrawn(error)
    if isinstance(error, GrantError):
        return None
    if isinstance(error, EngineDeadError | UnavailableError):
        return _of_status(503, str(error) if isinstance(error, UnavailableError) else "", None)
    if isinstance(error, GracefulHTTPError):  # the engine's queue is full
        return overloaded(FULL)
    if isinstance(error, GenerationError):
        return _of_status(int(error.status_code), str(error), None)
    if isinstance(error, VLLMServerError):
        return None
    if isinstance(error, VLLMNotFoundError):
        return _of_status(404, str(error), None)
    # vLLM still reports much of what is wrong with a request by Python's own kinds.
    if isinstance(error, VLLMClientError | ValueError | TypeError | OverflowError):
        if not isinstance(error, VLLMClientError):
            _log_place(error)
        return _of_status(400, str(error), getattr(error, "parameter", None))
    if isinstance(error, TemplateError):
        return _of_status(400, str(error), "messages")
    return None


def _log_place(error: Exception) -> None:
    """Where it was raised: it may be a bug. Not its words, which may be the client's own."""
    place = "".join(traceback.format_tb(error.__traceback__))
    log.warning("%s is taken for the client's fault, raised at\n%s", type(error).__name__, place)


def internal_error() -> ApiError:
    return ApiError(500, "internal_error", "the server failed; its log says why")


def _of_status(status: int, message: str, param: str | None) -> ApiError:
    if status == 404:
        return ApiError(404, "model_not_found", message, param)
    if status == 429:
        return overloaded(FULL)
    if status == 503:
        return ApiError(503, "engine_unavailable", message or "the engine has stopped")
    if 400 <= status < 500:
        return ApiError(status, "invalid_request", said_by_vllm(message), param)
    log.error("the engine failed a request: %s", message)
    return internal_error()


def _event(found: Mapping[str, Any]) -> str:
    return f"{_DATA}{to_json(found)}\n\n"


def to_json(found: Mapping[str, Any]) -> str:
    """As short as it goes."""
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def _parsed(chunk: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(chunk.removeprefix(_DATA))
    return found
