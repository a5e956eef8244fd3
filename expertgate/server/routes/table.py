"""Every route of the public listener, with what there is to say of it. What isn't here is a 404."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from expertgate.server.counting import DetokenizeRequest, TokenizeChat, TokenizeText
from expertgate.server.responses import ResponsesRequest
from expertgate.server.routes import about, counting, explain, generate
from expertgate.server.schemas import Body, ChatRequest, ExplainRequest, TextRequest

_ASKED = ("invalid_request", "invalid_credential", "issuer_unavailable")
"""Of whoever has to say who they are."""
_READ = ("request_timeout", "body_too_large", "unsupported_media_type")
"""Of whatever has a body."""
_GENERATED = (
    *_ASKED,
    *_READ,
    "invalid_experts",
    "expert_not_permitted",
    "expert_withdrawn",
    "model_not_found",
    "overloaded",
    "internal_error",
    "engine_unavailable",
    "audit_unavailable",
)
_COUNTED = (
    *_ASKED,
    *_READ,
    "invalid_experts",
    "model_not_found",
    "overloaded",
    "internal_error",
    "engine_unavailable",
)
_IDENTITY = ("X-Forwarded-User", "X-Forwarded-Groups")
_SELECTION = ("X-Experts", "X-Purpose")


@dataclass(frozen=True, slots=True)
class Route:
    """`answer`, `event` name schemas; `codes` are the errors that it can really end with.

    `more` are further statuses that are no errors in our shape, with the schema of each.
    """

    method: str
    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    summary: str
    says: str
    answer: str
    codes: tuple[str, ...]
    bodies: tuple[type[Body], ...] = ()
    example: dict[str, Any] | None = None
    headers: tuple[str, ...] = ()
    event: str | None = None
    more: tuple[tuple[int, str], ...] = ()

    @property
    def pattern(self) -> str:
        """The path as Starlette takes it: a model's name may have slashes."""
        return self.path.replace("{model}", "{model:path}")

    @property
    def keyed(self) -> bool:
        """Whether it asks who it is."""
        return "invalid_credential" in self.codes


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        endpoint=generate.chat,
        summary="Chat",
        says="OpenAI's chat completions, by the experts that the request may use and names. With "
        "`stream`, server-sent events, the last of which is `[DONE]`; an error after the first is "
        "an event as well.",
        answer="ChatAnswer",
        codes=_GENERATED,
        bodies=(ChatRequest,),
        example={
            "messages": [{"role": "user", "content": "What is 2 + 2?"}],
            "experts": ["public", "math"],
            "max_completion_tokens": 16,
        },
        headers=(*_SELECTION, "X-Receipt", *_IDENTITY),
        event="ChatEvent",
    ),
    Route(
        method="POST",
        path="/v1/completions",
        endpoint=generate.completions,
        summary="Plain completions",
        says="OpenAI's completions of a prompt or several. With `stream`, server-sent events, the "
        "last of which is `[DONE]`; an error after the first is an event as well.",
        answer="TextAnswer",
        codes=_GENERATED,
        bodies=(TextRequest,),
        example={"prompt": "2 + 2 =", "experts": {"exclude": ["news"]}, "max_tokens": 4},
        headers=(*_SELECTION, "X-Receipt", *_IDENTITY),
        event="TextEvent",
    ),
    Route(
        method="POST",
        path="/v1/responses",
        endpoint=generate.respond,
        summary="Responses",
        says="OpenAI's responses. Nothing is stored: a conversation is sent whole each time. With "
        "`stream`, named server-sent events; the last is `response.completed`, or `error`.",
        answer="Response",
        codes=(*_GENERATED, "not_found"),
        bodies=(ResponsesRequest,),
        example={"input": "What is 2 + 2?", "experts": ["public", "math"], "max_output_tokens": 16},
        headers=(*_SELECTION, "X-Receipt", *_IDENTITY),
        event="ResponseEvent",
    ),
    Route(
        method="GET",
        path="/v1/models",
        endpoint=about.models,
        summary="The model",
        says="The one model that there is.",
        answer="ModelList",
        codes=(*_ASKED, "engine_unavailable"),
        headers=_IDENTITY,
    ),
    Route(
        method="GET",
        path="/v1/models/{model}",
        endpoint=about.model,
        summary="The model, by name",
        says="Its name may be an alias, `NAME:public+math` or `NAME:-news`, of experts that are "
        "granted to the caller for this purpose.",
        answer="Model",
        codes=(
            *_ASKED,
            "invalid_experts",
            "expert_not_permitted",
            "model_not_found",
            "engine_unavailable",
        ),
        headers=("X-Purpose", *_IDENTITY),
    ),
    Route(
        method="GET",
        path="/v1/experts",
        endpoint=about.experts,
        summary="The experts that are granted",
        says="The catalogue, as far as the caller is granted it for this purpose.",
        answer="ExpertList",
        codes=_ASKED,
        headers=("X-Purpose", *_IDENTITY),
    ),
    Route(
        method="POST",
        path="/v1/experts/explain",
        endpoint=explain.explain,
        summary="What would be granted, and why",
        says="The decision on a selection of experts, with the policies that grant them; nothing "
        "runs. Of what is not granted it says no more than a refusal would.",
        answer="Decision",
        codes=(*_ASKED, *_READ, "invalid_experts", "overloaded"),
        bodies=(ExplainRequest,),
        example={"experts": ["public", "news"], "purpose": "care"},
        headers=(*_SELECTION, *_IDENTITY),
    ),
    Route(
        method="GET",
        path="/v1/receipts/{request_id}",
        endpoint=about.receipt,
        summary="A receipt",
        says=(
            "That of a request of the caller's own which has ended within the hour. The ID is the"
            " answer's own `id`, with or without what stands before its first `-` or `_`; it isn't"
            " `X-Request-Id`, which a client may choose."
        ),
        answer="Receipt",
        codes=(*_ASKED, "not_found", "audit_unavailable"),
        headers=_IDENTITY,
    ),
    Route(
        method="POST",
        path="/tokenize",
        endpoint=counting.tokenize,
        summary="Text to tokens",
        says="What a prompt, or messages in the model's template, are in tokens.",
        answer="Tokens",
        codes=_COUNTED,
        bodies=(TokenizeText, TokenizeChat),
        example={"prompt": "2 + 2 ="},
        headers=_IDENTITY,
    ),
    Route(
        method="POST",
        path="/detokenize",
        endpoint=counting.detokenize,
        summary="Tokens to text",
        says="What token ids are as text.",
        answer="Detokenized",
        codes=_COUNTED,
        bodies=(DetokenizeRequest,),
        example={"tokens": [50, 32, 43]},
        headers=_IDENTITY,
    ),
    Route(
        method="GET",
        path="/.well-known/expertgate-keys",
        endpoint=about.keys,
        summary="Public keys",
        says="Those by which receipts and the audit log can be checked.",
        answer="Keys",
        codes=("invalid_request",),
    ),
    Route(
        method="GET",
        path="/health",
        endpoint=about.health,
        summary="Whether the process is of use",
        says="503 once its engine has died, and it must be replaced.",
        answer="Health",
        codes=("invalid_request",),
        more=((503, "Health"),),
    ),
    Route(
        method="GET",
        path="/ready",
        endpoint=about.ready,
        summary="Whether requests can be taken",
        says="503, and why, until the engine has proved itself, and where it does not answer, "
        "requests can't be recorded or changes of permissions would not be seen.",
        answer="Ready",
        codes=("invalid_request",),
        more=((503, "Ready"),),
    ),
    Route(
        method="GET",
        path="/version",
        endpoint=about.version,
        summary="The version",
        says="Of the server.",
        answer="Version",
        codes=("invalid_request",),
    ),
)
