"""What one request asks of the sampler changes nothing of what another is told.

Log probabilities are those after sampling's own changes, which show the most.
"""

import random

import pytest
from vllm import SamplingParams
from vllm.platforms import current_platform

from expertgate.model.masks import EXTRA_ARG
from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import engine

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's sampler for CPUs")

PROMPT = random.Random(0).choices(range(256), k=40)
MINE = {
    "greedy": {"temperature": 0, "logprobs": 3},
    "cold": {"temperature": 0.01, "seed": 1, "logprobs": 20},
    "few": {"temperature": 0.02, "seed": 1, "top_k": 9, "logprobs": 12},
    "hot": {"temperature": 1.5, "seed": 2, "logprobs": 12, "prompt_logprobs": 2},
}
OTHERS = {
    "logprobs": {"logprobs": 20},
    "prompt_logprobs": {"prompt_logprobs": 20},
    "greedy": {"temperature": 0},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 2},
    "top_p and top_k": {"top_p": 0.5, "top_k": 2},
    "min_p": {"min_p": 0.5},
    "penalties": {
        "repetition_penalty": 1.5,
        "frequency_penalty": 1.0,
        "presence_penalty": 1.0,
    },
    "logit_bias": {"logit_bias": {3: 50.0}},
    "allowed_token_ids": {"allowed_token_ids": [1, 2]},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": [3, 4]},
    "seed": {"seed": 5},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = random_checkpoint(tmp_path_factory.mktemp("random"))
    with engine(folder, dtype="bfloat16", logprobs_mode="processed_logprobs") as running:
        yield running


def told(served, *asked):
    """What the first of them is told, where all are asked at once."""
    served.forget()
    params = [
        SamplingParams(
            **{"temperature": 1.0, "max_tokens": 8, "ignore_eos": True, **each},
            extra_args={EXTRA_ARG: ExpertSet.first(7).mask},
        )
        for each in asked
    ]
    prompts = [
        {"prompt_token_ids": PROMPT[place:], "cache_salt": str(place)}
        for place in range(len(params))
    ]
    output = served.llm.generate(prompts, params, use_tqdm=False)[0]
    return output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("mine", MINE)
def test_an_answer_is_the_same_whatever_others_ask_of_the_sampler(served, mine, others):
    alone = told(served, MINE[mine])
    assert told(served, MINE[mine], OTHERS[others], OTHERS[others]) == alone
