"""The masks of Model Runner V2, driven as its runner drives them, with batches made by hand."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from expertgate.model.masks import EXTRA_ARG, TokenMasks
from expertgate.model.model_state import MaskedModelState
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet

SLOTS, TOKENS = 8, 64
PUBLIC = PUBLIC_ONLY.signed


@pytest.fixture
def state(monkeypatch):
    """Of vLLM's own state only what ours reads; the rest needs a loaded model."""

    def bare(self, vllm_config, model, encoder_cache, device):
        self.model, self.device, self.max_num_reqs = model, device, SLOTS
        self.rope_state = self.prompt_embeds_state = None
        self.supports_mm_inputs = False

    monkeypatch.setattr(DefaultModelState, "__init__", bare)
    cpu = torch.device("cpu")
    model = SimpleNamespace(masks=TokenMasks(TOKENS, cpu))
    return MaskedModelState(None, model, None, cpu)


def request(name, mask):
    extra_args = None if mask is None else {EXTRA_ARG: mask}
    params = SimpleNamespace(extra_args=extra_args)
    return SimpleNamespace(req_id=name, sampling_params=params)


def batch(slots, lengths, padding=0):
    return SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0),
        num_tokens_after_padding=sum(lengths) + padding,
    )


def run(state, made):
    """One real step, as `execute_model` orders the hooks; what the model would read."""
    state.apply_staged_writes()
    state.preprocess_state(made, (), None, None)
    state.prepare_inputs(made, None)
    return state.model.masks.words.tolist()


def run_dummy(state, made):
    state.prepare_inputs(made, None)
    return state.model.masks.words.tolist()


def rows(*pairs):
    tokens = [word for word, length in pairs for _ in range(length)]
    return tokens + [PUBLIC] * (TOKENS - len(tokens))


def test_each_token_gets_the_mask_of_its_slot(state):
    state.add_request(3, request("a", 0b101))
    state.add_request(0, request("b", 1 << 63 | 1))
    state.add_request(5, request("c", None))
    got = run(state, batch([5, 0, 3], [2, 3, 1], padding=2))
    assert got == rows((PUBLIC, 2), (ExpertSet(1 << 63 | 1).signed, 3), (0b101, 1))


def test_a_dummy_batch_that_names_live_slots_runs_at_rest(state):
    """Threat c3."""
    state.add_request(0, request("a", 127))
    run(state, batch([0], [5]))
    assert run_dummy(state, batch([0], [5])) == rows()
    assert run(state, batch([0], [1])) == rows((127, 1))


def test_graph_capture_runs_at_rest(state):
    state.add_request(0, request("a", 127))
    run(state, batch([0], [5]))
    state.prepare_dummy_inputs(1, 8)
    assert state.model.masks.words.tolist() == rows()


def test_the_same_batch_object_is_armed_once(state):
    """A dummy run that reused the object of a real one must not inherit its masks."""
    state.add_request(0, request("a", 127))
    made = batch([0], [5])
    run(state, made)
    assert run_dummy(state, made) == rows()


def test_a_slot_that_is_freed_and_taken_in_one_step_has_the_takers_mask(state):
    """Threat c4: both writes are staged for the same step, and must not race."""
    state.add_request(2, request("a", 127))
    run(state, batch([2], [1]))
    state.remove_request("a")
    state.add_request(2, request("b", 0b11))
    assert run(state, batch([2], [1])) == rows((0b11, 1))


def test_a_request_without_a_mask_does_not_inherit_its_slots(state):
    state.add_request(2, request("a", 127))
    run(state, batch([2], [1]))
    state.remove_request("a")
    state.add_request(2, request("b", None))
    assert run(state, batch([2], [1])) == rows((PUBLIC, 1))


def test_removing_is_idempotent_and_unknown_ids_are_ignored(state):
    """The runner removes every request before it adds it."""
    state.remove_request("never seen")
    state.add_request(1, request("a", 127))
    state.remove_request("a")
    state.remove_request("a")
    state.add_request(1, request("b", 5))
    assert run(state, batch([1], [1])) == rows((5, 1))


def test_slots_that_churn_a_thousand_times(state):
    """Threat c4: add, abort, preempt, reuse, with dummies in between, against a plain dictionary."""
    chance = random.Random(0)
    live: dict[str, tuple[int, int]] = {}
    for turn in range(1000):
        for name in [n for n in live if chance.random() < 0.3]:
            del live[name]
            state.remove_request(name)
        free = [s for s in range(SLOTS) if s not in {slot for slot, _ in live.values()}]
        for slot in chance.sample(free, chance.randint(0, len(free))):
            name, mask = f"{turn}-{slot}", chance.choice([None, 1, 127, 0b1010, 1 << 63])
            live[name] = (slot, ExpertSet(mask or 1).signed)
            state.add_request(slot, request(name, mask))
        if chance.random() < 0.2:
            assert run_dummy(state, batch(list(range(SLOTS)), [1] * SLOTS)) == rows()
        order = chance.sample(sorted(live), len(live))
        lengths = [chance.randint(1, 7) for _ in order]
        got = run(state, batch([live[n][0] for n in order], lengths))
        assert got == rows(*((live[n][1], k) for n, k in zip(order, lengths, strict=True)))
