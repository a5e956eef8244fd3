"""vLLM's own serving handlers, put together around the guarded engine and nothing else.

vLLM's `init_app_state` would bring more: batch, adapter, tool-server and plug-in routes.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.utils.fingerprint import set_default_fingerprint_mode
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.renderers.online_renderer import OnlineRenderer

from expertgate.server.guard import GuardedLLM


class _ClientErrors(logging.Filter):
    """Drops what vLLM logs, with a traceback, of a stream's bad request; the client is told."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, VLLMClientError | GracefulHTTPError)


for _module in ("chat_completion", "completion"):
    logging.getLogger(f"vllm.entrypoints.openai.{_module}.serving").addFilter(_ClientErrors())


@dataclass(frozen=True, slots=True)
class Handlers:
    chat: Any
    completion: Any
    model_name: str
    max_model_len: int
    created: int

    @classmethod
    def around(cls, engine: GuardedLLM) -> "Handlers":
        # A fingerprint would tell every client how the server is put together.
        set_default_fingerprint_mode("none")
        config = engine.model_config
        served = config.served_model_name
        name = served if isinstance(served, str) else served[0]
        # The path is the server's own affair.
        models = OpenAIServingModels(engine, [BaseModelPath(name=name, model_path=name)])
        renderer = OnlineRenderer(
            model_config=config,
            renderer=engine.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        renderer.warmup()
        return cls(
            chat=OpenAIServingChat(
                engine,
                models,
                "assistant",
                online_renderer=renderer,
                request_logger=None,
                chat_template=None,
                chat_template_content_format="auto",
                enable_prompt_tokens_details=True,
            ),
            completion=OpenAIServingCompletion(
                engine,
                models,
                online_renderer=renderer,
                request_logger=None,
                enable_prompt_tokens_details=True,
            ),
            model_name=name,
            max_model_len=config.max_model_len,
            created=int(time.time()),
        )
