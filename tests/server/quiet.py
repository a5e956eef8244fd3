"""Imports vLLM as the server does, and keeps its dependencies' warnings from failing tests."""

import warnings

from expertgate.server.environment import settle

settle()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm
    import vllm.entrypoints.openai.chat_completion.serving
    import vllm.entrypoints.openai.completion.serving
    import vllm.v1.engine.async_llm  # noqa: F401
