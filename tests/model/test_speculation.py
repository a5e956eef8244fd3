"""N-gram speculation, the only one that is not refused: drafts are masked and counted as tokens."""

import pytest
from vllm import SamplingParams

from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
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


def beside(served, neighbour, mine, after=3):
    """What `mine`, (prompt, parameters), is told that comes so many steps after `neighbour`."""
    engine = served.llm.llm_engine
    for name, (prompt, params), steps in (("neighbour", neighbour, after), ("mine", mine, 100)):
        engine.add_request(name, {"prompt_token_ids": prompt, "cache_salt": name}, params)
        for _ in range(steps):
            for output in engine.step():
                if output.finished and output.request_id == "mine":
                    engine.abort_request(["neighbour"])
                    served.forget()
                    return output.outputs[0]
    raise AssertionError("no answer")


@pytest.mark.parametrize("prompt", [[7], [8], [9]])
def test_who_has_one_token_to_read_is_answered_the_same_beside_others(served, prompt):
    """VLLM drafts -1 for it, and on CPUs judged that by another request's last word."""
    last_word = SamplingParams(max_tokens=60, temperature=1.0, allowed_token_ids=[319])
    params = SamplingParams(max_tokens=4, temperature=1.0, top_k=1, ignore_eos=True)
    [alone] = served.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    got = beside(served, ([319] * 20, last_word), (prompt, params))
    assert got.token_ids == alone.outputs[0].token_ids


def test_usage_is_the_same_beside_who_reaches_the_models_length(served):
    """VLLM then drafts the word 0 for all, and a position counts with what was drafted there."""
    longest = served.llm.model_config.max_model_len
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            extra_args={EXTRA_ARG: 127, ACCOUNT_ARG: account},
        )
        for tokens, account in ((2, "alone"), (2, "beside"), (2, None))
    ]
    prompt = list(range(40))
    served.llm.generate({"prompt_token_ids": prompt}, params[0], use_tqdm=False)
    beside(served, ([5] * (longest - 2), params[2]), (prompt, params[1]), after=1)
    alone, with_others = served.works("alone", "beside")
    assert with_others == alone
