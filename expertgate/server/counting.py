"""Bodies of the routes that count: text to tokens, and back."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import ConfigDict
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest as _DetokenizeRequest,
)
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest as _TokenizeChatRequest,
)
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeCompletionRequest as _TokenizeCompletionRequest,
)

from expertgate.server.errors import bad_request
from expertgate.server.schemas import MESSAGES, TOOLS, check_messages, with_read


class TokenizeText(_TokenizeCompletionRequest):
    """Body of POST /tokenize for a prompt."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = frozenset(
        {"add_special_tokens", "model", "prompt", "return_token_strs"}
    )
    required: ClassVar[str | None] = "prompt"
    nested: ClassVar[Mapping[str, frozenset[str]]] = {}

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        if not isinstance(body["prompt"], str):
            raise bad_request("prompt must be text", "prompt")


class TokenizeChat(_TokenizeChatRequest):
    """Body of POST /tokenize for messages."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = frozenset(
        {
            "add_generation_prompt",
            "add_special_tokens",
            "continue_final_message",
            "messages",
            "model",
            "return_token_strs",
            "tools",
        }
    )
    required: ClassVar[str | None] = "messages"
    nested: ClassVar[Mapping[str, frozenset[str]]] = {**MESSAGES, **TOOLS}

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        check_messages(body)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        return super().model_validate(with_read(obj), **options)


class DetokenizeRequest(_DetokenizeRequest):
    """Body of POST /detokenize."""

    model_config = ConfigDict(extra="forbid")

    fields: ClassVar[frozenset[str]] = frozenset({"model", "tokens"})
    required: ClassVar[str | None] = "tokens"
    nested: ClassVar[Mapping[str, frozenset[str]]] = {}

    @classmethod
    def check(cls, body: Mapping[str, Any]) -> None:
        tokens = body["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise bad_request("tokens must be a list of integers", "tokens")
