"""The ledger against a loop over tokens, and what a step may look like."""

from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertgate.kernels.routing import NO_EXPERT, mask_logits, select
from expertgate.model import ledger as module
from expertgate.model.ledger import ACCOUNT_ARG, Scheduled, account_of
from expertgate.model.usage import WEIGHT_UNIT, Work
from tests.support.model_state import (
    EXPERTS,
    LAYERS,
    TOKENS,
    TOP_K,
    batch,
    new_ledger,
    new_state,
    request,
    run,
    run_dummy,
)

MASKS = {"a": 0b1111111, "b": 0b0000001, "c": 0b0101001, "d": 0b1100110}
NOTHING = Work(LAYERS, 0, 0, (0,) * EXPERTS, (0,) * EXPERTS)


def route(ledger, names, seed, padding=0):
    """What the layers would leave of a step with one row for each name; NaN in the rest."""
    chance = torch.Generator().manual_seed(seed)
    ledger.logits.fill_(torch.nan)
    words = torch.tensor([MASKS[name] for name in names], dtype=torch.int64)
    for layer in range(LAYERS):
        raw = torch.randn(len(names), EXPERTS, generator=chance) * 3
        ledger.logits[layer, : len(names)] = mask_logits(raw, words)
    ledger.logits[:, len(names) : len(names) + padding] = 1.0


class Loop:
    """The same totals the obvious way: token by token, in exact fractions."""

    def __init__(self):
        self.slots = defaultdict(lambda: [0] * EXPERTS)
        self.weights = defaultdict(lambda: [Fraction(0)] * EXPERTS)
        self.computed, self.cached = defaultdict(int), defaultdict(int)
        self.reached = defaultdict(int)

    def add(self, ledger, step):
        row = 0
        for part in step:
            for position in range(part.start, part.start + part.length):
                if position >= self.reached[part.request_id]:
                    self.cached[part.account] += position - self.reached[part.request_id]
                    self.reached[part.request_id] = position + 1
                    self.computed[part.account] += 1
                    for layer in ledger.logits:
                        self._token(part.account, layer[row : row + 1])
                row += 1

    def _token(self, account, logits):
        plan = select(logits, top_k=TOP_K)
        for weight, expert in zip(plan.weights[0], plan.experts[0].tolist(), strict=True):
            if expert != NO_EXPERT:
                self.slots[account][expert] += 1
                self.weights[account][expert] += Fraction(weight.item())

    def check(self, account, work):
        assert work.slots == tuple(self.slots[account])
        assert (work.computed, work.cached) == (self.computed[account], self.cached[account])
        for expert in range(EXPERTS):
            # Each weight is rounded once, by half a unit at most.
            error = abs(Fraction(work.weights[expert], WEIGHT_UNIT) - self.weights[account][expert])
            assert error <= Fraction(work.slots[expert], 2 * WEIGHT_UNIT)
            if not MASKS[account] >> expert & 1:
                assert work.slots[expert] == work.weights[expert] == 0


parts = st.builds(
    lambda account, child, start, length: Scheduled(f"{child}_{account}", account, start, length),
    st.sampled_from(sorted(MASKS)),
    st.integers(0, 1),
    st.integers(0, 12),
    st.integers(1, 9),
)
steps = st.lists(parts, max_size=6, unique_by=lambda part: part.request_id)


@settings(max_examples=30)
@given(st.lists(st.tuples(steps, st.integers(0, 5)), max_size=5))
def test_totals_are_those_of_a_loop_over_tokens(several):
    """Positions come in any order here: repeated, overlapping, with gaps, in chunks of any size."""
    ledger, loop = new_ledger(), Loop()
    for seed, (step, padding) in enumerate(several):
        ledger.begin(step)
        names = [part.account for part in step for _ in range(part.length)]
        route(ledger, names, seed, padding)
        loop.add(ledger, step)
        if seed % 2:
            ledger.settle()  # at once, as V1 does, or when the next one begins, as V2 does
    for account, work in zip(MASKS, ledger.close(list(MASKS)), strict=True):
        loop.check(account, work)
    assert ledger.close(list(MASKS)) == [NOTHING] * len(MASKS), "closed accounts are forgotten"


def test_a_long_step_is_routed_in_parts(monkeypatch):
    whole, parted = new_ledger(), new_ledger()
    step = [Scheduled("r", "a", 0, 40)]
    for ledger in (whole, parted):
        monkeypatch.setattr(module, "_ROUTED_AT_ONCE", 1 if ledger is parted else 1 << 14)
        ledger.begin(step)
        route(ledger, ["a"] * 40, 0)
        ledger.settle()
    assert whole.close(["a"]) == parted.close(["a"]) != [NOTHING]


