"""How many log probabilities the engine calls of one request may ask for, all together."""

from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from expertgate.server.grants import Grant

MAX_LOGPROBS = 1 << 15
"""Of one request: vLLM makes text of each on everybody's event loop, a quarter of a second of it
where these come in one step."""
MAX_HELD_LOGPROBS = 1 << 20
"""Of several choices of one request together, where each token has no more than `_FREE`: vLLM holds
them all until the end, and then takes over a gigabyte."""
_FREE = 20
"""Of a token of the answer, what vLLM lets everybody ask for; an operator may allow more."""


def count_logprobs(
    grant: Grant, params: SamplingParams, prompt_tokens: int, model: ModelConfig
) -> None:
    """Counts what a call's answer will hold: those asked for and the tokens' own, in each choice.

    Raises VLLMValidationError where the grant's calls together ask for too many; one choice alone
    may have what vLLM lets everybody ask for along all that it can write.
    """
    answer, along = (
        model.get_vocab_size() if asked == -1 else asked
        for asked in (params.logprobs, params.prompt_logprobs)
    )
    tokens = params.max_tokens or model.max_model_len
    told = []
    if along is not None:
        told.append(((along + 1) * prompt_tokens, "prompt_logprobs", "along the prompts"))
    if answer is not None and answer > _FREE:
        place = f"in the {tokens} tokens that a choice may have"
        told.append(((answer + 1) * tokens, "logprobs", place))
    elif answer is not None:
        _count_held(grant, (answer + 1) * tokens, params.n, tokens)
    grant.logprobs += sum(count for count, _, _ in told) * params.n
    if told and grant.logprobs > MAX_LOGPROBS:
        raise VLLMValidationError(
            f"{grant.logprobs} log probabilities are asked for "
            f"{' and '.join(place for _, _, place in told)}, in all choices together; "
            f"at most {MAX_LOGPROBS}",
            parameter=max(told)[1],
        )


def _count_held(grant: Grant, count: int, choices: int, tokens: int) -> None:
    grant.held_logprobs += count * choices
    if grant.held_logprobs > max(MAX_HELD_LOGPROBS, count):
        raise VLLMValidationError(
            f"{grant.held_logprobs} log probabilities are asked for in the {tokens} tokens that "
            f"each choice may have, in all choices together; at most {MAX_HELD_LOGPROBS}, so limit "
            "the tokens or ask for fewer choices",
            parameter="logprobs",
        )
