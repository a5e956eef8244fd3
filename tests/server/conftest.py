from tests.server import quiet  # noqa: F401  (first, before any other import of vLLM)