def test_more_accounts_than_rows():
    ledger = new_ledger()
    names = [str(i) for i in range(1000)]
    for start in range(0, len(names), TOKENS):
        some = names[start : start + TOKENS]
        ledger.begin([Scheduled(name, name, 0, 1) for name in some])
        route(ledger, ["a"] * len(some), start)
    works = ledger.close(names)
    assert {(work.computed, sum(work.slots)) for work in works} == {(1, LAYERS * TOP_K)}
    rows = ledger._totals.shape[1]
    for name in names:
        ledger.begin([Scheduled(name, name, 0, 1)])
        route(ledger, ["a"], 0)
        (again,) = ledger.close([name])
        assert (again.computed, sum(again.slots)) == (1, LAYERS * TOP_K)
    ledger.begin([Scheduled(name, name, 0, 1) for name in names])
    assert ledger._totals.shape[1] == rows, "rows are used again"


def test_no_more_is_put_aside_than_the_largest_step_has():
    ledger, most = new_ledger(), 0
    for start in range(0, 5 * TOKENS, 10):
        ledger.begin([Scheduled("r", "a", start, 10)])
        route(ledger, ["a"] * 10, start)
        ledger.settle()
        most = max(most, sum(map(len, ledger._aside_rows)))
    assert TOKENS - 10 < most <= TOKENS


def test_accounts_that_nobody_closes_are_bounded(monkeypatch, caplog):
    monkeypatch.setattr(module, "_MAX_ACCOUNTS", 3)
    ledger = new_ledger()
    for name in "abcd":
        ledger.begin([Scheduled(name, name, 0, 1)])
        route(ledger, [name], 0)
    assert "never closed" in caplog.text
    assert [work.computed for work in ledger.close(list("abcd"))] == [0, 1, 1, 1]


def test_what_has_no_account_is_not_counted():
    ledger = new_ledger()
    ledger.begin([Scheduled("x", None, 0, 3), Scheduled("y", "b", 0, 2)])
    route(ledger, ["a"] * 3 + ["b"] * 2, 0)
    (work,) = ledger.close(["b"])
    assert work.slots == (2 * LAYERS, *[0] * (EXPERTS - 1))


@pytest.mark.parametrize("extra_args", [None, {}, {ACCOUNT_ARG: None}, {ACCOUNT_ARG: 7}])
def test_an_account_is_a_name(extra_args):
    assert account_of(extra_args) is None
    assert account_of({ACCOUNT_ARG: "x"}) == "x"


# --- Model Runner V2 ------------------------------------------------------------------------------


@pytest.fixture
def state():
    return new_state()


def step(state, names, lengths, starts, padding=0, seed=0):
    """One real step of V2 and what its layers leave; slots are 0, 1, … in the order of names."""
    slots = list(range(len(names)))
    run(state, batch(slots, lengths, padding, names, starts))
    tokens = [name[0] for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    route(state.ledger, tokens, seed, padding)


def test_chunks_and_decodes_of_a_batch_go_to_their_accounts(state):
    state.add_request(0, request("a1", MASKS["a"], "a"))
    state.add_request(1, request("b1", MASKS["b"], "b"))
    step(state, ["a1", "b1"], [4, 2], [0, 0], padding=3, seed=1)
    step(state, ["a1", "b1"], [3, 1], [4, 2], padding=1, seed=2)
    a, b = state.ledger.close(["a", "b"])
    assert (a.computed, b.computed) == (7, 3)
    assert sum(a.slots) == 7 * LAYERS * TOP_K
    assert b.slots == (3 * LAYERS, *[0] * (EXPERTS - 1))
    assert b.weights == (3 * LAYERS * WEIGHT_UNIT, *[0] * (EXPERTS - 1))


def test_a_preempted_request_is_removed_added_anew_and_counted_once(state):
    state.add_request(0, request("a1", MASKS["a"], "a"))
    step(state, ["a1"], [5], [2], seed=3)  # two tokens were cached
    state.remove_request("a1")
    state.add_request(0, request("a1", MASKS["a"], "a"))
    step(state, ["a1"], [7], [0], seed=4)
    step(state, ["a1"], [1], [7], seed=5)
    (work,) = state.ledger.close(["a"])
    assert (work.computed, work.cached, sum(work.slots)) == (6, 2, 6 * LAYERS * TOP_K)


def test_what_a_captured_graph_leaves_is_not_counted(state):
    state.add_request(0, request("a1", MASKS["a"], "a"))
    step(state, ["a1"], [4], [0])
    want = new_ledger()
    want.begin([Scheduled("a1", "a", 0, 4)])
    route(want, ["a"] * 4, 0)
    state.prepare_dummy_inputs(1, 8)
    state.ledger.logits.fill_(7.0)
    assert state.ledger.close(["a"]) == want.close(["a"])


def test_dummies_between_steps_are_not_counted(state):
    """Threat c3: a dummy names live slots, and overwrites what the step before it left."""
    state.add_request(0, request("a1", MASKS["a"], "a"))
    quiet = new_state()
    quiet.add_request(0, request("a1", MASKS["a"], "a"))
    for made in (state, quiet):
        for turn in range(3):
            step(made, ["a1"], [4], [4 * turn], seed=turn)
            if made is state:
                if turn == 1:
                    made.prepare_dummy_inputs(1, 8)
                run_dummy(made, batch([0], [4], names=["a1"]))
                made.ledger.logits.fill_(7.0)
    assert state.ledger.close(["a"]) == quiet.ledger.close(["a"]) != [NOTHING]
