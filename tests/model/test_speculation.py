"""N-gram speculation, the only one that is not refused: drafts are masked and counted as tokens."""

import pytest
from vllm import SamplingParams

from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine
from tests.support.oracle import RowDeletion

SETS = [ExpertSet(mask) for mask in (1, 0b11, 127, 0b1010101)]
DRAFTED = 3
TOP_K, LAYERS = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("biased"), biases=True)


@pytest.fixture(scope="module")
def served(folder):
    lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    speculation = {"method": "ngram", "num_speculative_tokens": DRAFTED, **lookup}
    with engine(folder, speculative_config=speculation) as running:
        yield running


def test_answers_are_the_row_deleted_models_and_each_position_counts_once(folder, served):
    prompt = list(b"one two three one two three one two three one two")
    asks = [Ask(prompt, experts, tokens=24, account=experts.text) for experts in SETS]
    answers = served.ask(asks)
    works = served.works(*(experts.text for experts in SETS))
    assert served.counter("vllm:spec_decode_num_draft_tokens") > 0
    oracle = RowDeletion(folder)
    for experts, [answer], work in zip(SETS, answers, works, strict=True):
        forced = oracle.force(experts, prompt, answer.tokens)
        assert list(answer.tokens) == forced.best, experts.text
        assert answer.logprobs == pytest.approx(forced.logprobs, abs=2**-13), experts.text
        # Those of a plain run, and what was drafted beyond the last of them.
        plain = len(prompt) + len(answer.tokens) - 1
        assert plain <= work.computed <= plain + DRAFTED, experts.text
        assert sum(work.slots) == work.computed * min(TOP_K, len(experts)) * LAYERS
        assert ExpertSet.of(e for e, slots in enumerate(work.slots) if slots) <= experts
        assert sum(map(work.share, experts)) == pytest.approx(1, abs=1e-12)


def test_top_k_without_a_draft_does_not_end_the_engine(served):
    """Threat d1: vLLM's sampler for CPUs dies of it."""
    params = SamplingParams(temperature=1.0, top_k=2, max_tokens=4, ignore_eos=True)
    [output] = served.llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 1, "top_p": 0.5}, {"top_p": 1e-6}])
def test_drafts_are_judged_by_what_their_request_asks(served, options):
    """VLLM's function for CPUs left temperature, `top_k` and `top_p` of drafts uninitialised."""
    prompt = list(b"one two three one two three one two three one two")
    asked = [{"temperature": 0.0}, {"temperature": 1.0, **options}]
    params = [SamplingParams(**each, max_tokens=24, ignore_eos=True) for each in asked]
    prompts = [{"prompt_token_ids": prompt, "cache_salt": str(place)} for place in range(2)]
    greedy, certain = served.llm.generate(prompts, params, use_tqdm=False)
    assert certain.outputs[0].token_ids == greedy.outputs[0].token_ids
