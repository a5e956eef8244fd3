"""A request's answer is its own: whoever shares the batch, the cache or the memory with it.

Three engines for the module, in bfloat16 as it is served: eager, compiled, and eager with the cache
in FP8. Their KV cache holds 24 blocks of 128 tokens and a step at most 256 tokens, so that long
prompts are chunked and many long answers preempted.
"""

import pytest

from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine, text

ALL = ExpertSet.first(7)
SETS = [PUBLIC_ONLY, ALL, ExpertSet.of([0, 3]), ExpertSet.of([6]), ExpertSet.of([1, 2, 4])]
BLOCKS, BLOCK_TOKENS = 24, 128


@pytest.fixture(scope="module", params=["eager", "compiled", "fp8 cache"])
def served(request, tmp_path_factory):
    folder = random_checkpoint(tmp_path_factory.mktemp("random"))
    with engine(
        folder,
        dtype="bfloat16",
        enforce_eager=request.param != "compiled",
        kv_cache_dtype="fp8" if request.param == "fp8 cache" else "auto",
        max_num_batched_tokens=256,
        max_num_seqs=32,
        num_gpu_blocks_override=BLOCKS,
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _cold(served):
    served.forget()


def alone(served, ask):
    served.forget()
    return served.ask_one(ask)


def same(one, other):
    """Tokens and every bit of their log-probabilities."""
    return one.tokens == other.tokens and one.logprobs == other.logprobs


def test_a_mixed_batch_equals_each_request_alone(served):
    asks = [
        Ask(text(5 + 11 * i, seed=i % 3), experts, 10, salt=str(i))
        for i, experts in enumerate(SETS * 4)
    ]
    mixed = [answer for [answer] in served.ask(asks)]
    for ask, together in zip(asks, mixed, strict=True):
        assert same(together, alone(served, ask)), ask.experts.text


def test_different_sets_answer_differently(served):
    answers = [served.ask_one(Ask(text(40), experts, 10)).tokens for experts in SETS]
    assert len(set(answers)) == len(SETS)


def test_chunked_prefill_equals_the_short_prompts_way(served):
    """1,200 tokens take five steps; what others prefill in between must not show."""
    long = [Ask(text(1200, seed=9), experts, 8, salt=experts.text) for experts in SETS[:2]]
    together = [answer for [answer] in served.ask([*long, Ask(text(30), SETS[2])])]
    for ask, answer in zip(long, together, strict=False):
        assert same(answer, alone(served, ask))


def test_preempted_requests_keep_their_experts(served):
    """20 requests of up to 300 tokens want 60 blocks and more, and there are 24."""
    asks = [Ask(text(200, seed=i), SETS[i % len(SETS)], 100, salt=str(i)) for i in range(20)]
    before = served.counter("vllm:num_preemptions")
    crowded = [answer for [answer] in served.ask(asks)]
    assert served.counter("vllm:num_preemptions") > before, "nothing was preempted"
    for ask, answer in zip(asks[:10], crowded, strict=False):
        assert answer.tokens == alone(served, ask).tokens, ask.experts.text


def test_the_same_set_shares_a_prefix_and_another_does_not(served):
    prompt = text(600)
    for first, second in [(ALL, PUBLIC_ONLY), (PUBLIC_ONLY, ALL)]:
        fresh = alone(served, Ask(prompt, second))
        served.forget()
        warm = served.ask_one(Ask(prompt, first))
        assert warm.cached == 0
        other = served.ask_one(Ask(prompt, second))
        assert other.cached == 0
        assert same(other, fresh)
        again = served.ask_one(Ask(prompt, first))
        assert again.cached == 4 * BLOCK_TOKENS
        assert again.tokens == warm.tokens


def test_several_answers_to_one_prompt(served):
    """n > 1 makes vLLM clone the parameters; every clone must carry the mask."""
    for experts in SETS:
        served.forget()
        asks = [Ask(text(30), experts, 8, n=3, temperature=1.0), Ask(text(30), ALL, 8)]
        together, _ = served.ask(asks)
        served.forget()
        [separate] = served.ask([asks[0]])
        assert [a.tokens for a in together] == [a.tokens for a in separate]
        assert len({a.tokens for a in together}) > 1


def test_a_seed_draws_the_same_in_however_many_parts_its_prompt_is_read(served):
    """VLLM samples after each part, throws it away and winds the generator back, if it can."""
    ask = Ask(text(350, seed=3), ALL, 8, temperature=1.0, salt="seeded")
    others = [Ask(text(200, seed=i), SETS[i], 3, salt=str(i)) for i in range(4)]
    *_, [beside] = served.ask([*others, ask])
    assert beside.tokens == alone(served, ask).tokens
