"""First tokens go to their requests before the step's other tokens do.

vLLM's scheduler keeps whoever has come last at the end of a batch, so that in a busy server a first
token waits until those of all other streams have been made into text and sent.
"""

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM


def first_tokens_first(engine: AsyncLLM) -> None:
    """From now on. Outputs of one request keep their order; others have none among each other."""
    core, states = engine.engine_core, engine.output_processor.request_states
    get = core.get_output_async

    def has_begun(output: EngineCoreOutput) -> bool:
        state = states.get(output.request_id)
        # What was aborted is not known any more; its output will be thrown away.
        return state is None or not state.is_prefilling

    async def get_output_async() -> EngineCoreOutputs:
        step = await get()
        step.outputs.sort(key=has_begun)
        return step

    core.get_output_async = get_output_async
