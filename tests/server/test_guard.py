import asyncio
import sys
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
from expertgate.model.usage import Usage, Work
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.server import guard as guard_module
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import HANDLE_ARG, GrantError, Grants
from expertgate.server.guard import GuardedLLM, UnavailableError
from expertgate.server.turns import Turns
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine

MATH = ExpertSet.of([0, 1])
PROMPT = {"type": "token", "prompt_token_ids": [1, 2], "prompt": "ab"}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def grants():
    return Grants()


@pytest.fixture
def guard(engine, grants):
    return GuardedLLM(engine, grants, CacheSalts(b"weights", b"secret"))


def params(handle, **extra):
    return SamplingParams(extra_args={HANDLE_ARG: handle, **extra}, skip_clone=True)


def run(generator):
    async def collect():
        return [item async for item in generator]

    return asyncio.run(collect())


def test_the_engine_gets_the_mask_of_the_grant_and_nothing_of_the_callers(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        given = params(grant.handle, expertgate_mask=(1 << 64) - 1, experts=[0, 1, 2])
        run(guard.generate(PROMPT, given, "client id\nforged", priority=-9, session_id="s",
                           data_parallel_rank=3, trace_headers={"traceparent": "x"}))  # fmt: skip
    (call,) = engine.calls
    assert call.params.extra_args == {EXTRA_ARG: MATH.mask, ACCOUNT_ARG: call.request_id}
    assert "client" not in call.request_id
    assert not {"priority", "session_id", "data_parallel_rank", "trace_headers"} & set(call.rest)
    # What the caller holds is unchanged: the same parameters may serve several prompts.
    assert given.extra_args[HANDLE_ARG] == grant.handle


def test_prompts_keep_only_tokens_and_text(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        prompt = {**PROMPT, "multi_modal_data": object(), "arrival_time": 1.0}
        run(guard.generate(prompt, params(grant.handle), "id"))
    (call,) = engine.calls
    assert set(call.prompt) == {"type", "prompt_token_ids", "prompt", "cache_salt"}


@pytest.mark.parametrize("own", [None, "", "own"])
@pytest.mark.parametrize("tenant", ["alice", "bob"])
@pytest.mark.parametrize("experts", [MATH, PUBLIC_ONLY])
def test_a_prefix_is_shared_within_a_grants_set_and_tenant(
    guard, engine, grants, experts, tenant, own
):
    """And the caller's own salt, which parts it further, is never the engine's."""
    prompt = PROMPT if own is None else {**PROMPT, "cache_salt": own}
    with grants.issue(experts, tenant, recorded=RECORDED) as grant:
        run(guard.generate(prompt, params(grant.handle), "id"))
    salt = CacheSalts(b"weights", b"secret").salt(experts, tenant, own)
    assert engine.calls[-1].prompt["cache_salt"] == salt


@pytest.mark.parametrize(
    "prompt",
    [
        "raw text",
        ["a", "b"],
        [1, 2, 3],
        {"prompt": "raw"},
        {"prompt_token_ids": [1]},
        {"type": "embeds", "prompt_embeds": None},
        {"type": "multimodal", "prompt_token_ids": [1]},
        None,
        FakeEngine().generate(None, None, ""),  # a stream of prompts
    ],
)
def test_only_rendered_tokens_run(guard, engine, grants, prompt):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant, pytest.raises(GrantError):
        guard.generate(prompt, params(grant.handle), "id")
    assert engine.calls == []


@pytest.mark.parametrize("extra_args", [None, {}, {HANDLE_ARG: "00" * 16}, {EXTRA_ARG: 127}])
def test_without_a_grant_nothing_runs(guard, engine, extra_args):
    with pytest.raises(GrantError):
        guard.generate(PROMPT, SamplingParams(extra_args=extra_args), "id")
    assert engine.calls == []


def test_a_grant_that_is_not_on_record_runs_nothing(guard, engine, grants):
    with grants.issue(MATH, "alice") as grant, pytest.raises(GrantError, match="not on record"):
        guard.generate(PROMPT, params(grant.handle), "id")
    assert engine.calls == []


def test_a_call_made_before_the_grant_closed_does_not_run_after(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        late = guard.generate(PROMPT, params(grant.handle), "id")
    with pytest.raises(GrantError):
        run(late)
    assert engine.calls == []


def test_a_running_call_ends_when_its_grant_closes(guard, engine, grants):
    engine.outputs = 3

    async def close_midway():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        generator = guard.generate(PROMPT, params(grant.handle), "id")
        await anext(generator)
        await guard.end(grant)
        assert engine.aborted == [engine.calls[0].request_id]
        with pytest.raises(GrantError):
            await anext(generator)

    asyncio.run(close_midway())
    assert engine.ended == 1


def test_leaving_a_stream_ends_the_engines(guard, engine, grants):
    engine.outputs = 3

    async def leave():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        generator = guard.generate(PROMPT, params(grant.handle), "id")
        await anext(generator)
        await generator.aclose()
        assert not guard.busy
        assert engine.ended == 1  # at once, not when the garbage is collected

    asyncio.run(leave())


def test_a_call_that_fails_within_the_engine_gives_its_place_back(guard, engine, grants):
    engine.refuses = OverflowError("int too big to convert")
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        with pytest.raises(OverflowError):
            run(guard.generate(PROMPT, params(grant.handle), "id"))
        assert not guard.busy
    assert engine.aborted == [engine.calls[0].request_id]


def test_a_call_that_finishes_is_not_aborted(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        run(guard.generate(PROMPT, params(grant.handle), "id"))
    assert engine.aborted == []


def test_a_schema_that_fails_in_the_engine_is_the_clients_fault(guard, engine, grants):
    engine.finish_reason = "error"
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        free = params(grant.handle)
        (found,) = run(guard.generate(PROMPT, free, "id"))  # vLLM's handlers see to this one
        assert found.outputs[0].finish_reason == "error"
        bound = params(grant.handle)
        bound.structured_outputs = StructuredOutputsParams(json={"$ref": "#"})
        with pytest.raises(VLLMValidationError, match="schema"):
            run(guard.generate(PROMPT, bound, "id"))


def test_several_prompts_run_on_one_grant_with_ids_of_their_own(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        for _ in range(3):
            run(guard.generate(PROMPT, params(grant.handle), "same id"))
    assert len({call.request_id for call in engine.calls}) == 3


def test_a_lora_request_is_refused(guard, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant, pytest.raises(GrantError):
        guard.generate(PROMPT, params(grant.handle), "id", lora_request=object())


def test_only_sampling_runs(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        pooling = SimpleNamespace(extra_args={HANDLE_ARG: grant.handle})
        with pytest.raises(GrantError, match="only sampling"):
            guard.generate(PROMPT, pooling, "id")
    assert engine.calls == []


def test_outputs_carry_no_traces(guard, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        (found,) = run(guard.generate(PROMPT, params(grant.handle), "id"))
    assert found.outputs[0].routed_experts is None
    assert found.kv_transfer_params is None
    assert found.ec_transfer_params is None


def test_a_dead_engine_is_unavailable_before_and_while_it_runs(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        engine.dies = True
        with pytest.raises(UnavailableError) as died:
            run(guard.generate(PROMPT, params(grant.handle), "id"))
        assert died.value.status_code == 503
        engine.errored = True
        assert guard.dead
        with pytest.raises(UnavailableError):
            guard.generate(PROMPT, params(grant.handle), "id")


def test_a_draining_engine_admits_nothing_and_is_not_called_dead(guard, engine, grants):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        guard.drain()
        assert guard.errored
        assert not guard.dead
        with pytest.raises(UnavailableError, match="going down"):
            guard.generate(PROMPT, params(grant.handle), "id")


# --- usage ----------------------------------------------------------------------------------------


def test_usage_is_there_before_the_last_output_is(guard, engine, grants):
    engine.outputs = 3

    async def watch():
        with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
            generator = guard.generate(PROMPT, params(grant.handle), "id")
            return [grant.usage async for _ in generator]

    *before, last = asyncio.run(watch())
    assert before == [None, None]
    # Ranks of a pipeline add up; the fake's outputs are cumulative, of one token.
    work = Work(2, 3, 0, slots=(4, 0), weights=(4 << 32, 0))
    assert last == Usage(prompt_tokens=2, completion_tokens=1, work=work)


def test_usage_of_pieces_and_of_several_calls_adds_up(guard, engine, grants):
    engine.outputs = 3

    async def both():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        pieces = params(grant.handle)
        pieces.output_kind = RequestOutputKind.DELTA
        first, second = (guard.generate(PROMPT, pieces, "id") for _ in range(2))
        _ = [output async for output in first]
        assert grant.usage is None, "another call is still to come"
        _ = [output async for output in second]
        await guard.end(grant)
        return grant.usage

    usage = asyncio.run(both())
    assert (usage.prompt_tokens, usage.completion_tokens, usage.work.computed) == (4, 6, 6)


def test_usage_of_a_call_that_is_left_or_aborted_is_told_when_the_grant_ends(guard, engine, grants):
    engine.outputs = 3

    async def leave(close):
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        generator = guard.generate(PROMPT, params(grant.handle), "id")
        await anext(generator)
        if close:
            await generator.aclose()
        await guard.end(grant)
        assert set(engine.aborted) == {engine.calls[-1].request_id}
        engine.aborted.clear()
        return grant.usage

    for close in (True, False):
        usage = asyncio.run(leave(close))
        assert (usage.completion_tokens, usage.work.computed) == (1, 3)


def test_a_call_that_never_began_hides_no_usage(guard, grants):
    async def leave():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        first, _ = (guard.generate(PROMPT, params(grant.handle), "id") for _ in range(2))
        _ = [output async for output in first]
        await guard.end(grant)
        return grant.usage

    assert asyncio.run(leave()).prompt_tokens == 2


def test_whoever_leaves_while_usage_is_asked_for_is_counted(guard, engine, grants):
    answer, asked, told = engine.collective_rpc, asyncio.Event(), asyncio.Event()

    async def slow(method, args):
        asked.set()
        await told.wait()
        return await answer(method, args=args)

    engine.collective_rpc = slow

    async def leave():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        last = asyncio.create_task(anext(guard.generate(PROMPT, params(grant.handle), "id")))
        await asked.wait()
        last.cancel()
        await asyncio.wait({last})
        told.set()
        await guard.end(grant)
        return grant.usage

    assert asyncio.run(leave()).work.computed == 3


def test_each_call_is_asked_for_once_and_many_share_a_question(guard, engine, grants):
    async def crowd():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        calls = [guard.generate(PROMPT, params(grant.handle), "id") for _ in range(20)]

        async def drain(call):
            return [output async for output in call]

        await asyncio.gather(*map(drain, calls))
        await guard.end(grant)
        await guard.end(grant)
        return grant

    grant = asyncio.run(crowd())
    asked = [account for question in engine.asked for account in question]
    assert sorted(asked) == sorted(call.request_id for call in engine.calls)
    assert len(engine.asked) <= 2
    assert [call.usage.prompt_tokens for call in grant.calls] == [2] * 20


def test_an_answer_by_experts_outside_the_grant_is_not_given(guard, engine, grants):
    engine.slots = [2, 1, 1]
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        with pytest.raises(GrantError, match="outside"):
            run(guard.generate(PROMPT, params(grant.handle), "id"))
        assert grant.usage is None


def test_an_engine_that_dies_before_it_tells_leaves_nobody_waiting(guard, engine, grants):
    async def die():
        async def never(method, args):
            engine.errored = True
            await asyncio.Event().wait()

        engine.collective_rpc = never
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        with pytest.raises(UnavailableError):
            async for _ in guard.generate(PROMPT, params(grant.handle), "id"):
                pass
        await guard.end(grant)
        assert grant.usage is None

    asyncio.run(die())


def test_what_is_cut_off_ends_with_an_error_and_what_waits_does_not_begin(grants):
    engine = FakeEngine(outputs=3)
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"), Turns(1))

    async def go():
        with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
            runs = guard.generate(PROMPT, params(grant.handle), "a")
            waits = guard.generate(PROMPT, params(grant.handle), "b")
            assert await anext(runs) is not None
            waiting = asyncio.create_task(anext(waits))
            await asyncio.sleep(0)
            await guard.cut()
            assert engine.aborted == [engine.calls[0].request_id]
            with pytest.raises(UnavailableError, match="going down"):
                await anext(runs)
            with pytest.raises(UnavailableError, match="going down"):
                await waiting
            with pytest.raises(UnavailableError, match="going down"):
                guard.generate(PROMPT, params(grant.handle), "c")
        assert len(engine.calls) == 1

    asyncio.run(go())


def test_what_an_engine_that_is_cut_off_counted_is_not_waited_for_for_ever(
    guard, engine, grants, monkeypatch
):
    """It may answer no more at all, and each request has to end, with its result on record."""
    monkeypatch.setattr(guard_module, "_LOOK_AFTER_S", 0.01)
    monkeypatch.setattr(guard_module, "_LAST_WORDS_S", 0.1)
    engine.outputs = 3

    async def silent(method, *, args):
        await asyncio.Event().wait()

    async def go():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        answer = guard.generate(PROMPT, params(grant.handle), "a")
        await anext(answer)
        speaking, engine.collective_rpc = engine.collective_rpc, silent
        ending = asyncio.create_task(guard.end(grant))
        await asyncio.sleep(0.2)
        assert not ending.done()  # as long as it is not cut off, it may yet say
        await guard.cut()
        async with asyncio.timeout(10):
            await ending
        assert grant.usage is None

        engine.collective_rpc = speaking
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        call = grant.expect_call([1, 2], 1)
        grant.calls.append(call)
        await guard.end(grant)
        assert call.usage is not None  # what it says at once is heard

    asyncio.run(go())


@pytest.mark.parametrize(
    ("outputs", "computed", "cached", "n", "charged"),
    [(3, 10, 0, 1, 10), (1, 2, 0, 1, 3), (3, 2, 0, 1, 3), (3, 10, 2, 1, 12), (3, 10, 2, 2, 10)],
)
def test_what_was_written_and_never_seen_is_charged_too(
    grants, monkeypatch, outputs, computed, cached, n, charged
):
    """As of an answer in one piece whose client leaves before its end: of the limits and turns."""
    engine, turns = FakeEngine(outputs), Turns(sys.maxsize)
    engine.computed, engine.cached = computed, cached
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"), turns)
    spent, of_turns = [], []
    monkeypatch.setattr(turns, "spend", lambda _, tokens: of_turns.append(tokens))

    async def go():
        grant = grants.issue(MATH, "alice", recorded=RECORDED)
        grant.spend = spent.append
        asked = params(grant.handle)
        asked.n = n
        call = guard.generate(PROMPT, asked, "a")
        await anext(call)
        await call.aclose()
        await guard.end(grant)

    asyncio.run(go())
    assert sum(spent) == charged
    assert sum(of_turns) == charged - 2, "a turn has charged the prompt by itself"


VLLMS_DEFAULT = EngineArgs.max_logprobs


def telling(grant, asked):
    return SamplingParams(extra_args={HANDLE_ARG: grant.handle}, **asked)


@pytest.mark.parametrize(
    ("asked", "prompts"),
    [
        ({"logprobs": VLLMS_DEFAULT, "max_tokens": 1 << 20}, 1),
        ({"logprobs": VLLMS_DEFAULT, "max_tokens": 1 << 20, "prompt_logprobs": 9}, 1),
        ({"logprobs": 15, "max_tokens": 1 << 10, "n": 64}, 1),
        ({"logprobs": 15, "max_tokens": 1 << 10, "n": 2, "prompt_logprobs": 9}, 32),
        ({"logprobs": 0, "max_tokens": 1 << 14, "n": 64}, 1),
        ({"logprobs": 1023, "max_tokens": 32}, 1),
        ({"logprobs": 1023, "max_tokens": 1, "n": 8}, 4),
        ({"logprobs": (1 << 15) - 1, "max_tokens": 1}, 1),
        ({"logprobs": VLLMS_DEFAULT + 1, "max_tokens": (1 << 15) // 22}, 1),
    ],
)
def test_log_probabilities_are_told_as_far_as_vllms_default_goes_and_a_limit(
    guard, engine, grants, asked, prompts
):
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        for _ in range(prompts):
            run(guard.generate(PROMPT, telling(grant, asked), "id"))
    assert len(engine.calls) == prompts


@pytest.mark.parametrize(
    ("asked", "prompts", "field", "message"),
    [
        ({"logprobs": 1023, "max_tokens": 33}, 1, "logprobs", "33792 log probabilities"),
        ({"logprobs": 1023, "max_tokens": 1, "n": 33}, 1, "logprobs", "33792"),
        ({"logprobs": 1023, "max_tokens": 1}, 33, "logprobs", "33792"),
        ({"logprobs": 1 << 15, "max_tokens": 1}, 1, "logprobs", "32769"),
        ({"logprobs": VLLMS_DEFAULT + 1, "max_tokens": 1490}, 1, "logprobs", "in the 1490 tokens"),
        (
            {"logprobs": 1023, "max_tokens": 31, "prompt_logprobs": 512},
            1,
            "logprobs",
            "32770 log probabilities are asked for along the prompts and in the 31 tokens",
        ),
        (
            {"logprobs": VLLMS_DEFAULT, "max_tokens": 9000, "prompt_logprobs": 1 << 15},
            1,
            "prompt_logprobs",
            "65538 log probabilities are asked for along the prompts, in all choices",
        ),
    ],
)
def test_more_log_probabilities_are_refused_before_any_runs(
    guard, engine, grants, asked, prompts, field, message
):
    """vLLM makes text and objects of each on everybody's event loop."""
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:

        def ask():
            return guard.generate(PROMPT, telling(grant, asked), "id")

        waiting = [ask() for _ in range(prompts - 1)]
        with pytest.raises(VLLMValidationError, match=message) as error:
            ask()
        assert (error.value.parameter, "at most 32768" in str(error.value)) == (field, True)
        assert (len(waiting), engine.calls) == (prompts - 1, [])


@pytest.mark.parametrize(
    ("asked", "prompts", "found"),
    [
        ({"logprobs": VLLMS_DEFAULT, "max_tokens": 1 << 20, "n": 2}, 1, 42 << 20),
        ({"logprobs": VLLMS_DEFAULT, "max_tokens": 1 << 20}, 2, 42 << 20),
        ({"logprobs": 15, "max_tokens": 1025, "n": 64}, 1, 16 * 1025 * 64),
        ({"logprobs": 15, "max_tokens": 1025, "n": 8}, 8, 16 * 1025 * 64),
        ({"logprobs": 0, "max_tokens": (1 << 14) + 1, "n": 64}, 1, ((1 << 14) + 1) * 64),
        ({"logprobs": 15, "max_tokens": None, "n": 64}, 1, 16 * 1025 * 64),
    ],
)
def test_several_choices_are_refused_what_would_fill_the_memory(
    engine, grants, asked, prompts, found
):
    engine.model_config = SimpleNamespace(get_vocab_size=lambda: 1024, max_model_len=1025)
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"))
    with grants.issue(MATH, "alice", recorded=RECORDED) as grant:
        waiting = [guard.generate(PROMPT, telling(grant, asked), "id") for _ in range(prompts - 1)]
        with pytest.raises(VLLMValidationError, match=f"{found} .* at most {1 << 20}") as error:
            guard.generate(PROMPT, telling(grant, asked), "id")
        assert (error.value.parameter, len(waiting), engine.calls) == ("logprobs", prompts - 1, [])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logprobs": -1, "max_tokens": 32}, "32800 log probabilities .* 32 tokens"),
        ({"logprobs": 1023, "max_tokens": None}, "33792 log probabilities .* 33 tokens"),
        ({"prompt_logprobs": -1, "n": 16}, "32800 log probabilities .* along the prompts"),
    ],
)
def test_where_no_number_is_given_all_there_may_be_are_counted(engine, grants, asked, message):
    engine.model_config = SimpleNamespace(get_vocab_size=lambda: 1024, max_model_len=33)
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"))
    grant = grants.issue(MATH, "alice", recorded=RECORDED)
    with pytest.raises(VLLMValidationError, match=message):
        guard.generate(PROMPT, telling(grant, asked), "id")
