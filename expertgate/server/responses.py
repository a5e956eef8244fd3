"""OpenAI's Responses: the body of a request, and the events of a stream.

Nothing is stored: a conversation is sent whole each time. vLLM's store asks no owner, and what it
keeps was written by experts that whoever comes back for it may not consult.
"""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest as _ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from expertgate.server import answers
from expertgate.server.circumstances import Purpose
from expertgate.server.errors import ApiError, bad_request
from expertgate.server.response_items import NULLS, check_items, readable
from expertgate.server.schemas import HINTS, Experts, Hints, Receipt, check_tools

log = logging.getLogger(__name__)

MAX_METADATA = 16
_MAX_INCLUDED = 16
_PREAMBLE = ("response.created", "response.in_progress")
_COMPLETED = "response.completed"
_LAST = f"event: {_COMPLETED}\n"
"""How the last event of a stream begins."""
# It can't occur inside a JSON string, where quotes are escaped; and no field comes before it.
_RESPONSE = '"response":{'


class ResponsesRequest(Hints, _ResponsesRequest):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = HINTS | frozenset(
        {
            "background",
            "cache_salt",
            "experts",
            "frequency_penalty",
            "ignore_eos",
            "include",
            "include_reasoning",
            "include_stop_str_in_output",
            "input",
            "instructions",
            "logit_bias",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
            "min_p",
            "model",
            "parallel_tool_calls",
            "presence_penalty",
            "previous_response_id",
            "purpose",
            "receipt",
            "reasoning",
            "repetition_penalty",
            "seed",
            "skip_special_tokens",
            "stop",
            "stop_token_ids",
            "store",
            "stream",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_k",
            "top_logprobs",
            "top_p",
            "truncation",
            "user",
        }
    )
    required: ClassVar[str | None] = "input"
    nested: ClassVar[Mapping[str, frozenset[str]]] = {
        "input[]": frozenset(NULLS)
        | frozenset(
            {
                "arguments",
                "call_id",
                "content",
                "encrypted_content",
                "id",
                "name",
                "output",
                "role",
                "status",
                "summary",
                "type",
            }
        ),
        "input[].content[]": frozenset({"annotations", "logprobs", "text", "type"}),
        "input[].summary[]": frozenset({"text", "type"}),
        "reasoning": frozenset({"effort", "summary"}),
        "text": frozenset({"format", "verbosity"}),
        "text.format": frozenset({"description", "name", "schema", "strict", "type"}),
        "tool_choice": frozenset({"name", "type"}),
        "tools[]": frozenset({"description", "name", "parameters", "strict", "type"}),
    }

    experts: Experts = None
    purpose: Purpose = None
    receipt: Receipt = None

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        """What is particular to this body. Raises ApiError."""
        if body.get("background"):
            raise bad_request("background can't be set: no response is stored here", "background")
        if body.get("previous_response_id") is not None:
            message = "no response is stored here; send the whole conversation as input"
            raise ApiError(404, "not_found", message, "previous_response_id")
        check_tools(body)
        for index, tool in enumerate(body.get("tools") or []):
            if isinstance(tool, dict) and tool.get("type") != "function":
                place = f"tools[{index}].type"
                raise bad_request(f"{place}: only tools of type 'function' can be used", place)
        choice = body.get("tool_choice")
        if isinstance(choice, dict) and not isinstance(choice.get("name", ""), str):
            raise bad_request("tool_choice.name must be text", "tool_choice.name")
        _check_metadata(body.get("metadata"))
        include = body.get("include")
        if isinstance(include, list) and len(include) > _MAX_INCLUDED:
            message = f"include has {len(include)} entries; at most {_MAX_INCLUDED}"
            raise bad_request(message, "include")
        if isinstance(body["input"], list):
            check_items(body["input"])

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        if isinstance(obj["input"], list):
            obj = {**obj, "input": readable(obj["input"])}
        return super().model_validate(obj, **options)


def _check_metadata(found: Any) -> None:
    """As much as OpenAI takes: it goes back with the response. Raises ApiError 400."""
    if found is None:
        return
    fits = isinstance(found, dict) and len(found) <= MAX_METADATA
    if not fits or not all(isinstance(value, str) for value in found.values()):
        message = f"metadata must be an object of at most {MAX_METADATA} texts"
        raise bad_request(message, "metadata")


async def create(handler: Any, body: ResponsesRequest) -> Any:
    """What vLLM's handler gives back, a stream of objects as a stream of texts."""
    body.store = False  # what its default is, and what no client may change
    if body.service_tier == "flex":  # vLLM's answer would claim that it was
        body.service_tier = "default"
    result = await handler.create_responses(body)
    return _texts(result) if isinstance(result, AsyncGenerator) else result


async def _texts(found: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[str, None]:
    """Server-sent events. What fails before the first token raises; later, it is an event.

    The events that say no more than that there is a response wait for one that says more, so that
    an error that shows at once still has its status.
    """
    held = ""
    sent = 0
    async with aclosing(found):
        try:
            async for event in found:
                kind = str(getattr(event, "type", ""))
                sent += 1
                if kind in _PREAMBLE:
                    held += _text(kind, event)
                    continue
                if held:
                    before, held = held, ""
                    yield before
                yield _text(kind, event)
        except Exception as error:
            if held:
                raise _cause(error) from None
            shown = answers.from_exception(_cause(error))
            if shown is None:
                log.exception("a stream of a response failed")
                shown = answers.internal_error()
            yield _error_event(shown, sent)


def _text(kind: str, event: BaseModel) -> str:
    hidden = {"response": set(answers.HIDDEN)} if kind in (*_PREAMBLE, _COMPLETED) else None
    return f"event: {kind}\ndata: {event.model_dump_json(by_alias=True, exclude=hidden)}\n\n"


def _cause(error: Exception) -> Exception:
    """VLLM turns an error of the engine into an event, which its own model of events refuses."""
    if isinstance(error, ValidationError):
        refused = error.errors(include_url=False)[0]["input"]
        with suppress(ValidationError):
            return answers.from_response(ErrorResponse.model_validate(refused))
    return error


def _error_event(error: ApiError, number: int) -> str:
    found = {
        "type": "error",
        "sequence_number": number,
        "code": error.code,
        "message": error.message,
        "param": error.param,
    }
    return f"event: error\ndata: {json.dumps(found, ensure_ascii=False)}\n\n"


def ending(error: ApiError, sent: int) -> bytes:
    """How a stream ends that fails after so many events."""
    return _error_event(error, sent).encode()


async def events(
    first: str, rest: AsyncGenerator[str, None], experts: Callable[[], Mapping[str, Any]]
) -> AsyncGenerator[str, None]:
    """The events of a stream, `first` and `rest`, with `experts` in the last one's response."""
    async with aclosing(rest):
        yield _with_experts(first, experts)
        async for text in rest:
            yield _with_experts(text, experts)


def _with_experts(text: str, experts: Callable[[], Mapping[str, Any]]) -> str:
    return _with(text, {"experts": dict(experts())}) if text.startswith(_LAST) else text


def with_receipt(last: str, receipt: str | None) -> str:
    """The last event of a stream, with a receipt in the response that it carries."""
    return _with(last, {"receipt": receipt})


def _with(last: str, more: Mapping[str, Any]) -> str:
    """With `more` in the response of a last event, which is not read: it may be long."""
    return last.replace(_RESPONSE, f"{_RESPONSE}{answers.to_json(more)[1:-1]},", 1)
