"""FlexOlmo inside vLLM: plug-in, layers, per-request masks, catalogue."""
