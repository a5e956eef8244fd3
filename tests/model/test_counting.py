"""Usage is counted right whatever happens to a request: against the model without the others.

One engine for the module, in float32, where slots can be compared exactly. Its KV cache holds 24
blocks of 128 tokens and a step at most 256 tokens, as in test_mixing.py.
"""

import pytest
from vllm import SamplingParams

from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
from expertgate.model.usage import Work
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine, text
from tests.support.oracle import RowDeletion
from tests.support.usage import assert_counted

ALL = ExpertSet.first(7)
SETS = [PUBLIC_ONLY, ALL, ExpertSet.of([0, 3]), ExpertSet.of([6]), ExpertSet.of([0, 1, 2, 3, 4, 6])]
LAYERS, TOP_K, BLOCK_TOKENS = 3, 5, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"), layers=LAYERS, top_k=TOP_K)


@pytest.fixture(scope="module")
def oracle(folder):
    return RowDeletion(folder)


@pytest.fixture(scope="module")
def served(folder):
    with engine(
        folder, max_num_batched_tokens=256, max_num_seqs=32, num_gpu_blocks_override=24
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _cold(served):
    served.forget()


def computed(ask, answer):
    """All but the last token, which is sampled and not computed."""
    return [*ask.prompt, *answer.tokens[:-1]]


def test_sets_of_one_batch_are_counted_apart(served, oracle):
    asks = [
        Ask(text(20 + 7 * i, i), experts, 6, account=experts.text) for i, experts in enumerate(SETS)
    ]
    answers = served.ask([*asks, Ask(text(40), ALL, 9)])  # the last has no account
    works = served.works(*(ask.account for ask in asks))
    for ask, [answer], work in zip(asks, answers, works, strict=False):
        assert_counted(work, oracle, ask.experts, computed(ask, answer))


def test_a_mixed_batch_is_counted_as_each_request_alone(served):
    asks = [Ask(text(5 + 11 * i, i), e, 5, str(i), account=str(i)) for i, e in enumerate(SETS * 2)]
    served.ask(asks)
    together = served.works(*(ask.account for ask in asks))
    for ask, work in zip(asks, together, strict=True):
        served.forget()
        served.ask([ask])
        assert served.works(ask.account) == [work], "every bit of it"


def test_choices_and_prompts_of_one_account_add_up(served, oracle):
    asks = [Ask(text(30, seed), ALL, 6, n=3, temperature=1.0, account="a") for seed in (1, 2)]
    answers = served.ask(asks)
    (work,) = served.works("a")
    slots = [0] * 7
    for ask, choices in zip(asks, answers, strict=True):
        assert len({choice.tokens for choice in choices}) > 1
        for choice in choices:
            counted, _ = oracle.route(ALL, computed(ask, choice))
            slots = [a + b for a, b in zip(slots, counted, strict=True)]
    assert (work.computed, work.cached) == (6 * (30 + 6 - 1), 0)
    assert work.slots == tuple(slots)


def test_cached_prompts_are_told_and_not_counted(served, oracle):
    """600 tokens take three steps, and then, but for 88 of them, none."""
    for cached in (0, 4 * BLOCK_TOKENS):
        ask = Ask(text(600), ALL, 4, account="a")
        answer = served.ask_one(ask)
        assert answer.cached == cached
        (work,) = served.works("a")
        assert_counted(work, oracle, ALL, computed(ask, answer), cached)


def test_a_request_that_stops_is_counted_to_where_it_stopped(served, oracle):
    whole = served.ask_one(Ask(text(25), ALL, 12))
    stop = whole.tokens[5]
    ask = Ask(text(25), ALL, 12, account="a", stop=stop)
    answer = served.ask_one(ask)
    assert answer.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert_counted(served.works("a")[0], oracle, ALL, computed(ask, answer))


def test_what_a_preemption_repeats_is_counted_once(served, oracle):
    """20 requests of up to 300 tokens want 60 blocks and more, and there are 24."""
    asks = [Ask(text(200, i), SETS[i % len(SETS)], 100, str(i), account=str(i)) for i in range(20)]
    before = served.counter("vllm:num_preemptions")
    answers = served.ask(asks)
    assert served.counter("vllm:num_preemptions") > before, "nothing was preempted"
    works = served.works(*(ask.account for ask in asks))
    for ask, [answer], work in zip(asks, answers, works, strict=True):
        assert_counted(work, oracle, ask.experts, computed(ask, answer))


def test_an_aborted_request_is_counted_as_far_as_it_came(served, oracle):
    core = served.llm.llm_engine
    extra_args = {EXTRA_ARG: ALL.mask, ACCOUNT_ARG: "a"}
    params = SamplingParams(max_tokens=1000, ignore_eos=True, temperature=0, extra_args=extra_args)
    core.add_request("gone", {"prompt_token_ids": text(300)}, params)
    tokens = []
    while len(tokens) < 4:
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
    core.abort_request(["gone"])
    while core.has_unfinished_requests():
        core.step()
    (work,) = served.works("a")
    # The engine is another process: it goes on until the abort has reached it.
    assert len(tokens) + 299 <= work.computed < 1299
    whole = served.ask_one(Ask(text(300), ALL, work.computed - 299)).tokens
    assert_counted(work, oracle, ALL, [*text(300), *whole][: work.computed])


def test_an_account_without_work_has_none(served):
    assert served.works("unknown") == [Work(LAYERS, 0, 0, (0,) * 7, (0,) * 7)]
