"""How far vLLM is with a call, which its outputs alone don't say."""

from vllm.v1.engine.async_llm import AsyncLLM


class Progress:
    """Of one engine call: `call_id` once it has one, `heard` once an output of it has come.

    An answer in one piece has no output before its end, and a stream shows no end while its client
    doesn't read; what vLLM's output processor keeps of each request shows both.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self.call_id = ""
        self.heard = False

    def begun(self) -> bool:
        if self.heard:
            return True
        processor = self._engine.output_processor
        ids = processor.external_req_ids.get(self.call_id, ())
        states = [processor.request_states.get(each) for each in ids]
        return any(state is not None and not state.is_prefilling for state in states)

    def over(self) -> bool:
        return self.heard and self.call_id not in self._engine.output_processor.external_req_ids
