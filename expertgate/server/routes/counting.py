"""What a text is in tokens, and back. Nothing runs; the tokenizer is every expert's alike.

One text at a time, by turns of principals: all routes share the one thread that tokenizes.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from expertgate.server import answers, schemas
from expertgate.server.counting import DetokenizeRequest, TokenizeChat, TokenizeText
from expertgate.server.errors import ApiError, bad_request
from expertgate.server.reading import read_body
from expertgate.server.selection import from_model
from expertgate.server.service import Service

_CHARS_PER_TOKEN = 16
"""More than a text of a model's whole length has."""
_LEAST_BYTES = 1 << 14


async def tokenize(request: Request) -> JSONResponse:
    return await _answer(request, "create_tokenize", _tokenizing)


async def detokenize(request: Request) -> JSONResponse:
    return await _answer(request, "create_detokenize", _detokenizing)


def _tokenizing(raw: bytes, max_model_len: int, _: int) -> TokenizeChat | TokenizeText:
    most = max(_LEAST_BYTES, _CHARS_PER_TOKEN * max_model_len)
    if len(raw) > most:
        message = f"the body may have at most {most} bytes here, for {max_model_len} tokens"
        raise ApiError(413, "body_too_large", message)
    body = schemas.parse(raw)
    if "messages" in body:
        return schemas.check(TokenizeChat, body)
    return schemas.check(TokenizeText, body)


def _detokenizing(raw: bytes, max_model_len: int, vocabulary: int) -> DetokenizeRequest:
    body = schemas.read(DetokenizeRequest, raw)
    if len(body.tokens) > max_model_len:
        raise bad_request(f"tokens has {len(body.tokens)} entries; at most {max_model_len}")
    if not all(0 <= token < vocabulary for token in body.tokens):
        raise bad_request(f"tokens must lie between 0 and {vocabulary - 1}", "tokens")
    return body


async def _answer(
    request: Request, method: str, read: Callable[[bytes, int, int], Any]
) -> JSONResponse:
    service: Service = request.app.state.service
    request.state.principal = principal = await service.identity.identify(request)
    engine, handlers = service.running()
    with service.admission.enter(principal):
        raw = await read_body(request)
        body = read(raw, handlers.max_model_len, engine.model_config.get_vocab_size())
        from_model(body.model, handlers.model_name)  # an alias names experts, who aren't asked
        body.model = handlers.model_name
        create: Callable[..., Awaitable[Any]] = getattr(handlers.tokens, method)
        try:
            async with service.renders.turn(principal.id, 1, len(raw)):
                found = await create(body, None)
        except Exception as error:
            shown = answers.from_exception(error)
            if shown is None:
                raise
            raise shown from None
        if isinstance(found, ErrorResponse):
            raise answers.from_response(found)
        return JSONResponse(found.model_dump(mode="json"))
