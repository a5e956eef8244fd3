"""vLLM's own serving handlers, put together around the guarded engine and nothing else.

vLLM's `init_app_state` would bring more: batch, adapter, tool-server and plug-in routes.
"""

import difflib
import logging
import time
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.serve.utils.fingerprint import set_default_fingerprint_mode
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tool_parsers import ToolParserManager

from expertgate.server.building import Chat, Completion, Lanes, Responses
from expertgate.server.grants import WithdrawnError
from expertgate.server.guard import GuardedLLM
from expertgate.server.refusals import SettingError
from expertgate.server.rendering import render_in_place


class _ClientErrors(logging.Filter):
    """Drops what vLLM logs, with a traceback, where a stream ends by no fault of the server's.

    A bad request, or an expert that was withdrawn; the client is told.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, VLLMClientError | GracefulHTTPError | WithdrawnError)


def check_tool_parser(name: str | None) -> None:
    """Raises SettingError for a name that vLLM doesn't know; needs neither weights nor engine."""
    known = ToolParserManager.list_registered()
    if name is None or name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else f", only {', '.join(known)}; null is for none"
    raise SettingError(f"tool_parser {name}: vLLM has no such parser{hint}")


for _module in ("chat_completion", "completion", "responses"):
    logging.getLogger(f"vllm.entrypoints.openai.{_module}.serving").addFilter(_ClientErrors())


@dataclass(frozen=True, slots=True)
class Handlers:
    chat: Any
    completion: Any
    responses: Any
    tokens: Any
    model_name: str
    max_model_len: int
    created: int

    @classmethod
    def around(cls, engine: GuardedLLM, tool_parser: str | None) -> "Handlers":
        """`tool_parser`: vLLM's name of the way in which the model writes its calls of tools.

        Raises SettingError for one that doesn't fit the tokenizer.
        """
        # A fingerprint would tell every client how the server is put together.
        set_default_fingerprint_mode("none")
        config = engine.model_config
        served = config.served_model_name
        name = served if isinstance(served, str) else served[0]
        # The path is the server's own affair.
        models = OpenAIServingModels(engine, [BaseModelPath(name=name, model_path=name)])
        rendering: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
        }
        tools = {"tool_parser": tool_parser, "enable_auto_tools": tool_parser is not None}
        try:
            renderer = OnlineRenderer(config, engine.renderer, **rendering, **tools)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SettingError(f"tool_parser {tool_parser}: {error}") from None
        render_in_place()
        renderer.warmup()
        lanes = Lanes(engine)
        return cls(
            chat=Chat(
                lanes,
                engine,
                models,
                "assistant",
                online_renderer=renderer,
                enable_prompt_tokens_details=True,
                **rendering,
                **tools,
            ),
            completion=Completion(
                lanes,
                engine,
                models,
                online_renderer=renderer,
                request_logger=None,
                enable_prompt_tokens_details=True,
            ),
            responses=Responses(
                lanes,
                engine,
                models,
                renderer,
                enable_prompt_tokens_details=True,
                **rendering,
                **tools,
            ),
            tokens=ServingTokenization(models, renderer, **rendering),
            model_name=name,
            max_model_len=config.max_model_len,
            created=int(time.time()),
        )
